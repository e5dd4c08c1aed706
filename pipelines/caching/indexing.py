"""Indexing: the images of a source become samples of a dataset, ordered by hash."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa

from cache.errors import NotBuilt
from cache.files import atomic, place
from cache.format import layout
from cache.format.sample_table import GIVEN, SOURCES
from cache.sample_changes import Compared, compare
from cache.samples import SEGMENT_ROWS, Samples
from eupe.errors import BadInput
from eupe.spec import DatasetSpec
from pipelines.caching.listing import Listing
from pipelines.images import index
from pipelines.images.aside import Aside
from pipelines.images.looker import Failure, Looker
from pipelines.machines.pool import Pool, Workers
from pipelines.recipe.stores import CacheJob, rows_per_shard

REASONS_SHOWN = 10
FAILURE_SCHEMA: dict[str, type[pl.DataType]] = {
    "sample_id": pl.String,
    "uri": pl.String,
    "offset": pl.Int64,
    "reason": pl.String,
}


@dataclass(frozen=True)
class Indexed:
    """What indexing a dataset found.

    Attributes:
        dataset: its name.
        num_samples: samples it has now.
        num_new: of them, added by this call.
        failures: images left out, with their reasons (FAILURE_SCHEMA).
    """

    dataset: str
    num_samples: int
    num_new: int
    failures: pl.DataFrame


def lookers(job: CacheJob) -> Pool:
    """Return the actors that help to index, to be used as a context: on as many CPUs as extract.

    They start once indexing has taken a while, and want CPUs of Ray that nobody holds.
    """
    extraction = job.extraction
    arguments = {"config": job.dataset.source, "threads": extraction.decode_threads}
    return Pool(Looker, arguments, extraction.actors * extraction.compute_threads, cpus=1)


def index_samples(job: CacheJob, workers: Workers | None = None) -> Indexed:
    """Add the images that the dataset's sample table does not have yet, ordered by hash.

    Pieces of the source that were looked at before are not opened. Images that are there keep
    their rows, wherever they lie now. Killed, it goes on after the parts that are listed. Files
    that are no image, and images under the id of another one, are left out and listed in
    `<root>/<dataset>/failures.jsonl`.

    Args:
        job: whose dataset.
        workers: `lookers` that help; the samples and their order do not depend on them.

    Raises:
        BadInput: nothing there, two images of one id, or more left out than max_failure_share.
        StoreError: the dataset is there with another key rule or rows_per_shard.
    """
    dataset, samples = DatasetSpec(name=job.dataset.name), _samples(job)
    num_before = 0 if samples is None else len(samples)
    source, aside = job.dataset.source, Aside()
    found = index.pieces(source, aside)
    known = SOURCES.empty_table() if samples is None else samples.sources()
    keys = known.select(["uri", "bytes", "stamp"]).to_pydict().values()
    row_of = {key: row for row, key in enumerate(zip(*keys, strict=True))}
    looked_at = [row_of.get((piece.uri, piece.bytes, piece.stamp), -1) for piece in found]
    wanted = [piece for piece, row in zip(found, looked_at, strict=True) if row < 0]
    directory = layout.samples_directory(layout.cache_root(job.root), dataset.name)
    may_write = place.may_write(directory)
    scratch = layout.scratch_directory(directory)
    listing = Listing(scratch / "listing", dataset.name, wanted, may_write)
    num_others = len(found) - len(listing.missing)
    threads = job.extraction.decode_threads
    for part in index.look(source, listing.missing, threads, num_others, aside, workers):
        listing.add(part)
        del part  # before the next one is made
    for line in aside.lines() if wanted else ():
        print(f"{dataset.name}: {line}", file=sys.stderr)
    unchanged = known.take(pa.array([row for row in looked_at if row >= 0], pa.int64()))
    sources = pa.concat_tables([unchanged, listing.sources()]).sort_by("uri").combine_chunks()
    num_new, changed = 0, list[Failure]()
    for table in listing.in_order:
        compared = _compared(samples, table)
        num_new, changed = num_new + compared.new.num_rows, changed + compared.changed
    sources = index.with_failures(sources, changed)
    failures = pl.DataFrame(index.failures(sources), FAILURE_SCHEMA, orient="row")
    if may_write:
        _list_failures(job, failures)
    reasons = failures.select(pl.format("{}: {}", "sample_id", "reason")).to_series()
    total = num_before + num_new + len(failures)
    check_share(job, len(failures), total, reasons.to_list())
    per_shard = job.extraction.rows_per_shard or (samples and samples.rows_per_shard)
    per_shard = per_shard or rows_per_shard(job)
    last = GIVEN.empty_table()
    for table in _segments(samples, listing, max(SEGMENT_ROWS // per_shard, 1) * per_shard):
        if last.num_rows:
            Samples.append(job.root, dataset, last, per_shard)
        last = table
    if samples is not None and not last.num_rows and not may_write:
        return Indexed(dataset.name, num_before, 0, failures)  # and what was looked at is forgotten
    grown = Samples.append(job.root, dataset, last, per_shard, sources)
    listing.remove()
    return Indexed(dataset.name, len(grown), len(grown) - num_before, failures)


def _segments(samples: Samples | None, listing: Listing, rows: int) -> Iterator[pa.Table]:
    """Yield what is new or lies elsewhere, so many new samples at a time: whole segments."""
    waiting = GIVEN.empty_table()
    for table in listing.in_order:
        new, moved, *_ = _compared(samples, table)
        waiting = pa.concat_tables([waiting, new])
        if moved.num_rows:
            yield moved
        while waiting.num_rows >= rows:
            yield waiting.slice(0, rows)
            waiting = waiting.slice(rows)
    if waiting.num_rows:
        yield waiting


def _compared(samples: Samples | None, table: pa.Table) -> Compared:
    """Tell new samples from those that are there; all are, where there is no table yet."""
    if samples is None:
        return Compared(table, table.slice(0, 0), np.empty(0, np.int64), [])
    return compare(samples, table)


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
