"""Evaluation: every encoder of some stages by the same probes, and students beside their teachers.

Nothing is trained here but linear probes. Networks are frozen; teachers are never run: their tokens
of the same centre views come from the caches. Every figure is of held-out images.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from cache.files import copies
from cache.format import layout
from eupe.encoders import Features
from eupe.paired import Interval, mean_interval, paired_test, runs_interval
from pipelines.evaluation.compare import BASELINE, FINAL, INITIAL, Constants, look
from pipelines.evaluation.encoders import PROBES, Classes, Judged, Probe, judge
from pipelines.evaluation.frozen import FrozenStudent, by_teachers, evaluation_resolutions
from pipelines.evaluation.labels import labels, numbered
from pipelines.evaluation.networks import PIXELS, Shown, final_name, initial_name, show, title
from pipelines.machines.progress import track
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.recipe.stores import BANK_PATCHES

EVALUATION_FILE, CORRECT_FILE = "evaluation.json", "correct.parquet"


@dataclass(frozen=True)
class Cosine:
    """Mean cosine similarity of predicted and normalised teacher tokens, over teachers and images.

    Attributes:
        baseline: of the best prediction that ignores the image (see `Constants`).
        init: of the student before training.
        final: of the student after.
        low: lower end of the bootstrap interval of `final`.
        high: its upper end.
    """

    baseline: float
    init: float
    final: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """How near a stage brought its student to its teachers, through the stage's own heads.

    Attributes:
        summary: cosine of the summaries, mean over teachers.
        patches: cosine of the patches, mean over teachers.
        per_teacher: teacher -> summary and patches cosine of its own.
    """

    summary: Cosine
    patches: Cosine
    per_teacher: dict[str, dict[str, Cosine]]


@dataclass(frozen=True)
class Versus:
    """How much more often the student is right than something trivial.

    Attributes:
        difference: of the shares, and its bootstrap interval.
        p_value: of the exact paired test that both are right equally often.
    """

    difference: Interval
    p_value: float


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        step: steps that the last of its stages was trained.
        student: name of the encoder that the last of its stages made.
        initial: name of the same network before any stage.
        label: what probes predict; None if no label was asked for.
        k: neighbours of kNN.
        bank: images that probes learn from.
        query_ids: held-out samples that they are judged on.
        encoders: name -> how good each encoder is: raw pixels, teachers, networks before and after.
        versus: probe -> the student against `pixels` and against `init`; empty without labels.
        agreement: stage -> how near its student came to its teachers; of stages with the same
            teachers the last.
    """

    step: int
    student: str
    initial: str
    label: str | None
    k: int
    bank: int
    query_ids: list[str]
    encoders: dict[str, Judged]
    versus: dict[Probe, dict[str, Versus]]
    agreement: dict[str, Agreement]


def evaluate(students: Sequence[FrozenStudent]) -> Evaluation:
    """Evaluate the newest checkpoints of some stages, every encoder in one table.

    The bank is train sets (`Recipe.bank`) and the queries the held-out set, each image in its
    centre view.

    Args:
        students: of the stages, in their order; the recipe's `evaluation` says how they are judged.

    Raises:
        BadInput: images without the label, or a checkpoint of another network.
        StoreError: a cache cannot be read.
    """
    last = students[-1]
    recipe, device = last.recipe, last.device
    k, label = recipe.evaluation.k, recipe.evaluation.label
    shown = show(students)
    found = judge(shown.encoders, _classes(last, shown), k, shown.teachers, device)
    student, initial = final_name(recipe, last.stage), initial_name(last.stage)
    return Evaluation(
        step=last.saved.step,
        student=student,
        initial=initial,
        label=label,
        k=k,
        bank=sum(map(len, shown.bank_ids.values())),
        query_ids=shown.query_ids,
        encoders=found,
        versus=_versus(found, student, {PIXELS: PIXELS, INITIAL: initial}),
        agreement={each.stage.name: agree(each, shown) for each in by_teachers(students)},
    )


