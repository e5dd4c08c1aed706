"""Check a store against its manifest: sizes, checksums, indexes, ids, counts, the arrays' shape."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.errors import AGAIN, Corrupt, StoreError
from cache.files import place
from cache.format import arrow_tables, layout, rows_table, zarr_shard
from cache.format.record_table import ShardRecord, records_of
from cache.manifest import Manifest, Totals
from cache.samples import DROPPED_REASON, Samples, num_rows_now, segment_files
from cache.shard_ranges import Rows
from cache.store import FITTED, Store, open_store, store_directories, store_info
from cache.verified import NOTHING

READ_BYTES = 1 << 22
CHECKSUMS_BYTES = 1 << 25
"""Of a shard, so much lies between the first and the last of the checksums that are read at once:
a bucket sends what lies between them, too."""
LOOKED_AT = 256
"""Shards that are looked at before the next ones are."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and with which file."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass
class Report:
    """What was checked and what is wrong.

    Attributes:
        num_shards: shards in the manifest.
        num_rows: their rows.
        num_invalid: rows recorded as invalid (no problem, but counted).
        num_bytes: bytes read and compared with their checksums (0 for a shallow check).
        problems: empty if the store is sound.
        version: of the manifest.
    """

    num_shards: int = 0
    num_rows: int = 0
    num_invalid: int = 0
    num_bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    version: int = 0


Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all) after each shard."""


def unseen(*what: object) -> AbstractContextManager[Progress]:
    """Show no progress, of whatever it is."""
    return nullcontext(lambda done, total: None)


def verify_root(
    root: str | Path, deep: bool, progress: Callable[[Store], AbstractContextManager[Progress]]
) -> Iterator[tuple[str, Report]]:
    """Check all that a cache root holds, whatever of it is damaged.

    Args:
        root: the cache root.
        deep: as in `verify`.
        progress: store -> what shows how far its check is.

    Yields:
        what was checked, `<dataset>/samples` or a store's folder below the root, and its report;
        what cannot be opened at all is a problem of that report.

    Raises:
        NotBuilt: there is no such folder.
    """
    base = layout.cache_root(root)
    tables, stores = all_folders(base)
    for directory in tables:
        report = Report()
        try:
            samples = Samples.open(base, directory.parent.name)
            report.num_rows, report.num_invalid = len(samples), len(samples.dropped)
            pinned = segment_files(base, directory.parent.name)
            found = [_compare(*each, report) for each in pinned]
            report.problems += [problem for problem in found if problem is not None]
        except StoreError as error:
            report.problems.append(Problem(directory, str(error)))
        yield str(directory.relative_to(base)), report
    for directory in stores:
        name = str(directory.relative_to(base))
        try:
            store = open_store(base, store_info(directory).spec)
            with progress(store) as shown:
                yield name, verify(store, deep, shown)
        except StoreError as error:
            yield name, Report(problems=[Problem(directory, str(error))])


def all_folders(base: Path) -> tuple[list[Path], list[Path]]:
    """List the folders of sample tables and of stores below a root, also of those without a HEAD.

    A store whose HEAD is lost is known by its views: they are made after it.

    Raises:
        NotBuilt: there is no such folder.
    """
    stores = set(store_directories(base)) | {view.parent for view in base.glob("*/*/*/*/view-*")}
    tables = {head.parent for head in base.glob(f"*/{layout.SAMPLES}/{layout.HEAD}*")}
    tables |= {layout.samples_directory(base, store.relative_to(base).parts[0]) for store in stores}
    return sorted(tables), sorted(stores)


def verify(
    store: Store, deep: bool = True, progress: Progress | None = None, since: int = NOTHING
) -> Report:
    """Check committed shards.

    Args:
        store: the store.
        deep: also read every byte and compare checksums; else sizes, indexes and tables only.
        progress: called with (shards done, shards in all) after each shard.
        since: version of the manifest whose shards were verified before (`cache.verified`): only
            what was committed after it is looked at.

    Returns:
        The report; a damaged store is a finding, not an exception.
    """
    if since != NOTHING:
        manifest = store.manifest()
        if manifest.version < since:  # of a backup
            return verify(store, deep, progress)
        if manifest.version == since:
            return _counted(manifest, manifest.totals(), Report())
    manifest, report = _check_pinned(store, segments=since == NOTHING)
    store = Store(store.root, store.spec, manifest)  # with the samples of now, as its manifest is
    if report.problems:
        return report  # shards cannot be judged by tables that are damaged themselves
    totals = manifest.totals()
    _counted(manifest, totals, report)
    report.problems.extend(_check_metadata(store, {view: own.end for view, own in totals.items()}))
    num_shards = num_new(manifest, since)
    size_of = place.sizes_below(store.directory, 2 * num_shards, 2 * report.num_shards)

    def look(record: ShardRecord) -> Report:
        own = Report()
        own.problems.extend(check_shard(store, record, deep, own, size_of))
        return own

    done, records = 0, _records(manifest, since)
    with ThreadPoolExecutor(place.at_once(store.directory), "verify") as lookers:
        while some := list(islice(records, LOOKED_AT)):
            for own in lookers.map(look, some):
                report.num_bytes += own.num_bytes
                report.problems.extend(own.problems)
                done += 1
                if progress is not None:
                    progress(done, num_shards)
    return report


def num_new(manifest: Manifest, since: int) -> int:
    """Count the shards that were committed after a version of the manifest."""
    versions = (arrow_tables.to_numpy(table["version"]) for table in manifest.tables())
    return sum(int(np.count_nonzero(of_table > since)) for of_table in versions)


def _records(manifest: Manifest, since: int) -> Iterator[ShardRecord]:
    """Yield the records that were committed after a version, sorted by view and shard."""
    for table in manifest.tables():
        later = np.flatnonzero(arrow_tables.to_numpy(table["version"]) > since)
        yield from records_of(table.take(arrow_tables.from_numpy(later)))


def _counted(manifest: Manifest, totals: Mapping[int, Totals], report: Report) -> Report:
    """Say in a report what a manifest holds."""
    total = sum(totals.values(), Totals())
    report.version, report.num_shards = manifest.version, total.num_shards
    report.num_rows, report.num_invalid = total.num_rows, total.num_rows - total.num_valid
    return report


def _check_pinned(store: Store, segments: bool) -> tuple[Manifest, Report]:
    """Check the files that HEADs pin by checksum: spec, moments, segments of samples and manifest.

    Again, if a builder has replaced HEAD meanwhile: it deletes segments that it merged.

    Args:
        store: the store.
        segments: False: leave out the segments, which are compared where they are used.
    """
    while True:
        manifest, report = store.manifest(), Report()
        pinned = [
            (layout.spec_file(store.directory), manifest.head.spec_sha256),
            (layout.moments_file(store.directory), manifest.head.moments_sha256),
            *_fitted_files(store, manifest),
        ]
        if segments:
            pinned += manifest.segment_files
            pinned += segment_files(store.root, store.spec.dataset.name)
        for path, sha256 in pinned:
            problem = _compare(path, sha256, report)
            if problem is not None:
                report.problems.append(problem)
        if not report.problems or store.manifest().version == manifest.version:
            return manifest, report


def _fitted_files(store: Store, manifest: Manifest) -> Iterator[tuple[Path, str]]:
    """List a codec's files of fitted values with their sha256: the store's, and each view's."""
    try:
        fitted = store.description["codec"].get(FITTED)
    except (Corrupt, OSError):
        return  # spec.json is a finding of its own
    if fitted is not None:
        views = [layout.view_directory(store.directory, view) for view in manifest.totals()]
        for directory in (store.directory, *views):
            yield layout.codec_file(directory), fitted["sha256"]


