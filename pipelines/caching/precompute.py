"""Precomputing: the steps from images to feature stores, and `build`, which calls them in a row.

    indexing.index_samples -> resolve_stores -> extract_missing -> verify_stores

Each step looks at what is there and does what is missing: it may be killed and called again.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain

import numpy as np
import polars as pl

from cache import verified
from cache.codec.known import kind, make_codec, name_of, source_of
from cache.errors import Corrupt, FingerprintMismatch, NotBuilt
from cache.files import atomic
from cache.format import arrow_tables, layout
from cache.format.record_table import ShardRecord
from cache.samples import DROPPED_REASON
from cache.shard_ranges import Rows
from cache.store import Store, create_store, open_store
from cache.verify import Report, num_new, verify
from eupe.errors import BadInput
from eupe.preprocessing import normalisation
from eupe.spec import StoreSpec
from pipelines.caching import quality
from pipelines.caching.extractor import Extractor, provenance
from pipelines.caching.indexing import (
    REASONS_SHOWN,
    Indexed,
    check_share,
    index_samples,
    lookers,
)
from pipelines.caching.measure import measure
from pipelines.caching.tasks import Tasks
from pipelines.images.index import check_there
from pipelines.images.walks import base
from pipelines.machines import once
from pipelines.machines.pool import Pool, Workers
from pipelines.machines.progress import track
from pipelines.recipe.stores import CacheJob, store_specs

PIXEL_STEP = 1 / 255


def extractors(job: CacheJob) -> Pool:
    """Return the actors that do a job's work, to be used as a context.

    They start with the first work there is, and serve every job of the same teachers: hand the
    pool to `resolve_stores` and `extract_missing`.
    """
    extraction = job.extraction
    arguments = {
        "teachers": job.teachers,
        "decode_threads": extraction.decode_threads,
        "device": extraction.device,
        "compute_threads": extraction.compute_threads,
    }
    return Pool(
        Extractor,
        arguments,
        extraction.actors,
        extraction.cpus_per_actor,
        extraction.gpus_per_actor,
    )


def resolve_stores(job: CacheJob, pool: Workers | None = None) -> list[Store]:
    """Open a job's stores; those that are not there yet are created with measured moments.

    Moments are measured on samples spread evenly over the dataset, in view 0, and merged in a
    fixed order: once per store, before its first shard, never changed afterwards.

    Args:
        job: whose stores.
        pool: of `extractors`; None: one for this call.

    Raises:
        BadInput: weights that cannot be read, a teacher without a single finite feature, or one
            whose features a lossy codec keeps worse than it documents.
        StoreError: the dataset is not indexed, or a store of another spec is in the way.
    """
    specs = store_specs(job)
    there = [_open(job, spec) for spec in specs]
    absent = [spec for spec, store in zip(specs, there, strict=True) if store is None]
    _check_built(absent)
    if absent:
        _say_whose_pixels(job)
        batch = job.extraction.compute_batch
        made_by = provenance(batch, job.extraction.compute_threads)  # shards name the device
        with _borrowed(pool, job) as workers:
            samples = measure(job, absent, batch, workers)
        own = [samples[spec.teacher.name, spec.resolution] for spec in absent]
        kept = [quality.check(spec, sample) for spec, sample in zip(absent, own, strict=True)]
        for spec, sample, found in zip(absent, own, kept, strict=True):
            measured = {} if found is None else {"codec_quality": found.to_json_dict()}
            codec = None
            if kind(spec.codec.name).of_rows:
                codec = make_codec(spec.codec, sample.moments["patches"], spec.grid, sample.rows)
            create_store(job.root, spec, sample.moments, {**made_by, **measured}, codec)
    return [store or open_store(job.root, spec) for spec, store in zip(specs, there, strict=True)]


@dataclass(frozen=True)
class Extracted:
    """What an extraction did.

    Attributes:
        num_shards: shards computed, over all stores; 0 if everything was there.
        num_images: images computed on, each view counted.
        num_invalid: rows of the job's stores that are invalid, now.
        reasons: of the first of them, with their sample.
        seconds: wall time.
    """

    num_shards: int
    num_images: int
    num_invalid: int
    reasons: list[str]
    seconds: float


def extract_missing(
    job: CacheJob, stores: Sequence[Store], pool: Workers | None = None
) -> Extracted:
    """Compute the shards that the stores want and do not have, and commit them as they arrive.

    Args:
        job: whose views.
        stores: of `resolve_stores`.
        pool: of `extractors`; None: one for this call.

    Raises:
        BadInput: more invalid rows than max_failure_share, images out of reach, weights that are
            gone, or an actor that fits no node.
        StoreError: a file cannot be written or another process commits.
    """
    started = time.monotonic()
    for store in stores:
        atomic.sweep(layout.scratch_directory(store.directory))  # of killed builders
        store.mend_metadata()
    wanted = [job.wanted_of(store) for store in stores]
    turns = job.turns(stores[0].samples.shards())
    tasks = Tasks(stores, wanted, str(base(job.dataset.source)), turns)
    num_images = tasks.num_images
    num_shards = 0
    invalid = {id(store): _num_invalid(job, store) for store in stores}
    if tasks:
        with (
            _borrowed(pool, job) as workers,
            track(
                tasks.all_images, f"Extracting {job}", before=tasks.all_images - num_images
            ) as progress,
        ):
            for results in workers.run("extract", tasks):
                arrived: dict[int, list[ShardRecord]] = {id(store): [] for store in stores}
                num_done = 0
                for number, records in results:
                    _, of_shard, shard = tasks[number]
                    theirs = [store for of_view in of_shard.values() for store in of_view]
                    for store, record in zip(theirs, records, strict=True):
                        arrived[id(store)].append(record)
                    num_done += len(of_shard) * len(shard)
                touched = [store for store in stores if arrived[id(store)]]
                _commit(touched, [arrived[id(store)] for store in touched])
                for store in touched:
                    own = arrived[id(store)]
                    num_shards += len(own)
                    dropped = _num_dropped(store, np.array([record.shard for record in own]))
                    num_invalid = sum(record.num_invalid for record in own)
                    invalid[id(store)] += num_invalid - int(dropped.sum())
                progress.advance(num_done)
                _check_invalid(job, touched, [invalid[id(store)] for store in touched])
    counts = [_num_invalid(job, store) if tasks else invalid[id(store)] for store in stores]
    _check_invalid(job, stores, counts)
    named = [_reasons(store) for store, count in zip(stores, counts, strict=True) if count]
    reasons = list(dict.fromkeys(chain.from_iterable(named)))[:REASONS_SHOWN]
    return Extracted(num_shards, num_images, sum(counts), reasons, time.monotonic() - started)


def verify_stores(stores: Sequence[Store], deep: bool = True) -> list[Report]:
    """Check stores against their manifests.

    Args:
        stores: to check; of each, what was committed since it was verified last.
        deep: all of it, every byte.

    Raises:
        Corrupt: a store is not sound, with the first of its problems.
    """
    reports = []
    for store in stores:
        since = verified.NOTHING if deep else verified.version(store)
        total = num_new(store.manifest(), since)
        with track(total, f"Verifying {store.spec.directory()}", "shards") as progress:
            report = verify(store, deep, lambda done, all_of_them: progress.advance(), since)
        if report.problems:
            more = f", and {len(report.problems) - 1} more" if len(report.problems) > 1 else ""
            raise Corrupt(f"{report.problems[0]}{more}")
        verified.note(store, report.version)
        reports.append(report)
    return reports


@dataclass(frozen=True)
class Built:
    """What a build did.

    Attributes:
        indexed: one a dataset.
        extracted: job -> what was computed.
        stores: all stores, in the order of the jobs.
        seconds: wall time.
    """

    indexed: list[Indexed]
    extracted: dict[str, Extracted]
    stores: list[Store]
    seconds: float

    @property
    def num_shards(self) -> int:
        """Shards computed."""
        return sum(each.num_shards for each in self.extracted.values())

    def __str__(self) -> str:
        lines = [
            f"{each.dataset}: {each.num_samples} samples ({each.num_new} new), "
            f"{each.failures.height} left out"
            for each in self.indexed
        ]
        lines += [
            f"  left out {f['sample_id']}: {f['reason']}"
            for each in self.indexed
            for f in each.failures.iter_rows(named=True)
        ]
        for job, each in self.extracted.items():
            lines.append(
                f"{job}: {each.num_shards} shards computed, {each.num_invalid} invalid rows, "
                f"{each.seconds:.1f} s"
            )
            lines += [f"  invalid {reason}" for reason in each.reasons]
        return "\n".join([*lines, f"{self.num_shards} shards computed in {self.seconds:.1f} s"])


@dataclass(frozen=True)
class Steps:
    """The steps that `build` calls, in this order. Whoever orchestrates a build wraps them."""

    index_samples: Callable[[CacheJob, Workers], Indexed] = index_samples
    resolve_stores: Callable[[CacheJob, Workers], list[Store]] = resolve_stores
    extract_missing: Callable[[CacheJob, list[Store], Workers], Extracted] = extract_missing
    verify_stores: Callable[[list[Store], bool], list[Report]] = verify_stores


PLAIN = Steps()
"""Calls of plain functions."""


def build(
    groups: Sequence[Sequence[CacheJob]],
    deep: bool = False,
    steps: Steps = PLAIN,
    look_over: Callable[[], None] | None = None,
) -> Built:
    """Build or extend the stores of some jobs.

    Args:
        groups: jobs of the same teachers together, as `stores.job_groups` lists them: actors are
            started once a group, with the first work there is.
        deep: verify every byte at the end, not only sizes and indexes.
        steps: what to call for each step.
        look_over: called once all is indexed; what it refuses costs no teacher's work.

    Raises:
        BadInput: a source that is not there, before any is indexed; or see the steps.
        StoreError: a store that cannot be used or written, see the steps.
    """
    started = time.monotonic()
    for job in datasets(groups):
        check_there(job.dataset.source)
    indexed = []
    for job in datasets(groups):
        with lookers(job) as pool:
            indexed.append(steps.index_samples(job, pool))
    if look_over is not None:
        look_over()
    extracted: dict[str, Extracted] = {}
    stores: list[Store] = []
    for jobs in groups:
        with extractors(jobs[0]) as pool:
            # All of them first: a stage that waits for shards wants the moments of all its stores.
            resolved = [steps.resolve_stores(job, pool) for job in jobs]
            for job, own in zip(jobs, resolved, strict=True):
                extracted[str(job)] = steps.extract_missing(job, own, pool)
                stores += own
    steps.verify_stores(stores, deep)
    return Built(indexed, extracted, stores, time.monotonic() - started)


# ------------------------------------------------------------------------------ steps of the steps


def datasets(groups: Sequence[Sequence[CacheJob]]) -> list[CacheJob]:
    """Return the first job of each dataset, whose images are to be indexed.

    The expert teachers' come first: their patches set how many rows a shard has (law 4).
    """
    jobs = [job for group in groups for job in group]
    return list({job.dataset.name: job for job in reversed(jobs)}.values())[::-1]


def _borrowed(pool: Workers | None, job: CacheJob) -> AbstractContextManager[Workers]:
    """Use the caller's pool and leave it running, or one of our own."""
    return extractors(job) if pool is None else nullcontext(pool)


