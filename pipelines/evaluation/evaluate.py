"""Evaluation: is the student any good? kNN by a label, and cosine to its teachers, both held out.

Nothing is trained here. The student is frozen and read at one resolution; teachers are never run:
their tokens of the same centre views come from the caches.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eupe.encoders import Encoder, Features
from eupe.errors import BadInput
from eupe.heads import DistillationModel
from eupe.probes import knn_predict, paired_test, top1
from pipelines.evaluation.compare import BASELINE, Constants, Seen, look
from pipelines.machines.progress import track
from pipelines.recipe.config import Recipe, StageConfig
from pipelines.recipe.scales import Scales
from pipelines.records import checkpoint
from pipelines.training import inputs, start
from pipelines.training.batches import Batch, Batches, Feed
from pipelines.training.draws import Sweep
from pipelines.training.inputs import Inputs
from pipelines.training.loop import SCORE, Evaluate

HOOK_IMAGES = 1024
"""Images of each set that the evaluation during training looks at."""
INIT, FINAL = "init", "final"
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
class Knn:
    """What the kNN probe found; figures of encoders are shares of the queries, 0 to 1.

    Attributes:
        label: what it predicts.
        k: neighbours.
        bank: images it looks among.
        queries: images it predicts.
        teacher: teacher -> with its cached summaries.
        init: with the summaries of the student before training.
        final: with those of the student after.
        p_value: exact paired test that both students are right equally often.
    """

    label: str
    k: int
    bank: int
    queries: int
    teacher: dict[str, float]
    init: float
    final: float
    p_value: float


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


def evaluate(recipe: Recipe, stage: StageConfig, device: str | torch.device = "cpu") -> Evaluation:
    """Evaluate a stage's newest checkpoint beside the student before any stage.

    kNN as in EUPE (arXiv:2603.22387), IN1k-kNN: class token, L2, majority vote. The bank is train
    sets (`Recipe.bank`) and the queries the held-out set, each image in its centre view.

    Args:
        recipe: the run; `evaluation` says how.
        stage: which of its stages.
        device: to compute on.

    Raises:
        BadInput: no checkpoint, or images without the label.
        StoreError: a cache cannot be read.
    """
    saved = checkpoint.require(recipe.stage_directory(stage.stage))
    opened = inputs.from_caches(recipe, stage, saved.pins)
    models = {name: start.untrained_model(recipe, stage, opened.dims) for name in (INIT, FINAL)}
    start.load(models[FINAL], saved)
    for model in models.values():
        model.eval().to(device)
    feeds = inputs.centre_feeds(recipe, stage, opened.normalisers)
    constants = Constants(models[FINAL].encoder.grid(recipe.evaluation.resolution))
    train = [dataset.name for dataset in recipe.bank]
    held_out = recipe.held_out.name
    sweeps = {name: sweep(recipe, stage, name, feeds[name]) for name in (*train, held_out)}
    total = sum(len(sweep) for sweep, _ in sweeps.values())
    with track(total, f"Evaluating {stage.stage}") as progress:
        banks = [
            look(
                sweeps[name][1],
                models,
                opened,
                fit=constants,
                device=device,
                advance=progress.advance,
            )
            for name in train
        ]
        queries = look(
            sweeps[held_out][1],
            models,
            opened,
            judge=constants,
            device=device,
            advance=progress.advance,
        )
    per_teacher = {
        teacher: {
            kind: Cosine(
                *(
                    float(queries.cosines[who, teacher][:, column].double().mean())
                    for who in (BASELINE, INIT, FINAL)
                )
            )
            for column, kind in enumerate(Features._fields)
        }
        for teacher in opened.dims
    }
    return Evaluation(
        step=saved.step,
        knn=_knn(recipe, feeds, dict(zip(train, banks, strict=True)), queries, device),
        summary=_mean([each["summary"] for each in per_teacher.values()]),
        patches=_mean([each["patches"] for each in per_teacher.values()]),
        per_teacher=per_teacher,
    )


def _knn(
    recipe: Recipe,
    feeds: Mapping[str, Feed],
    banks: Mapping[str, Seen],
    queries: Seen,
    device: str | torch.device,
) -> Knn | None:
    """Predict the held-out images' labels from their neighbours among the bank."""
    label, k = recipe.evaluation.label, recipe.evaluation.k
    if label is None:
        return None
    named = [_labels(feeds[name], bank.sample_ids, label) for name, bank in banks.items()]
    known, truth = _numbered(
        list(chain.from_iterable(named)),
        _labels(feeds[recipe.held_out.name], queries.sample_ids, label),
    )

    def right(kind: str, name: str) -> Tensor:
        summaries = torch.cat([getattr(bank, kind)[name] for bank in banks.values()]).to(device)
        asked = getattr(queries, kind)[name].to(device)
        return knn_predict(summaries, known.to(device), asked, k).cpu() == truth

    before, after = right("students", INIT), right("students", FINAL)
    return Knn(
        label=label,
        k=k,
        bank=len(known),
        queries=len(truth),
        teacher={name: _share(right("teachers", name)) for name in queries.teachers},
        init=_share(before),
        final=_share(after),
        p_value=paired_test(before, after),
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
    """Write an evaluation as JSON into a folder; return the file."""
    path = directory / EVALUATION_FILE
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(asdict(evaluation), indent=2) + "\n")
    temporary.replace(path)
    return path