def _check_metadata(store: Store, ends: Mapping[int, int]) -> Iterator[Problem]:
    """Check what outside readers see of each view: its zarr.json.

    It has the dataset's length at a commit: all committed rows, and no more than there are now.

    Args:
        store: the store.
        ends: view -> one past its last committed row.
    """
    for view, end in ends.items():
        path = layout.zarr_file(store.directory, view)
        try:
            content = path.read_bytes()
            num_rows = int(json.loads(content)["shape"][0])
        except FileNotFoundError:
            yield Problem(path, "missing")
            continue
        except OSError as error:
            yield Problem(path, f"cannot be read: {error.strerror}")
            continue
        except (ValueError, LookupError, TypeError) as error:
            yield Problem(path, f"no metadata of an array ({error})")
            continue
        now = num_rows_now(store.root, store.spec.dataset.name)
        if not end <= num_rows <= now:
            yield Problem(path, f"{num_rows} rows; {end} are committed, the dataset has {now}")
        elif content != store.array_metadata(num_rows):
            yield Problem(path, "describes another array than this store's")


def check_shard(
    store: Store,
    record: ShardRecord,
    deep: bool,
    report: Report,
    size_of: Callable[[Path], int] = place.size,
) -> Iterator[Problem]:
    """Yield what is wrong with a shard's files.

    Args:
        store: the store.
        record: of the shard.
        deep: also read every byte.
        report: the bytes read are added to it.
        size_of: tells the size of a file, -1 where there is none.
    """
    patches = layout.patches_file(store.directory, record.view, record.shard)
    rows = layout.rows_file(store.directory, record.view, record.shard)
    whole = True
    for path, size, sha256 in (
        (patches, record.patches_bytes, record.patches_sha256),
        (rows, record.rows_bytes, record.rows_sha256),
    ):
        there = size_of(path)
        if there < 0:
            yield Problem(path, "missing")
            whole = False
        elif there != size:
            yield Problem(path, f"{there} bytes, its record says {size}")
            whole = False
        elif deep:
            problem = _compare(path, sha256, report)
            if problem is not None:
                yield Problem(path, f"{problem.what}; {AGAIN}")
                whole = False
    if not whole:
        return
    try:
        yield from _check_contents(store, record, patches, rows, deep)
    except StoreError as error:
        yield Problem(patches, str(error).removeprefix(f"{patches}: "))
    except OSError as error:
        yield Problem(patches, f"cannot be read: {error.strerror}")