def _open(job: CacheJob, spec: StoreSpec) -> Store | None:
    """Open a store; None where there is none yet.

    A store of the same teacher name with other weights is no obstacle: it lies in its own folder.
    """
    try:
        return open_store(job.root, spec)
    except (NotBuilt, FingerprintMismatch):
        return None


def _check_built(absent: Sequence[StoreSpec]) -> None:
    """Refuse to build what is derived from another store."""
    for spec in absent:
        source = source_of(spec.codec)
        if source is not None:
            raise BadInput(
                f"teacher {spec.teacher.name} at {spec.resolution} px: codec "
                f"{name_of(spec.codec)!r} is not built but derived from a store of {source}, by "
                "`eupe cache derive`"
            )


def _say_whose_pixels(job: CacheJob) -> None:
    """Say which teachers get pixels otherwise than their weights' own record has it.

    Once a process: a build resolves the stores of several sets.
    """
    for teacher in job.teachers:
        asked = teacher.encoder.pixel_mean, teacher.encoder.pixel_std
        try:
            record = normalisation(teacher.encoder, teacher.weights)
        except BadInput:  # out of reach; the recipe names both
            continue
        if record is not None and not np.allclose(record, asked, atol=PIXEL_STEP):
            once.say(
                f"{teacher.name}: pixels get mean {asked[0]} and std {asked[1]}, as the recipe "
                f"says; published weights of {teacher.encoder.architecture} want {record[0]} and "
                f"{record[1]}"
            )