def agree(student: FrozenStudent, shown: Shown) -> Agreement:
    """Compare a stage's student, before and after, with its teachers and with the best constant.

    Args:
        student: of the stage.
        shown: the images that everything was shown.

    Raises:
        BadInput: a checkpoint of another network.
        StoreError: a cache cannot be read.
    """
    recipe, images, device = student.recipe, student.images, student.device
    at, held_out = evaluation_resolutions(recipe, student.stage), recipe.held_out.name
    constants = Constants(student.final.encoder.grid(recipe.evaluation.resolution))
    for name, ids in shown.bank_ids.items():
        kept = images.with_tokens(name, ids, at.teachers)
        rows = np.asarray(images.feeds[name].source.samples.rows_of(spread(kept)))
        for targets in images.tokens(name, rows, at.teachers, device):
            constants.add(
                {who: Features(each.summary, each.patches) for who, each in targets.items()}
            )
    rows = images.rows(held_out)
    with track(len(rows), f"Agreement of {student.stage.name}") as progress:
        seen = look(
            images.batches(held_out, rows, at),
            {INITIAL: student.initial, FINAL: student.final},
            judge=constants,
            device=device,
            advance=progress.advance,
        )
    cosines = {pair: found.double().numpy() for pair, found in seen.cosines.items()}
    per_teacher = {
        teacher: {
            kind: _cosine([cosines[who, teacher][:, column] for who in (BASELINE, INITIAL, FINAL)])
            for column, kind in enumerate(Features._fields)
        }
        for teacher in student.stage.teachers
    }
    mean = [
        np.mean([cosines[who, teacher] for teacher in student.stage.teachers], axis=0)
        for who in (BASELINE, INITIAL, FINAL)
    ]
    summary, patches = (_cosine([each[:, column] for each in mean]) for column in (0, 1))
    return Agreement(summary, patches, per_teacher)


