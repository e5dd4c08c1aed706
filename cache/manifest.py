"""The manifest of a store: which shards exist. A shard that is not in it does not exist (law 5).

Records are kept for ever in Arrow segments; HEAD, replaced last, names the segments of the newest
version. Every record carries the version that committed it, so any earlier version can still be
read after segments have been merged: a run pins the version it trains on.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import JsonValue

from cache.errors import Corrupt, NotBuilt, StoreError
from cache.files import atomic
from cache.format import arrow_tables, layout
from cache.segments import (
    Head,
    HeadFile,
    Segment,
    commit,
    files,
    map_segment,
    next_version,
    read_head,
    write_segment,
)
from eupe.errors import BadInput

MERGE_AT = 8
"""So many segments of about one size become one: n commits make O(log n) files."""


@dataclass(frozen=True)
class ShardRecord:
    """What a committed shard is.

    Attributes:
        view: view number.
        shard: shard number.
        start: first row.
        stop: one past the last row.
        num_valid: rows whose features are there.
        num_escapes: tokens stored at higher precision.
        samples_digest: of the sample ids and image digests the features were made of.
        patches_bytes: size of the Zarr shard file.
        patches_sha256: its checksum.
        rows_bytes: size of the table of rows.
        rows_sha256: its checksum.
        provenance: library versions, device, compute batch; canonical JSON. Never identity.
    """

    view: int
    shard: int
    start: int
    stop: int
    num_valid: int
    num_escapes: int
    samples_digest: str
    patches_bytes: int
    patches_sha256: str
    rows_bytes: int
    rows_sha256: str
    provenance: str

    @property
    def num_invalid(self) -> int:
        """Rows recorded as invalid, with their reason in the table of rows."""
        return self.stop - self.start - self.num_valid


SCHEMA = pa.schema(
    [("version", pa.int64())]
    + [(f.name, pa.int64() if f.type in (int, "int") else pa.string()) for f in fields(ShardRecord)]
)
"""Columns of a segment."""


def table_of(records: Sequence[ShardRecord], versions: Sequence[int]) -> pa.Table:
    """Return records as rows of a segment, each with the version that committed it."""
    rows = [asdict(record) for record in records]
    columns = {name: [row[name] for row in rows] for name in SCHEMA.names[1:]}
    return pa.table({"version": list(versions), **columns}, schema=SCHEMA)


def records_of(table: pa.Table) -> list[ShardRecord]:
    """Return rows of a segment as objects."""
    return [ShardRecord(**row) for row in table.drop_columns(["version"]).to_pylist()]


class ManifestHead(Head):
    """HEAD of a manifest.

    Attributes:
        version: number of commits so far.
        spec_sha256: of the store's spec.json.
        moments_sha256: of its moments.arrow.
        provenance: what the first build recorded for later builds to obey.
    """

    spec_sha256: str
    moments_sha256: str
    provenance: dict[str, JsonValue]


class Manifest:
    """The manifest as of one reading of HEAD; `commit` moves it on.

    Attributes:
        directory: where segments and HEAD lie.
    """

    def __init__(self, directory: Path, there: HeadFile[ManifestHead]):
        """Use `Manifest.open` or `Manifest.create`."""
        self.directory = directory
        self._there = there

    @classmethod
    def open(cls, store: Path) -> "Manifest":
        """Open the manifest of a store's directory.

        Raises:
            NotBuilt: the store has none.
            Corrupt: HEAD cannot be read.
        """
        directory = layout.manifest_directory(store)
        there = read_head(directory, ManifestHead)
        if there is None:
            raise NotBuilt(f"{store}: no store here (it has no manifest/HEAD)")
        return cls(directory, there)

    @classmethod
    def create(cls, store: Path, head: ManifestHead) -> None:
        """Write the first HEAD, which names no shards yet, unless there is one."""
        directory, scratch = layout.manifest_directory(store), layout.scratch_directory(store)
        commit(directory, ManifestHead, lambda there: None if there else head, scratch)

    @property
    def head(self) -> ManifestHead:
        """What HEAD says."""
        return self._there.head

    @property
    def version(self) -> int:
        """Number of commits so far."""
        return self.head.version

    @property
    def segment_files(self) -> list[tuple[Path, str]]:
        """Path and sha256 of every segment."""
        return files(self.directory, self.head)

    def table(self, version: int | None = None) -> pa.Table:
        """Return the records at a version (None: the newest), one a (view, shard), sorted so.

        A shard that was committed again is there once, with its latest record.

        Raises:
            ValueError: that version does not exist.
            Corrupt: a segment is missing or not what HEAD says.
        """
        if version is not None and not 0 <= version <= self.version:
            raise BadInput(f"version = {version}: {self.directory} has 0 to {self.version}")
        parts = self._parts()
        table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        committed = arrow_tables.to_numpy(table["version"])
        keep = np.arange(len(committed))
        if version is not None:
            keep = keep[committed <= version]
        view, shard = (arrow_tables.to_numpy(table[name])[keep] for name in ("view", "shard"))
        order = np.lexsort((committed[keep], shard, view))
        view, shard = view[order], shard[order]
        last = np.ones(len(order), bool)
        last[:-1] = (view[1:] != view[:-1]) | (shard[1:] != shard[:-1])
        chosen = keep[order[last]]
        if len(chosen) == len(committed) and (np.diff(chosen) == 1).all():
            return table  # already in order: stay mapped
        return table.take(arrow_tables.from_numpy(chosen))

    def records(self, version: int | None = None) -> list[ShardRecord]:
        """Return the records at a version as objects, sorted by view and shard (see `table`)."""
        return records_of(self.table(version))

    def commit(self, records: Sequence[ShardRecord]) -> int:
        """Make shards exist: append their records, HEAD last; return the new version.

        The files of the shards must be on disk. `Store.commit` also grows the array's shape;
        callers want that one.

        Raises:
            StoreError: the store was made anew since this manifest was opened, with other moments
                or another spec: these shards were encoded with the old ones.
            Busy: other processes have been committing for a minute.
        """
        if not records:
            return self.version
        scratch = layout.scratch_directory(self.directory.parent)

        def next_head(there: HeadFile[ManifestHead] | None) -> ManifestHead:
            if there is None:
                raise NotBuilt(f"{self.directory.parent}: the store was deleted meanwhile")
            check_same(
                self.directory.parent, there.head, self.head.spec_sha256, self.head.moments_sha256
            )
            version = next_version(there)
            table = table_of(records, [version] * len(records))
            segments = self._appended(there.head.segments, table, version, scratch)
            return there.head.model_copy(update={"version": version, "segments": segments})

        with atomic.only_writer(self.directory.parent, scratch):
            there = commit(self.directory, ManifestHead, next_head, scratch)
        assert there is not None
        self._there = there
        return self.version

    def settle(self) -> None:
        """Make HEAD the newest version, where a killed committer has not come to that."""
        scratch = layout.scratch_directory(self.directory.parent)
        commit(self.directory, ManifestHead, lambda there: None, scratch)

    def _appended(
        self, segments: tuple[Segment, ...], table: pa.Table, version: int, scratch: Path
    ) -> tuple[Segment, ...]:
        """Write one segment, merging smaller ones of the tail into it."""
        # Merge when the last MERGE_AT - 1 segments are no larger than this one would become, so
        # each record is rewritten at most log_MERGE_AT(n) times.
        while True:
            tail = segments[-(MERGE_AT - 1) :]
            if len(tail) < MERGE_AT - 1 or max(s.rows for s in tail) > table.num_rows:
                break
            table = pa.concat_tables([*(self._segment(segment) for segment in tail), table])
            segments = segments[: -len(tail)]
        return (*segments, write_segment(self.directory, version, table, scratch))

    def _read_again(self) -> None:
        self._there = Manifest.open(self.directory.parent)._there

    def _parts(self) -> list[pa.Table]:
        """Read the segments; where a committer has merged some since HEAD was read, its newer ones.

        A merge loses no record, so what was asked of the older HEAD stands in the newer.
        """
        while True:
            try:
                return [self._segment(segment) for segment in self.head.segments]
            except (NotBuilt, Corrupt):
                before = self.head
                self._read_again()
                if self.head == before:
                    raise

    def _segment(self, segment: Segment) -> pa.Table:
        # Comparing the checksums of a million shards takes 0.2 s.
        return map_segment(self.directory, segment, SCHEMA)


def check_same(store: Path, head: ManifestHead, spec_sha256: str, moments_sha256: str) -> None:
    """Refuse a store that is another one than when it was opened.

    Args:
        store: its directory.
        head: of its manifest as it is now.
        spec_sha256: of spec.json as it was.
        moments_sha256: of moments.arrow as it was.

    Raises:
        StoreError: it was deleted and made anew, and has another scaling.
    """
    if (head.spec_sha256, head.moments_sha256) != (spec_sha256, moments_sha256):
        raise StoreError(
            f"{store}: the store was made anew since this process opened it, and its features are "
            f"scaled otherwise; run the same command again"
        )