def _commit(stores: Sequence[Store], records: Sequence[Sequence[ShardRecord]]) -> None:
    """Commit what has arrived of each store, all stores at once."""
    with ThreadPoolExecutor(max(len(stores), 1), "commit") as committers:
        list(committers.map(Store.commit, stores, records))


def _num_invalid(job: CacheJob, store: Store) -> int:
    """Count the rows that a job wants and the manifest has as invalid, dropped ones left out."""
    count, wanted, shards = 0, job.wanted_of(store), store.samples.shards()
    for table in store.manifest().tables(views=range(job.num_views)):
        view, shard, start, stop, num_valid = (
            arrow_tables.to_numpy(table[name])
            for name in ("view", "shard", "start", "stop", "num_valid")
        )
        places = np.minimum(np.searchsorted(shards.numbers, shard), len(shards) - 1)
        own = wanted[view, places] & (shards.numbers[places] == shard)
        count += int((stop - start - num_valid - _num_dropped(store, shard))[own].sum())
    return count


def _num_dropped(store: Store, shards: Rows) -> Rows:
    """Count the samples of shards that were taken out, int64 [n]: they are no failure."""
    dropped = store.samples.dropped // store.samples.rows_per_shard
    found = np.searchsorted(dropped, shards, "right") - np.searchsorted(dropped, shards, "left")
    return np.asarray(found, np.int64)


def _check_invalid(job: CacheJob, stores: Sequence[Store], counts: Sequence[int]) -> None:
    """Refuse more invalid rows than their share of all rows that are wanted."""
    for store, count in zip(stores, counts, strict=True):
        wanted = int(job.wanted_of(store).sum(axis=0) @ store.samples.shards().lengths)
        if count > job.extraction.max_failure_share * wanted:
            check_share(job, count, wanted, _reasons(store))


def _reasons(store: Store) -> list[str]:
    """Return some reasons of invalid rows, with their sample."""
    reasons = []
    for record in store.manifest().records():
        if record.num_invalid:
            path = layout.rows_file(store.directory, record.view, record.shard)
            rows = pl.DataFrame(arrow_tables.map_table(path, record.rows_bytes, record.rows_sha256))
            failed = ~pl.col("valid") & (pl.col("reason") != DROPPED_REASON)
            invalid = rows.filter(failed).iter_rows(named=True)
            reasons += [f"{row['sample_id']}: {row['reason']}" for row in invalid]
        if len(reasons) >= REASONS_SHOWN:
            break
    return reasons