def spread(sample_ids: Sequence[str]) -> list[str]:
    """Return BANK_PATCHES of some samples, spread evenly; all where there are no more."""
    count = min(len(sample_ids), BANK_PATCHES)
    return [sample_ids[each * len(sample_ids) // count] for each in range(count)]


def device(recipe: Recipe) -> str:
    """Return where this process evaluates: it may run on a node without the workers' GPUs."""
    if not recipe.workers.use_gpu:
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    print("workers.use_gpu, and this node has no GPU: evaluating on its CPUs", file=sys.stderr)
    return "cpu"


def described(judged: Judged) -> dict[str, Any]:
    """Return an encoder's figures as plain data: one key a probe, its interval below."""
    probes: dict[str, dict[str, Any]] = {
        probe: asdict(interval) for probe, interval in judged.probes.items()
    }
    if "linear" in probes:
        probes["linear"] |= {
            "regularisation": judged.regularisation,
            "converged": judged.converged,
        }
    return {
        "resolution": judged.resolution,
        **probes,
        "neighbours": {name: asdict(each) for name, each in judged.neighbours.items()},
        "cka": judged.cka,
    }


def plain(recipe: Recipe, evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as plain data: the contents of evaluation.json, a part of summary.json.

    Args:
        recipe: the run.
        evaluation: of stages of it.
    """
    *_, last = evaluation.agreement.values()
    return {
        "step": evaluation.step,
        "seed": recipe.seed,
        "label": evaluation.label,
        "k": evaluation.k,
        "bank": evaluation.bank,
        "queries": len(evaluation.query_ids),
        "student": {"initial": evaluation.initial, "final": evaluation.student},
        "titles": {name: title(recipe, name) for name in evaluation.encoders},
        "encoders": {name: described(each) for name, each in evaluation.encoders.items()},
        "versus": {
            probe: {other: asdict(each) for other, each in of.items()}
            for probe, of in evaluation.versus.items()
        },
        "knn_top1": _knn_top1(recipe, evaluation),
        "cosine": {"summary": asdict(last.summary), "patches": asdict(last.patches)},
        "agreement": {
            stage: {
                teacher: {kind: asdict(cosine) for kind, cosine in kinds.items()}
                for teacher, kinds in agreement.per_teacher.items()
            }
            for stage, agreement in evaluation.agreement.items()
        },
    }


def _knn_top1(recipe: Recipe, evaluation: Evaluation) -> dict[str, Any] | None:
    """Return the paper's kNN of what a run is run for, in short; None without labels."""
    if evaluation.label is None:
        return None
    top1 = {name: each.probes["knn_paper"].value for name, each in evaluation.encoders.items()}
    against = evaluation.versus["knn_paper"]
    taught = dict.fromkeys(name for stage in recipe.stages.values() for name in stage.teachers)
    return {
        "pixels": top1[PIXELS],
        "teacher": {name: top1[name] for name in taught if name in top1},
        "student_init": top1[evaluation.initial],
        "student_final": top1[evaluation.student],
        "queries": len(evaluation.query_ids),
        "p_value": against[INITIAL].p_value,
        "p_value_pixels": against[PIXELS].p_value,
        "label": evaluation.label,
        "k": evaluation.k,
    }


def write(recipe: Recipe, evaluation: Evaluation, stage: StageConfig | None = None) -> Path:
    """Write an evaluation into the run directory, each file whole; return its JSON.

    evaluation.json, and correct.parquet: on which held-out image each probe of each encoder is
    right, from which runs over several seeds are compared image by image.

    Args:
        recipe: the run.
        evaluation: of stages of it.
        stage: the one that was judged alone, which has files of its own; None: what a run is for.

    Raises:
        StoreError: it cannot be written.
    """
    own, scratch = (
        "" if stage is None else f"-{stage.name}",
        layout.scratch_directory(recipe.directory),
    )
    path = _own(recipe.directory / EVALUATION_FILE, own)
    text = json.dumps(plain(recipe, evaluation), indent=2) + "\n"
    copies.write(_own(recipe.directory / CORRECT_FILE, own), _correct(evaluation), scratch)
    copies.write(path, text.encode(), scratch)
    return copies.named(path)


def _own(path: Path, suffix: str) -> Path:
    return path.with_stem(path.stem + suffix)


def _correct(evaluation: Evaluation) -> bytes:
    """Return a Parquet file of encoder, probe, sample_id and correct, one row each."""
    count = len(evaluation.query_ids)
    parts = [
        pl.DataFrame(
            {
                "encoder": pl.repeat(name, count, eager=True),
                "probe": pl.repeat(probe, count, eager=True),
                "sample_id": evaluation.query_ids,
                "correct": judged.correct[probe],
            }
        )
        for name, judged in evaluation.encoders.items()
        for probe in PROBES
        if probe in judged.correct
    ]
    schema = {
        "encoder": pl.String,
        "probe": pl.String,
        "sample_id": pl.String,
        "correct": pl.Boolean,
    }
    out = io.BytesIO()
    (pl.concat(parts) if parts else pl.DataFrame(schema=schema)).write_parquet(out)
    return out.getvalue()


def _classes(student: FrozenStudent, shown: Shown) -> Classes | None:
    """Return the classes of the images that were shown; None if no label is asked for."""
    recipe, label = student.recipe, student.recipe.evaluation.label
    if label is None:
        return None
    bank = chain.from_iterable(
        labels(student.images, name, ids, label) for name, ids in shown.bank_ids.items()
    )
    queries = labels(student.images, recipe.held_out.name, shown.query_ids, label)
    return Classes(*numbered(list(bank), queries))


def _versus(
    encoders: Mapping[str, Judged], student: str, others: Mapping[str, str]
) -> dict[Probe, dict[str, Versus]]:
    """Compare a student with other encoders by every probe, image by image."""
    return {
        probe: {
            short: versus(right[None], encoders[other].correct[probe][None])
            for short, other in others.items()
        }
        for probe, right in encoders[student].correct.items()
    }


def versus(ours: np.ndarray, theirs: np.ndarray) -> Versus:
    """Compare where two encoders are right, bool [runs, q] each, of the same images."""
    ahead = ours.astype(np.float64) - theirs
    return Versus(runs_interval(ahead), paired_test(ours, theirs))


def _cosine(each: Sequence[np.ndarray]) -> Cosine:
    """Return the means of baseline, initial and final cosines of each image, [q] each."""
    baseline, initial, final = each
    mean = mean_interval(final)
    return Cosine(float(baseline.mean()), float(initial.mean()), mean.value, mean.low, mean.high)
