"""The evaluation during training: a hook that the loop calls with the model it has."""

import sys
from functools import cache

import torch

from eupe.encoders import shapes
from eupe.errors import BadInput
from eupe.heads import DistillationModel
from eupe.probes import knn_predict, top1
from pipelines.evaluation.compare import FINAL, look
from pipelines.evaluation.frozen import CentreViews, evaluation_resolutions
from pipelines.evaluation.labels import labels, numbered
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.records import checkpoint
from pipelines.training.batches import Batch, Batches
from pipelines.training.inputs import Inputs
from pipelines.training.loop import SCORE, Evaluate

PER_CLASS = 20
"""Images a class that the bank of the evaluation during training has, or there is no kNN in it."""
HOOK_IMAGES = 1024
"""Images of each set that the evaluation during training looks at."""


def hook(recipe: Recipe, stage: StageConfig, given: Inputs) -> Evaluate:
    """Return what the training loop calls every `evaluate_every` steps: held-out cosine and kNN.

    It looks at no more than HOOK_IMAGES of the bank's first set and of the held-out set, spread
    evenly over the samples that are there when this process begins. The bank's pixels are kept in
    memory.

    Args:
        recipe: the run.
        stage: its stage.
        given: what it trains on.

    Raises:
        BadInput: images without the label, fewer than k of them, or a resolution that the student
            does not take.
        StoreError: a cache of centre views cannot be read.
    """
    resuming = checkpoint.latest(recipe.stage_directory(stage.name)) is not None
    images = CentreViews(recipe, stage, dict(given.normalisers), given.opened, resuming)
    bank_name, held_out, label = recipe.bank[0].name, recipe.held_out.name, recipe.evaluation.label
    # Asked for now, so that a long run does not end on what its evaluation lacks.
    shapes(recipe.trained_by(stage).encoder, recipe.evaluation.resolution)
    rows = {name: images.rows(name, HOOK_IMAGES) for name in (bank_name, held_out)}
    at = evaluation_resolutions(recipe, stage)
    if label is not None:
        if recipe.evaluation.k > len(rows[bank_name]):
            raise BadInput(
                f"evaluation.k = {recipe.evaluation.k}: the bank has {len(rows[bank_name])} images"
            )
        known, _ = numbered(
            *(
                labels(
                    images, name, images.feeds[name].source.samples.sample_ids(rows[name]), label
                )
                for name in (bank_name, held_out)
            )
        )
        if len(known) < PER_CLASS * len(known.unique()) and len(known) == HOOK_IMAGES:
            label = None  # a neighbour of the right class would be luck; the last figure has all
            print(
                f"{HOOK_IMAGES} images are fewer than {PER_CLASS} a class: no kNN during training",
                file=sys.stderr,
            )

    def swept(name: str, tokens: bool) -> Batches:
        return images.batches(name, rows[name], at, tokens)

    @cache
    def bank_pictures() -> list[Batch]:
        return list(swept(bank_name, tokens=False))

    def figures(model: DistillationModel, done: int) -> dict[str, float]:
        # Read anew each time: the teachers' tokens of them fill gigabytes.
        device = next(model.parameters()).device
        shown = swept(held_out, tokens=True)
        queries = look(shown, {FINAL: model}, {FINAL: model.encoder}, device=device)
        each = [queries.cosines[FINAL, name].mean(0) for name in images.normalisers]
        both = torch.stack(each).mean(0)
        found = {
            "held_out/cosine_summary": float(both[0]),
            "held_out/cosine_patches": float(both[1]),
            SCORE: float(both.mean()),
        }
        if label is not None:
            bank = look(bank_pictures(), encoders={FINAL: model.encoder}, device=device)
            known, truth = numbered(
                labels(images, bank_name, bank.sample_ids, label),
                labels(images, held_out, queries.sample_ids, label),
            )
            students = bank.summaries[FINAL], queries.summaries[FINAL]
            guessed = knn_predict(students[0], known, students[1], recipe.evaluation.k)
            found["held_out/knn_top1"] = top1(guessed, truth)
        return found

    return figures