def _check_contents(
    store: Store, record: ShardRecord, patches: Path, rows: Path, deep: bool
) -> Iterator[Problem]:
    """Check that index, table of rows, sample table and record tell the same story."""
    samples = store.samples
    if record.samples_digest != samples.shard_digest(record.shard):
        yield Problem(patches, "made of other samples or images than the dataset's table names")
    num_bytes = zarr_shard.index_bytes(samples.rows_per_shard)
    (tail,) = place.ranges(patches, [record.patches_bytes - num_bytes], num_bytes)
    slots = zarr_shard.parse_index(tail, store.row_bytes, record.patches_bytes, str(patches))
    table = arrow_tables.map_table(rows, record.rows_bytes, record.rows_sha256)
    if table.schema != store.rows_schema:
        yield Problem(rows, f"{table.schema.names} are no columns of rows; {AGAIN}")
        return
    if table["sample_id"].to_pylist() != samples.shard(record.shard)["sample_id"].to_list():
        yield Problem(rows, "sample ids are not those of the dataset's rows")
    inside = samples.dropped[samples.dropped // samples.rows_per_shard == record.shard]
    if not_dropped(table, inside - record.start).any():
        yield Problem(rows, "holds samples that were taken out; `eupe cache drop` them again")
    valid = rows_table.valid(table)
    if int(valid.sum()) != record.num_valid:
        yield Problem(rows, f"{int(valid.sum())} valid rows, its record says {record.num_valid}")
    present = slots >= 0
    if present[len(valid) :].any() or not np.array_equal(present[: len(valid)], valid):
        yield Problem(patches, "the rows in its index are not the valid rows of its table")
        return
    asked = np.flatnonzero(valid)
    asked = asked if deep else asked[[0, -1][: len(asked)]]  # two tell an exchanged file
    kept = _stored_checksums(patches, slots[asked], store.row_bytes)
    if differing := np.flatnonzero(kept != rows_table.checksums(table)[asked]).tolist():
        what = f"row {asked[differing[0]]} of the shard has another crc32c than its table says"
        yield Problem(patches, f"{what}; {AGAIN}")


def not_dropped(table: pa.Table, inside: Rows) -> npt.NDArray[np.bool_]:
    """Return for rows whose samples were taken out whether a shard's table still has them, [n].

    Args:
        table: of the shard's rows.
        inside: of those, int64 [n], counted from the shard's first.
    """
    reasons = table["reason"].take(arrow_tables.from_numpy(inside)).to_pylist()
    return np.array([reason != DROPPED_REASON for reason in reasons], bool)


def _stored_checksums(
    path: Path, slots: npt.NDArray[np.int64], row_bytes: int
) -> npt.NDArray[np.uint32]:
    """Return the crc32c that a shard file has beside the rows in these slots; reads no row."""
    stored, kept = zarr_shard.stored_bytes(row_bytes), bytearray()
    starts = (slots * stored + row_bytes).tolist()
    at_once = max(CHECKSUMS_BYTES // stored, 2)
    for first in range(0, len(starts), at_once):
        some = starts[first : first + at_once]
        kept += b"".join(place.ranges(path, some, zarr_shard.CHECKSUM_BYTES))
    return np.frombuffer(kept, "<u4").astype(np.uint32)


def _compare(path: Path, sha256: str, report: Report) -> Problem | None:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while part := file.read(READ_BYTES):
                digest.update(part)
                report.num_bytes += len(part)
    except OSError as error:
        return Problem(path, f"cannot be read: {error.strerror}")
    if digest.hexdigest() != sha256:
        return Problem(path, "contents do not match the recorded sha256")
    return None
