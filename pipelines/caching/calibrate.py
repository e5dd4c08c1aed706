"""Rates as this machine has them, by short runs: `eupe plan --measure` takes these."""

import io
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import polars as pl
from PIL import Image

from cache.errors import NotBuilt
from cache.samples import Samples
from eupe import views
from eupe.views import ImageError
from pipelines.caching import indexing, precompute
from pipelines.caching.plan import Pass
from pipelines.caching.sizes import SIDES
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.machines.pool import IN_FLIGHT, Workers
from pipelines.recipe.config import Recipe, SourceConfig
from pipelines.recipe.stores import CacheJob

SECONDS = 3.0
"""Of measuring how fast pictures are decoded."""
BATCHES = 2 * IN_FLIGHT
"""Compute batches that each actor is timed on: some of them while others are under way."""


def rates(recipe: Recipe) -> dict[str, float]:
    """Measure how many views a second one core of this machine decodes, draws and resizes."""
    data = _made_up()
    wanted = {side for teacher in recipe.teachers.values() for side in teacher.resolutions}
    durations = list[float]()
    until = time.perf_counter() + SECONDS
    while len(durations) < 5 or time.perf_counter() < until:
        started = time.perf_counter()
        canvas = views.make_view(data, recipe.views, str(len(durations)), 0).canvas
        for side in wanted:
            views.resize(canvas, side)
        durations.append(time.perf_counter() - started)
    return {"decode_views": 1 / float(np.median(durations))}


def build_seconds(passes: Iterable[Pass]) -> float:
    """Tell how long a build takes on the Ray at hand, from a short one of each pass.

    The short one is a build like any other, by the same actors, of some of the set's own pictures
    where it is indexed, and of made-up ones where it is not; it lies in a temporary folder. A
    proxy that is not trained has random weights, which take as long.

    Args:
        passes: of a plan.

    Raises:
        BadInput: as for a build: weights that cannot be read, or no room for an actor.
    """
    found = 0.0
    with TemporaryDirectory(prefix="eupe-measure-") as folder:
        for number, group in enumerate(_grouped(passes)):
            with precompute.extractors(group[0].job) as pool:
                for within, each in enumerate(group):
                    place = Path(folder) / f"{number}-{within}"
                    found += _one(each, place, pool, first=within == 0)
    return found


def _grouped(passes: Iterable[Pass]) -> Iterator[list[Pass]]:
    """Put passes of the same teachers together: their actors are started once."""
    groups = dict[str, list[Pass]]()
    for each in passes:
        teachers = "".join(teacher.model_dump_json() for teacher in each.job.teachers)
        groups.setdefault(teachers, []).append(each)
    yield from groups.values()


def _one(planned: Pass, folder: Path, pool: Workers, first: bool) -> float:
    """Time some pictures of a pass; return the seconds that all of it takes."""
    extraction = planned.job.extraction
    batch = extraction.compute_batch
    at_once = extraction.actors * batch
    few = {"rows_per_shard": batch, "moments_samples": max(2, at_once), "everything": True}
    job = planned.job.model_copy(
        update={
            "dataset": planned.job.dataset.model_copy(
                update={"source": _some(planned.job, folder, BATCHES * at_once), "num_views": None}
            ),
            "num_views": 1,
            "root": str(folder / "caches"),
            "extraction": extraction.model_copy(update=few),
            "drawing": None,
        }
    )
    indexing.index_samples(job)
    started = time.monotonic()
    stores = precompute.resolve_stores(job, pool)
    starting = time.monotonic() - started if first else 0.0
    done = precompute.extract_missing(job, stores, pool)
    measured = min(extraction.moments_samples, planned.images)
    return starting + (planned.images + measured) * done.seconds / done.num_images


def _some(job: CacheJob, folder: Path, count: int) -> SourceConfig:
    """Lay out so many pictures like the job's: its own, spread evenly, or made-up ones."""
    pictures = _own(job, count) or [_made_up()]
    folder.mkdir(parents=True)
    repeated = [pictures[number % len(pictures)] for number in range(count)]
    names = [str(number) for number in range(count)]
    pl.DataFrame({"name": names, "image": repeated}).write_parquet(folder / "images.parquet")
    return SourceConfig(kind="parquet", path=str(folder / "images.parquet"), key_column="name")


def _own(job: CacheJob, count: int) -> list[bytes]:
    """Read some of a set's pictures; none where it is not indexed here."""
    try:
        samples = Samples.open(job.root, job.dataset.name)
    except NotBuilt:
        return []
    reader, found = ImageReader(base(job.dataset.source)), []
    chosen = np.unique(np.linspace(0, len(samples) - 1, count).astype(np.int64))
    for sample in samples.at(chosen).iter_rows(named=True):
        try:
            found.append(reader.read(sample))
        except ImageError:  # lost or taken out: a build counts it, here another does
            continue
    return found


def _made_up() -> bytes:
    """Return a JPEG of ImageNet's usual size: smooth, as photographs are."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 255, (15, 20, 3), np.uint8))
    data = io.BytesIO()
    coarse.resize(SIDES, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()
