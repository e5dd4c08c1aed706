"""Read a store by (row, view): one copy from the page cache into the caller's buffer.

`Reader.select` finds a batch's rows; the `Selection` it returns gives patches and all the rest.
The index of a shard is parsed once, when the shard is first touched. From then on a row costs one
memory copy. Rows that are not in memory are read by position, several at a time, where page faults
would fetch a few pages each. The shards that all readers of a process used last stay open
(`mapped.Recent`). Thread-safe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from cache.errors import AGAIN, Corrupt, MissingSamples, NotBuilt, StoreError, WrongSize
from cache.files.bucket_path import BucketPath
from cache.files.mapped import Bytes, Recent, major_faults
from cache.files.place import drop_damaged, is_mirrored, using, will_need
from cache.format import arrow_tables, layout
from cache.format.record_table import ShardRecord
from cache.selection import Group, Selection, Views, located
from cache.shard_ranges import Rows, ShardRanges
from cache.shard_records import ShardRecords
from cache.shard_rows import (
    MappedRows,
    Piece,
    PositionedRows,
    RangedRows,
    ShardRows,
    TableRows,
    copy_all,
    mapped_rows,
    read_all,
)
from cache.store import Store

Kind = Literal["patches", "rows"]
T = TypeVar("T")
KNOWN_SHARDS = 32_768
"""Shards whose records a reader keeps, at some 700 bytes: as many as a process keeps mapped."""
SHARE_BY_RANGE = 0.1
"""Of the rows: to fetch less by range takes fewer bytes than whole shards, and as few requests."""
Access = Literal["map", "read"]
PROBES = 8
"""Rows of a batch whose residency is asked before copying: 1 us each."""


class Reader:
    """Rows of a store, as of one version of its manifest.

    Attributes:
        store: the store.
        views: numbers of the views it reads, rising.
        version: the manifest version it reads.
        records: of the shards that it reads.
        row_shape: shape of a row in storage dtype, (N, D) for plain codecs.
        dtype: storage dtype.
    """

    def __init__(
        self,
        store: Store,
        views: Sequence[int] = (0,),
        version: int | None = None,
        access: Access = "map",
        threads: int = 1,
        growing: bool = False,
        few: bool = False,
    ):
        """Open a store for reading.

        Args:
            store: from `open_store`.
            views: numbers of the views to read; none, where no row will be asked for.
            version: manifest version to read; None is the newest.
            access: "map" for local disks, "read" (positioned reads) where maps are slow.
            threads: threads that copy one batch, the caller's included; numpy copies without the
                interpreter's lock.
            growing: read shards that are committed later, too; see `ShardRecords`.
            few: True if few rows of a shard will be wanted: of a bucket they are fetched by range
                then, unless the mirror has the shard.

        Raises:
            NotBuilt: one of the views has no shard in the manifest, and the reader is not growing.
            ValueError: no thread, or another access.
        """
        self.store = store
        self.views = sorted(set(views))
        if threads < 1 or access not in ("map", "read"):
            raise ValueError(
                f"threads = {threads}, access = {access!r}: wants at least one thread, and access "
                "'map' or 'read'"
            )
        self.records = ShardRecords(store, version, growing)
        self.version = self.records.version
        self._known: dict[tuple[int, int], _Shard] = {}
        for view in () if growing else self.views:
            if not any(bool((shards >= 0).any()) for shards in self.records.of_view(view)):
                raise NotBuilt(f"{store.directory}: view {view} has no shard yet; build it first")
        self.row_shape = store.row_shape
        self.dtype = store.codec.storage_dtype
        self._row_bytes = store.row_bytes
        fill = np.nan if store.codec.fill_value == "NaN" else store.codec.fill_value
        self._fill: Bytes = np.full(self.row_shape, fill, self.dtype).reshape(-1).view(np.uint8)
        self._access, self._few = access, few and self.mirrored
        self._mapped = access == "map" and not self._few
        self._patches = Recent[ShardRows](
            self._open_patches, "map" if self._mapped else "descriptor"
        )
        self._tables = Recent(self._open_table, "map")
        self._faults = -1
        self._threads = threads

    def for_rows(self, num_rows: int) -> "Reader":
        """Return a reader of the same for who will want so many rows, spread over all shards.

        Less than SHARE_BY_RANGE of all rows are fetched out of a bucket by range.
        """
        if self._few or self.records.growing or not self.mirrored:
            return self
        if num_rows >= SHARE_BY_RANGE * len(self):
            return self
        return Reader(self.store, self.views, self.version, self._access, self._threads, few=True)

    @property
    def mirrored(self) -> bool:
        """True if the store lies in a bucket, so that hints spare waiting for the network."""
        return isinstance(self.store.directory, BucketPath)

    def __len__(self) -> int:
        """Count the samples that are there in every view."""
        shards = np.flatnonzero(self.records.shared(self.views))
        starts = shards * self.store.samples.rows_per_shard
        return int((self.store.samples.shard_stops(shards) - starts).sum())

    def shards(self) -> ShardRanges:
        """Return the shards that every view has, with their rows: what an epoch is ordered from."""
        shards = self.store.samples.shards()
        return shards.where(self.records.shared(self.views)[shards.numbers])

    def select(self, rows: Sequence[int] | Rows, views: Views = 0) -> Selection:
        """Find rows in their shards, once for all that will be asked about them.

        Args:
            rows: int64 [n].
            views: view number of each row, [n], or one for all.

        Raises:
            ValueError: rows of another shape, or views of another length.
            MissingSamples: a row is not in the store, or not in that view.
        """
        keys, inside = located(rows, views, self.store.samples.rows_per_shard)
        for key, number in zip(keys, inside, strict=True):
            known = self._known.get(key)
            if known is None or number >= known.num_rows:
                self._look_up(*key, number)
        return Selection(self, keys, inside)

    def will_need(self, rows: Rows, views: Rows) -> None:
        """Start bringing rows [n] that will be copied soon, of those that are there: a hint."""
        if self.records.growing:
            there = ~self.records.absent(rows, views)
            rows, views = rows[there], views[there]
        self.select(rows, views).read_ahead()

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return sample ids, in the given order."""
        return self.store.samples.sample_ids(rows)

    def table(self, view: int, shard: int) -> TableRows:
        """Return the table of a shard's rows; see `select`.

        Raises:
            Corrupt: it is not what its record says.
        """
        return self._tables.get(view, shard)

    def copy(self, selection: Selection, into: Bytes) -> None:
        """Copy the patches of rows into a batch [n * row_bytes]; see `Selection.patches`."""
        for first in (True, False):
            shards = self._patches.all(selection.keys)
            try:
                if self._undisturbed() or self._resident(shards, selection.inside):
                    rows = mapped_rows(shards, selection.inside)
                    copy_all(rows, into, self._threads)
                else:
                    read_all(self._pieces(selection), into.reshape(-1, self._row_bytes))
                return
            except Corrupt as error:
                if not (first and self.mirrored):
                    check_not_rebuilt(self, selection.groups, error)
                    raise
                self._let_go(selection.groups)

    def _let_go(self, groups: Sequence[Group]) -> None:
        """Drop copies of a bucket's shards that are damaged, and open all of these shards anew.

        Those too whose copy is sound: another thread or process may have exchanged it meanwhile.
        """
        for view, shard, _, _ in groups:
            drop_damaged(*self._look_up(view, shard).file(self.store.directory, "patches"))
            self._patches.drop(view, shard)

    def read_ahead(self, selection: Selection) -> None:
        """Start bringing rows that will be copied soon; see `Selection.read_ahead`."""
        if self.mirrored:
            for view, shard, _, _ in selection.groups:
                if (view, shard) not in self._patches or (view, shard) not in self._tables:
                    known = self._look_up(view, shard)
                    kinds: list[Kind] = ["rows"] if self._few else ["rows", "patches"]
                    will_need(known.file(self.store.directory, kind) for kind in kinds)
        elif not self._undisturbed():
            shards = self._patches.all(selection.keys)
            if not self._resident(shards, selection.inside):
                for piece in self._pieces(selection):
                    piece.shard.will_need(piece.inside)

    def _pieces(self, selection: Selection) -> list[Piece]:
        """Open the shards that the rows lie in, each once."""
        return [
            Piece(self._patches.get(view, shard), inside, places)
            for view, shard, places, inside in selection.groups
        ]

    def _undisturbed(self) -> bool:
        """True if the last rows were in memory and no fault of this process went to disk since."""
        return self._faults == major_faults()

    def _resident(self, shards: Sequence[ShardRows], inside: Sequence[int]) -> bool:
        """Say whether a batch [n] is in memory, as far as a few of its rows tell."""
        if not self._mapped:
            return False
        faults, step = major_faults(), max(1, len(shards) // PROBES)
        resident = all(
            shard.is_resident(row)
            for shard, row in zip(shards[::step], inside[::step], strict=True)
        )
        self._faults = faults if resident else -1  # -1: the next batch is asked about too
        return resident

    def _look_up(self, view: int, shard: int, inside: int = 0) -> "_Shard":
        """Find a shard's record in the manifest; KNOWN_SHARDS of them are kept.

        Raises:
            MissingSamples: the store does not have that row of it, or the view was not opened.
        """
        known = self._known.get((view, shard))
        if known is not None and inside < known.num_rows:
            return known
        if view not in self.views:
            raise MissingSamples(
                f"{self.store.directory}: view {view} was not opened, only {self.views}"
            )
        samples = self.store.samples
        start = shard * samples.rows_per_shard
        num_rows = int(samples.shard_stops(np.array([shard]))[0]) - start
        row = start + inside
        if inside >= num_rows:
            raise MissingSamples(f"{self.store.directory}: row {row} holds no sample")
        record = self.records.find(view, shard)
        if record is None:
            raise MissingSamples(
                f"{self.store.directory}: row {row} of view {view} is not built at manifest "
                f"version {self.version}; build the missing shards"
            )
        if len(self._known) >= KNOWN_SHARDS:
            self._known.clear()
        known = self._known[view, shard] = _Shard(record, num_rows)
        return known

    def _check_samples(self, view: int, shard: int) -> None:
        """Refuse features of other samples than the dataset now has in these rows."""
        known = self._look_up(view, shard)
        if known.checked:
            return
        if known.record.samples_digest != self.store.samples.shard_digest(shard):
            raise StoreError(
                f"{self.store.directory}: view {view}, shard {shard} was made of other samples or "
                f"images than the dataset's table names; restore that table, or delete the store "
                f"and build again"
            )
        known.checked = True

    def _use(self, view: int, shard: int, kind: Kind, use: Callable[[Path, int, str], T]) -> T:
        """Open one of a shard's files, given as path, size and sha256."""
        self._check_samples(view, shard)
        path, num_bytes, sha256 = self._look_up(view, shard).file(self.store.directory, kind)
        try:
            return using(path, lambda local: use(local, num_bytes, sha256), num_bytes, sha256)
        except NotBuilt as error:
            raise Corrupt(f"{error}, though the manifest has it; build again") from error
        except Corrupt as error:
            check_not_rebuilt(self, [Group(view, shard, [], [])], error)
            if isinstance(error, WrongSize):
                raise Corrupt(f"{error}; build again") from error
            raise

    def _open_patches(self, view: int, shard: int) -> ShardRows:
        shape = self.store.samples.rows_per_shard, self.table(view, shard), self._fill
        file = self._look_up(view, shard).file(self.store.directory, "patches")
        if self._few and not is_mirrored(*file):
            path, num_bytes, _ = file
            self._check_samples(view, shard)
            try:
                return RangedRows(path, num_bytes, *shape)
            except FileNotFoundError as error:
                raise Corrupt(f"{error}, though the manifest has it; build again") from error
        rows_class = MappedRows if self._mapped else PositionedRows
        return self._use(
            view, shard, "patches", lambda path, num_bytes, _: rows_class(path, num_bytes, *shape)
        )

    def _open_table(self, view: int, shard: int) -> TableRows:
        path = layout.rows_file(self.store.directory, view, shard)
        try:
            content = self._use(view, shard, "rows", arrow_tables.map_local)
            table = arrow_tables.parse_table(content, str(path))
        except Corrupt as error:
            raise Corrupt(f"{error}; {AGAIN}") from error
        if table.schema != self.store.rows_schema:
            raise Corrupt(f"{path}: {table.schema.names} are no columns of rows; {AGAIN}")
        return TableRows(table)


@dataclass(slots=True)
class _Shard:
    """What a reader knows of a shard.

    Attributes:
        record: in the manifest.
        num_rows: that the dataset has in it.
        checked: True if its samples were found to be those of the dataset.
    """

    record: ShardRecord
    num_rows: int
    checked: bool = False

    def file(self, directory: Path, kind: Kind) -> tuple[Path, int, str]:
        """Return one of the files, of a store in a directory: path, size and sha256."""
        record = self.record
        if kind == "patches":
            path = layout.patches_file(directory, record.view, record.shard)
            return path, record.patches_bytes, record.patches_sha256
        path = layout.rows_file(directory, record.view, record.shard)
        return path, record.rows_bytes, record.rows_sha256


def check_not_rebuilt(reader: Reader, groups: Sequence[Group], error: Exception) -> None:
    """Say so if shards that are not as recorded are those of a later version than the reader's.

    Args:
        reader: of a version that a run is pinned to.
        groups: the shards.
        error: what is wrong with them.

    Raises:
        StoreError: one of them was built anew.
    """
    manifest = reader.store.manifest()
    if reader.version == manifest.version:
        return
    for view, shard, _, _ in groups:
        then = manifest.find_since(view, shard, reader.version)
        now = manifest.find(view, shard)
        assert then is not None
        assert now is not None
        if (then.patches_sha256, then.rows_sha256) != (now.patches_sha256, now.rows_sha256):
            raise StoreError(
                f"{reader.store.directory}: view {view}, shard {shard} was built anew, with other "
                f"bytes, since manifest version {reader.version}, to which this run is pinned. "
                f"Start a new run, which reads version {manifest.version}, or restore the shard's "
                f"files of before"
            ) from error
