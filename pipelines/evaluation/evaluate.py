"""Evaluation: a stage's student beside the untrained one, by kNN and by cosine to its teachers.

Nothing is trained here. The student is frozen and read at one resolution; teachers are never run:
their tokens of the same centre views come from the caches. Every figure is of held-out images.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache.files import atomic
from cache.format import layout
from eupe.encoders import Features
from pipelines.evaluation import knn
from pipelines.evaluation.compare import BASELINE, FINAL, INITIAL, Constants, look
from pipelines.evaluation.frozen import FrozenStudent, evaluation_resolutions
from pipelines.evaluation.knn import Knn
from pipelines.machines.progress import track
from pipelines.recipe.config import Recipe

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Cosine:
    """Mean cosine similarity of predicted and normalised teacher tokens, over teachers and images.

    Attributes:
        baseline: of the best prediction that ignores the image (see `Constants`).
        init: of the student before training.
        final: of the student after.
    """

    baseline: float
    init: float
    final: float


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        step: steps that the student was trained.
        knn: of the student and its teachers; None if no label was asked for.
        summary: cosine of the summaries.
        patches: cosine of the patches.
        per_teacher: teacher -> summary and patches cosine of its own.
    """

    step: int
    knn: Knn | None
    summary: Cosine
    patches: Cosine
    per_teacher: dict[str, dict[str, Cosine]]


def evaluate(student: FrozenStudent) -> Evaluation:
    """Evaluate a stage's newest checkpoint beside the student before any stage.

    kNN as in EUPE (arXiv:2603.22387), IN1k-kNN: class token, L2, majority vote. The bank is train
    sets (`Recipe.bank`) and the queries the held-out set, each image in its centre view.

    Args:
        student: of the stage; the recipe's `evaluation` says how it is judged.

    Raises:
        BadInput: images without the label, or a checkpoint of another network.
        StoreError: a cache cannot be read.
    """
    recipe, stage, device = student.recipe, student.stage, student.device
    models = {INITIAL: student.initial, FINAL: student.final}
    constants = Constants(student.final.encoder.grid(recipe.evaluation.resolution))
    train = [dataset.name for dataset in recipe.bank]
    held_out, at = recipe.held_out.name, evaluation_resolutions(recipe, stage)
    rows = {name: student.images.rows(name) for name in (*train, held_out)}
    with track(sum(map(len, rows.values())), f"Evaluating {stage.name}") as progress:
        see = partial(
            look,
            models=models,
            normalisers=student.normalisers,
            raw=recipe.evaluation.label is not None,
            device=device,
            advance=progress.advance,
        )
        banks = {
            name: see(student.images.batches(name, rows[name], at), fit=constants) for name in train
        }
        queries = see(student.images.batches(held_out, rows[held_out], at), judge=constants)
    per_teacher = {
        teacher: {
            kind: Cosine(
                *(
                    float(queries.cosines[who, teacher][:, column].double().mean())
                    for who in (BASELINE, INITIAL, FINAL)
                )
            )
            for column, kind in enumerate(Features._fields)
        }
        for teacher in stage.teachers
    }
    return Evaluation(
        step=student.saved.step,
        knn=knn.probe(student.images, banks, queries, device),
        summary=_mean([each["summary"] for each in per_teacher.values()]),
        patches=_mean([each["patches"] for each in per_teacher.values()]),
        per_teacher=per_teacher,
    )


def device(recipe: Recipe) -> str:
    """Return where this process evaluates: it may run on a node without the workers' GPUs."""
    if not recipe.workers.use_gpu:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    print("workers.use_gpu, and this node has no GPU: evaluating on its CPUs", file=sys.stderr)
    return "cpu"


def write(directory: Path, evaluation: Evaluation) -> Path:
    """Write an evaluation as JSON into a folder, whole or not at all; return the file.

    Raises:
        StoreError: it cannot be written.
    """
    path = directory / EVALUATION_FILE
    text = json.dumps(asdict(evaluation), indent=2) + "\n"
    atomic.write(path, [text.encode()], layout.scratch_directory(directory))
    return path


def _mean(cosines: Sequence[Cosine]) -> Cosine:
    columns = zip(*((each.baseline, each.init, each.final) for each in cosines), strict=True)
    return Cosine(*(float(np.mean(column)) for column in columns))
