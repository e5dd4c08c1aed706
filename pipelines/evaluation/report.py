"""The report of a run: summary.json for machines, report.html and a closing table for people."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.files import atomic, copies
from cache.format import layout
from cache.store import Store
from eupe import fingerprint as fp
from pipelines.evaluation import evaluate, figures, pages, tables
from pipelines.evaluation.evaluate import Cosine, Evaluation
from pipelines.evaluation.figures import TokenPicture
from pipelines.evaluation.frozen import FrozenStudent
from pipelines.evaluation.pyramid import StageFigures, stage_figures
from pipelines.recipe.config import Recipe
from pipelines.recipe.stores import Opened, job_groups, open_stores
from pipelines.records import checkpoint, tracking
from pipelines.training import outputs

SUMMARY_FILE, REPORT_FILE = "summary.json", "report.html"
TEMPLATE = "evaluation/report.html.j2"
SIGNIFICANT = 0.05
FORMAT = 3
"""Of a summary: raised with a change of what stands in it."""


@dataclass(frozen=True)
class Caches:
    """What a recipe's caches hold.

    Attributes:
        images: samples of the train and held-out sets.
        rows: cached rows, each (sample, view) of each teacher and resolution counted.
        bytes: of their committed files.
    """

    images: int
    rows: int
    bytes: int


def caches(recipe: Recipe, opened: Opened | None = None) -> Caches:
    """Count what a recipe's caches hold.

    Args:
        recipe: the run.
        opened: stores that are open already; those opened here are added.

    Raises:
        BadInput: weights that cannot be read.
        StoreError: a store is absent or half built.
    """
    images: dict[str, int] = {}
    rows = num_bytes = 0
    for store in stores(recipe, opened):
        images[store.spec.dataset.name] = len(store.samples)
        total = store.manifest().total()
        rows += total.num_rows
        num_bytes += total.num_bytes
    return Caches(sum(images.values()), rows, num_bytes)


def fingerprint(recipe: Recipe, opened: Opened | None = None) -> str:
    """Hash what a run's figures depend on: the recipe, its newest checkpoints and its stores.

    Args:
        recipe: the run.
        opened: stores that are open already; those opened here are added.

    Raises:
        BadInput: a stage without a checkpoint, or weights that cannot be read.
        StoreError: a store is absent or half built.
    """
    saved = [
        checkpoint.require(recipe.stage_directory(stage.name)) for stage in recipe.stages.values()
    ]
    return fp.fingerprint(
        {
            "format": FORMAT,
            "recipe": recipe.model_dump(mode="json"),
            "weights": [each.weights_digest() for each in saved],
            "stores": {
                str(store.spec.directory()): store.manifest().version
                for store in stores(recipe, opened)
            },
        }
    )


def make(recipe: Recipe, seconds: Mapping[str, float]) -> dict[str, object]:
    """Judge a finished run, each of its stages, and write its report; return the summary.

    A report that is there already, of what the run is now, is left as it is.

    Args:
        recipe: the run.
        seconds: step of the run -> how long it took, as the caller measured; the evaluation's own
            is added.

    Raises:
        BadInput: a stage that is not trained to its end, images without the label, or weights
            that cannot be read.
        StoreError: a cache cannot be read.
    """
    outputs.bring(recipe.directory)
    for stage in recipe.stages.values():
        checkpoint.finished(recipe.stage_directory(stage.name), stage.steps)
    opened = Opened()
    found = current(recipe, opened)
    if found is not None:
        return found
    started, device = time.monotonic(), evaluate.device(recipe)
    students = [FrozenStudent(recipe, each, device, opened) for each in recipe.stages.values()]
    evaluation = evaluate.evaluate(students)
    stages: dict[str, StageFigures] = {}
    for student in students:
        stages[student.stage.name] = stage_figures(student)
    took = {**seconds, "evaluation": time.monotonic() - started}
    return write(students, evaluation, took, stages)


def current(recipe: Recipe, opened: Opened | None = None) -> dict[str, object] | None:
    """Return the summary that is there, if nothing it depends on has changed since.

    Args:
        recipe: the run.
        opened: stores that are open already; those opened here are added.

    Raises:
        BadInput: as `fingerprint`.
        StoreError: as `fingerprint`.
    """
    files = [recipe.directory / name for name in (SUMMARY_FILE, REPORT_FILE)]
    if not all(path.is_file() for path in files):
        return None
    summary = read(recipe)
    return summary if summary.get("fingerprint") == fingerprint(recipe, opened) else None


def read(recipe: Recipe) -> dict[str, object]:
    """Return the summary that is in the run directory, as `write` left it."""
    text = (recipe.directory / SUMMARY_FILE).read_text(encoding="utf-8")
    found: dict[str, object] = json.loads(text)
    return found


def stores(recipe: Recipe, opened: Opened | None = None) -> list[Store]:
    """Open all stores of a recipe; arguments and errors as `caches`."""
    opened = opened or Opened()
    jobs = (job for group in job_groups(recipe) for job in group)
    return [store for job in jobs for store in open_stores(job, opened=opened)]


def summarise(
    recipe: Recipe,
    held: Caches,
    evaluation: Evaluation,
    seconds: Mapping[str, float],
    stages: Mapping[str, StageFigures],
) -> dict[str, object]:
    """Return the figures of a run as plain data: the contents of summary.json.

    Args:
        recipe: the run.
        held: what its caches hold.
        evaluation: of its stages.
        seconds: step of the run -> how long it took, as its caller measured.
        stages: stage -> what it did.
    """
    return {
        "recipe": recipe.name,
        "images": held.images,
        "rows": held.rows,
        "cache_bytes": held.bytes,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "training_steps": evaluation.step,
        **evaluate.plain(recipe, evaluation),
        **{name: asdict(found) for name, found in stages.items()},
    }


def write(
    students: Sequence[FrozenStudent],
    evaluation: Evaluation,
    seconds: Mapping[str, float],
    stages: Mapping[str, StageFigures],
) -> dict[str, object]:
    """Write summary.json and report.html into the run directory; return the summary.

    Args:
        students: of the run's stages, in their order.
        evaluation: of them.
        seconds: step of the run -> how long it took, as its caller measured.
        stages: stage -> what it did.

    Raises:
        BadInput: weights that cannot be read.
        StoreError: a cache cannot be read, or a file not written.
    """
    last = students[-1]
    recipe, stage, opened = last.recipe, last.stage, last.opened
    summary = summarise(recipe, caches(recipe, opened), evaluation, seconds, stages)
    summary["fingerprint"] = fingerprint(recipe, opened)
    lines = tracking.read(recipe.stage_directory(stage.name) / tracking.METRICS_FILE)
    page = render(
        recipe,
        summary,
        evaluation,
        figures.loss_curves(lines, stage.teachers),
        figures.dot_plot(summary),
        figures.token_picture(students),
    )
    atomic.sweep(layout.scratch_directory(recipe.directory))  # of killed reports
    evaluate.write(recipe, evaluation)
    _replace(recipe.directory / REPORT_FILE, page)
    # Last: its fingerprint says that all of it is there.
    _replace(recipe.directory / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def render(
    recipe: Recipe,
    summary: Mapping[str, object],
    evaluation: Evaluation,
    curves: str,
    dots: str,
    picture: TokenPicture,
) -> str:
    """Return the report as one HTML page that loads nothing from anywhere.

    Args:
        recipe: the run; printed in full at the end.
        summary: as `summarise` returns it.
        evaluation: of its stages.
        curves: an <svg> element: losses.
        dots: an <svg> element: every encoder by every probe; empty without labels.
        picture: patch tokens as colours.
    """
    last = evaluation.agreement[recipe.last.name]
    return pages.page(
        TEMPLATE,
        recipe=recipe,
        summary=summary,
        evaluation=evaluation,
        kinds={"summary": last.summary, "patches": last.patches},
        bar=_bar,
        probes=tables.PROBE_TITLES,
        encoder_rows=tables.encoder_rows(summary),
        verdicts=tables.verdicts(summary),
        significant=SIGNIFICANT,
        curves=curves,
        dots=dots,
        picture=picture,
        configuration=json.dumps(recipe.model_dump(mode="json"), indent=2),
    )


def _bar(cosine: Cosine) -> dict[str, float]:
    """Return where a cosine's three marks stand on a scale from 0 to 1, in per cent."""
    return {name: 100 * min(max(value, 0.0), 1.0) for name, value in asdict(cosine).items()}


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    copies.write(path, text.encode(), layout.scratch_directory(path.parent))
