"""Indexing: the images of a source become samples of a dataset, a large part at a time."""

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import polars as pl

from cache.errors import NotBuilt
from cache.files import atomic
from cache.format import layout
from cache.samples import Samples
from eupe.errors import BadInput
from eupe.spec import DatasetSpec
from pipelines.images import index
from pipelines.recipe.stores import CacheJob, rows_per_shard

REASONS_SHOWN = 10
PART_ROWS = 100_000
"""Samples at least that are indexed before they are added to the dataset: what a kill can cost."""
GROWTH = 8
"""A part is at least this share of what is there: adding to a table reads it."""


@dataclass(frozen=True)
class Indexed:
    """What indexing a dataset found.

    Attributes:
        dataset: its name.
        num_samples: samples it has now.
        num_new: of them, added by this call.
        failures: images left out, with their reasons (`images.FAILURE_SCHEMA`).
    """

    dataset: str
    num_samples: int
    num_new: int
    failures: pl.DataFrame


def index_samples(job: CacheJob) -> Indexed:
    """Add the images that the dataset's sample table does not have yet, part by part.

    Killed, it goes on after the parts that are there. Files that are no image are left out and
    listed in `<root>/<dataset>/failures.jsonl`.

    Raises:
        BadInput: nothing there, or more unreadable images than max_failure_share.
        StoreError: the dataset is there with another key rule or rows_per_shard.
    """
    dataset, samples = DatasetSpec(name=job.dataset.name), _samples(job)
    known = frozenset() if samples is None else frozenset(samples.arrow["sample_id"].to_pylist())
    per_shard = job.extraction.rows_per_shard or (samples and samples.rows_per_shard)
    per_shard = per_shard or rows_per_shard(job)
    parts = index.index(
        job.dataset.source, known, job.extraction.decode_threads, partial(part_rows, per_shard)
    )
    num_seen, failures = 0, pl.DataFrame(schema=index.FAILURE_SCHEMA)
    records: pl.DataFrame | None = None  # of the part before
    try:
        with closing(parts):
            for part in parts:
                if records is not None:
                    samples = Samples.append(job.root, dataset, records, per_shard)
                records, failures = part.records, failures.vstack(part.failures)
                num_seen += len(part)
        _list_failures(job, failures)
        reasons = failures.select(pl.format("{}: {}", "sample_id", "reason")).to_series()
        check_share(job, len(failures), num_seen, reasons.to_list())
    except ValueError:
        if samples is not None and len(samples) > len(known):
            print(
                f"{len(samples) - len(known)} images before the fault are samples of "
                f"{dataset.name!r} now, for good; if they shall not be, take another dataset name",
                file=sys.stderr,
            )
        raise
    assert records is not None  # a last part always comes
    samples = Samples.append(job.root, dataset, records, per_shard)
    return Indexed(dataset.name, len(samples), len(samples) - len(known), failures)


def part_rows(per_shard: int, num_there: int) -> int:
    """Return how many samples the next part has.

    It follows from how many there are, so that what was killed goes on with the same parts; and
    fills whole shards, so that no gap lies between two.
    """
    return max(max(PART_ROWS, num_there // GROWTH) // per_shard, 1) * per_shard


def _samples(job: CacheJob) -> Samples | None:
    try:
        return Samples.open(job.root, job.dataset.name)
    except NotBuilt:
        return None


def check_share(job: CacheJob, failed: int, total: int, reasons: Sequence[str]) -> None:
    """Refuse more unusable images or features than a job allows.

    Args:
        job: its dataset, and max_failure_share.
        failed: how many are unusable.
        total: of how many.
        reasons: of the first of them, to be named.

    Raises:
        BadInput: they are more than max_failure_share.
    """
    share = job.extraction.max_failure_share
    if failed > share * total:
        raise BadInput(
            f"{job.dataset.name}: {failed} of {total} images or features are unusable, more than "
            f"max_failure_share = {share:g} allows ({'; '.join(reasons[:REASONS_SHOWN])}); take "
            "them out, give mended ones new names, or raise extraction.max_failure_share"
        )


def _list_failures(job: CacheJob, failures: pl.DataFrame) -> None:
    """Keep the list of images left out beside the samples; it is news, not identity."""
    directory = layout.samples_directory(layout.cache_root(job.root), job.dataset.name)
    path = directory.parent / "failures.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in failures.iter_rows(named=True)]
    content = "".join(f"{line}\n" for line in lines).encode()
    if content != (path.read_bytes() if path.exists() else b""):
        atomic.write(path, [content], layout.scratch_directory(directory))
