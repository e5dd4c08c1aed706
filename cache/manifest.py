"""The manifest of a store: which shards exist. A shard that is not in it does not exist (law 5).

Records are kept for ever, in sorted runs (cache/runs.py) that HEAD names. Every record carries the
version that committed it, so any earlier version can still be read after runs have been merged: a
run pins the version it trains on.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import JsonValue

from cache.errors import Corrupt, NotBuilt, StoreError
from cache.files import atomic
from cache.files.bucket_path import BucketPath
from cache.format import arrow_tables, layout
from cache.format.record_table import (
    END_KEY,
    FIRST_KEY,
    ShardRecord,
    records_of,
    table_of,
)
from cache.heads import Head, HeadFile, commit, files, next_version, read_head
from cache.runs import Part, Runs
from eupe.errors import BadInput


class ManifestHead(Head):
    """HEAD of a manifest.

    Attributes:
        version: number of commits so far.
        spec_sha256: of the store's spec.json.
        moments_sha256: of its moments.arrow.
        provenance: what the first build recorded for later builds to obey.
        segments: the parts of all runs, the oldest run first.
    """

    spec_sha256: str
    moments_sha256: str
    provenance: dict[str, JsonValue]
    segments: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Totals:
    """What the shards of a view, or of several, come to.

    Attributes:
        num_shards: committed shards.
        num_rows: their rows.
        num_valid: those that are valid.
        num_bytes: size of their files.
        end: one past the last row.
    """

    num_shards: int = 0
    num_rows: int = 0
    num_valid: int = 0
    num_bytes: int = 0
    end: int = 0

    def __add__(self, other: "Totals") -> "Totals":
        """Return what both come to."""
        return Totals(
            num_shards=self.num_shards + other.num_shards,
            num_rows=self.num_rows + other.num_rows,
            num_valid=self.num_valid + other.num_valid,
            num_bytes=self.num_bytes + other.num_bytes,
            end=max(self.end, other.end),
        )


class Manifest:
    """The manifest as of one reading of HEAD; `commit` moves it on.

    Attributes:
        directory: where segments and HEAD lie.
    """

    def __init__(self, directory: Path, there: HeadFile[ManifestHead]):
        """Use `Manifest.open` or `Manifest.create`."""
        self.directory = directory
        self._there = there
        self._runs = Runs(directory, there.head.segments)

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

    def checked(self, version: int | None) -> int:
        """Return a version that there is; None is the newest.

        Raises:
            ValueError: that version does not exist.
        """
        if version is not None and not 0 <= version <= self.version:
            raise BadInput(f"version = {version}: {self.directory} has 0 to {self.version}")
        return self.version if version is None else version

    def find(self, view: int, shard: int, version: int | None = None) -> ShardRecord | None:
        """Return a shard's record at a version (None: the newest); None if it does not exist.

        Raises:
            Corrupt: a part is missing or not what HEAD says.
        """
        at = self.checked(version)
        return self._asked(lambda runs: runs.find(view, shard, at))

    def find_since(self, view: int, shard: int, version: int) -> ShardRecord | None:
        """Return a shard's record at a version or, if it did not exist then, its first one since.

        So what a run reads that began before its store was whole follows from the version at which
        it began, whenever it looks.

        Raises:
            ValueError: that version does not exist.
            Corrupt: a part is missing or not what HEAD says.
        """
        at = self.checked(version)
        return self._asked(
            lambda runs: runs.find(view, shard, at) or runs.find_after(view, shard, at)
        )

    def tables(self, version: int | None = None, views: range | None = None) -> Iterator[pa.Table]:
        """Yield the records at a version (None: the newest), sorted by view and shard.

        A shard that was committed again is there once, with its latest record. A table holds about
        a part; it is let go before the next one is read.

        Args:
            version: of the manifest.
            views: only the records of these views.

        Raises:
            ValueError: that version does not exist.
            Corrupt: a part is missing or not what HEAD says.
        """
        at = self.checked(version)
        low, high = FIRST_KEY, END_KEY
        if views is not None:
            low, high = (views.start, -1), (views.stop, -1)
        while True:
            try:
                for end, table in self._runs.latest(at, low, high):
                    yield table
                    low = end
                return
            except (NotBuilt, Corrupt):
                if not self._read_again():
                    raise

    def records(self, version: int | None = None) -> Iterator[ShardRecord]:
        """Yield the records at a version as objects, sorted by view and shard (see `tables`)."""
        for table in self.tables(version):
            yield from records_of(table)

    def totals(self, version: int | None = None) -> dict[int, Totals]:
        """Add up the shards of each view at a version: view -> totals, rising."""
        found: dict[int, Totals] = {}
        for table in self.tables(version):
            view, start, stop, num_valid, patches, rows = (
                arrow_tables.to_numpy(table[name])
                for name in ("view", "start", "stop", "num_valid", "patches_bytes", "rows_bytes")
            )
            for number in np.unique(view).tolist():
                own = view == number
                found[number] = found.get(number, Totals()) + Totals(
                    num_shards=int(own.sum()),
                    num_rows=int((stop - start)[own].sum()),
                    num_valid=int(num_valid[own].sum()),
                    num_bytes=int((patches + rows)[own].sum()),
                    end=int(stop[own].max()),
                )
        return found

    def total(self, version: int | None = None) -> Totals:
        """Add up all shards at a version."""
        return sum(self.totals(version).values(), Totals())

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
        ordered = sorted(records, key=attrgetter("view", "shard"))
        return self.append(table_of(ordered, [0] * len(ordered)))

    def append(self, table: pa.Table) -> int:
        """Commit records in a table, sorted, whatever `version` it has; see `commit`."""
        scratch = layout.scratch_directory(self.directory.parent)

        def next_head(there: HeadFile[ManifestHead] | None) -> ManifestHead:
            if there is None:
                raise NotBuilt(f"{self.directory.parent}: the store was deleted meanwhile")
            check_same(
                self.directory.parent, there.head, self.head.spec_sha256, self.head.moments_sha256
            )
            version = next_version(there)
            versions = arrow_tables.from_numpy(np.full(table.num_rows, version, np.int32))
            given = table.set_column(0, "version", versions)
            segments = Runs(self.directory, there.head.segments).appended(given, version, scratch)
            return there.head.model_copy(update={"version": version, "segments": segments})

        with atomic.only_writer(self.directory.parent, scratch):
            there = commit(self.directory, ManifestHead, next_head, scratch)
        assert there is not None
        self._use(there)
        return self.version

    def settle(self) -> None:
        """Make HEAD the newest version, where a killed committer has not come to that.

        In a bucket it always is: its replacement is the commit.
        """
        if isinstance(self.directory, BucketPath):
            return
        scratch = layout.scratch_directory(self.directory.parent)
        commit(self.directory, ManifestHead, lambda there: None, scratch)

    def _asked(self, ask: Callable[[Runs], ShardRecord | None]) -> ShardRecord | None:
        while True:
            runs = self._runs
            try:
                return ask(runs)
            except (NotBuilt, Corrupt):
                if not self._read_again():
                    raise

    def _use(self, there: HeadFile[ManifestHead]) -> None:
        self._there = there
        self._runs = Runs(self.directory, there.head.segments)

    def _read_again(self) -> bool:
        """Read HEAD once more; True if a committer has replaced it, and merged parts maybe.

        A merge loses no record, so what was asked of the older HEAD stands in the newer.
        """
        before = self.head
        self._use(Manifest.open(self.directory.parent)._there)
        return self.head != before


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