def hook(recipe: Recipe, stage: StageConfig, opened: Inputs) -> Evaluate:
    """Return what the training loop calls every `evaluate_every` steps: held-out cosine and kNN.

    At most HOOK_IMAGES of the first set of the bank and of the held-out set, spread evenly over
    what there is when the run begins or goes on. Of the bank the pictures are kept.

    Args:
        recipe: the run.
        stage: its stage.
        opened: what it trains on.

    Raises:
        BadInput: images without the label, fewer than k of them, or a resolution that the
            student does not take.
        StoreError: a cache of centre views cannot be read.
    """
    begun = checkpoint.latest(recipe.stage_directory(stage.stage)) is not None
    feeds = inputs.centre_feeds(recipe, stage, opened.normalisers, begun)
    bank_name, held_out, label = recipe.bank[0].name, recipe.held_out.name, recipe.evaluation.label
    # Asked for now, so that a long run does not end on what its evaluation lacks.
    with torch.device("meta"):
        student = Encoder(recipe.trained_by(stage).encoder)
    student.check_resolution(recipe.evaluation.resolution)

    def swept(name: str) -> tuple[np.ndarray, Batches]:
        return sweep(recipe, stage, name, feeds[name], HOOK_IMAGES)

    if label is not None:
        for name in (bank_name, held_out):
            rows, _ = swept(name)
            _labels(feeds[name], feeds[name].source.samples.sample_ids(rows), label)
            if name == bank_name and recipe.evaluation.k > len(rows):
                raise BadInput(
                    f"evaluation.k = {recipe.evaluation.k}: the bank has {len(rows)} images"
                )

    @cache
    def bank_pictures() -> list[Batch]:
        return [replace(batch, parts=[]) for batch in swept(bank_name)[1]]

    def seen(batches: Iterable[Batch], model: DistillationModel) -> Seen:
        return look(batches, {FINAL: model}, opened, device=next(model.parameters()).device)

    def figures(model: DistillationModel, done: int) -> dict[str, float]:
        # Read anew each time: the teachers' tokens of them fill gigabytes.
        queries = seen(swept(held_out)[1], model)
        both = torch.stack([queries.cosines[FINAL, name].mean(0) for name in opened.dims]).mean(0)
        found = {
            "held_out/cosine_summary": float(both[0]),
            "held_out/cosine_patches": float(both[1]),
            SCORE: float(both.mean()),
        }
        if label is not None:
            bank = seen(bank_pictures(), model)
            known, truth = _numbered(
                _labels(feeds[bank_name], bank.sample_ids, label),
                _labels(feeds[held_out], queries.sample_ids, label),
            )
            students = bank.students[FINAL], queries.students[FINAL]
            guessed = knn_predict(students[0], known, students[1], recipe.evaluation.k)
            found["held_out/knn_top1"] = top1(guessed, truth)
        return found

    return figures


def sweep(
    recipe: Recipe,
    stage: StageConfig,
    name: str,
    feed: Feed,
    limit: int | None = None,
    at: Scales | None = None,
) -> tuple[np.ndarray, Batches]:
    """Return rows of a dataset's centre views, and batches that show each of them once.

    Args:
        recipe: the run.
        stage: whose teachers are asked.
        name: of the dataset.
        feed: how it is read.
        limit: at most so many rows, spread evenly; None for all.
        at: resolutions; None for those of an evaluation (`scales`).
    """
    rows = np.concatenate([np.arange(s.start, s.stop) for s in feed.source.shards()])
    if limit is not None and len(rows) > limit:
        rows = rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
    draw = Sweep(name, rows, recipe.evaluation.batch)
    fixed = at or scales(recipe, stage)
    return rows, Batches(
        {name: feed},
        draw,
        lambda step: fixed,
        lambda scale, count: count,
        range(draw.num_steps),
        threads=recipe.workers.loader_threads,
        prefetch=recipe.workers.prefetch_batches,
    )


def scales(recipe: Recipe, stage: StageConfig) -> Scales:
    """Return the resolutions of an evaluation: the student's own, teachers' largest cached."""
    teachers = {name: max(sides) for name, sides in stage.teacher_scales.items()}
    return Scales(recipe.evaluation.resolution, teachers)


def _labels(feed: Feed, sample_ids: Sequence[str], label: str) -> list[str]:
    samples = feed.source.samples
    table = samples.take(samples.rows_of(sample_ids))
    found = [json.loads(text).get(label) for text in table["labels"].to_list()]
    if None in found:
        example = json.loads(table["labels"][found.index(None)])
        raise BadInput(
            f"evaluation.label = {label!r}: sample {sample_ids[found.index(None)]!r} has none; its "
            f"labels are {', '.join(sorted(example)) or 'none at all'}; evaluation.label=null "
            "leaves kNN out"
        )
    return found


def _numbered(bank: Sequence[str], queries: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Number the classes of two lists of labels alike."""
    classes = {label: number for number, label in enumerate(sorted({*bank, *queries}))}
    known, asked = (torch.tensor([classes[label] for label in each]) for each in (bank, queries))
    return known, asked


def _share(correct: Tensor) -> float:
    return float(correct.double().mean())


def _mean(cosines: Sequence[Cosine]) -> Cosine:
    columns = zip(*((each.baseline, each.init, each.final) for each in cosines), strict=True)
    return Cosine(*(float(np.mean(column)) for column in columns))
