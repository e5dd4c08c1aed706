"""Read a store by (row, view): one copy from the page cache into the caller's buffer.

A shard's index is parsed once when the shard is first touched; from then on a row costs one memory
copy. Rows that are not in memory are read by position, several at a time: page faults would fetch a
few pages each. Shards are kept open, the most recently used of all readers of the process
(`mapped.Recent`). Thread-safe.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import Escapes
from cache.errors import AGAIN, Corrupt, MissingSamples, NotBuilt, StoreError, WrongSize
from cache.files.bucket import BucketPath
from cache.files.mapped import Bytes, Recent, major_faults
from cache.files.place import using, will_need
from cache.format import arrow_tables, layout, rows_table
from cache.samples import Rows, ShardRange
from cache.shard_rows import (
    MappedRows,
    Piece,
    PositionedRows,
    ShardRows,
    TableRows,
    copy_all,
    read_all,
)
from cache.store import Store

Views = int | Sequence[int] | Rows
Kind = Literal["patches", "rows"]
T = TypeVar("T")
PROBES = 8
"""Rows of a batch whose residency is asked before copying: 1 us each."""


class Group(NamedTuple):
    """The rows of a batch that lie in one shard: their places in the batch and inside the shard."""

    view: int
    shard: int
    places: list[int]
    inside: list[int]


class Reader:
    """Rows of a store, as of one version of its manifest.

    Attributes:
        store: the store.
        views: the views it reads.
        version: the manifest version it reads.
        row_shape: shape of a row in storage dtype, (N, D) for plain codecs.
        dtype: storage dtype.
    """

    def __init__(
        self,
        store: Store,
        views: int | Sequence[int] = 1,
        version: int | None = None,
        access: Literal["map", "read"] = "map",
        threads: int = 1,
    ):
        """Open a store for reading.

        Args:
            store: from `open_store`.
            views: how many views, from view 0, or which.
            version: manifest version to read; None is the newest.
            access: "map" for local disks, "read" (positioned reads) where maps are slow.
            threads: threads that copy one batch, the caller's included; numpy copies without the
                interpreter's lock.

        Raises:
            NotBuilt: one of the views has no shard in the manifest.
            ValueError: no view, no thread, or another access.
        """
        self.store = store
        self.views = list(range(views)) if isinstance(views, int) else sorted(set(views))
        if not self.views or threads < 1 or access not in ("map", "read"):
            raise ValueError(
                f"views = {views}, threads = {threads}, access = {access!r}: wants at least one "
                f"view and one thread, and access 'map' or 'read'"
            )
        manifest = store.manifest()
        self.version = manifest.version if version is None else version
        self._table = manifest.table(self.version)
        samples = store.samples
        self._stops = samples.shard_stops()
        self._records = np.full((len(self.views), len(self._stops)), -1, np.int64)
        of_view, of_shard = (arrow_tables.to_numpy(self._table[name]) for name in ("view", "shard"))
        self._position = {view: position for position, view in enumerate(self.views)}
        known = of_shard < len(self._stops)  # others may have added samples, and built them
        for view, position in self._position.items():
            records = np.flatnonzero((of_view == view) & known)
            if not len(records):
                raise NotBuilt(f"{store.directory}: view {view} has no shard yet; build it first")
            self._records[position, of_shard[records]] = records
        starts = np.arange(len(self._stops)) * samples.rows_per_shard
        self._lengths = np.where(self._records >= 0, self._stops - starts, 0)
        self._checked = np.zeros(self._table.num_rows, bool)
        self.row_shape = store.row_shape
        self.dtype = store.codec.storage_dtype
        self._row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        fill = np.nan if store.codec.fill_value == "NaN" else store.codec.fill_value
        self._fill: Bytes = np.full(self.row_shape, fill, self.dtype).reshape(-1).view(np.uint8)
        self._mapped = access == "map"
        self._patches = Recent[ShardRows](
            self._open_patches, "map" if self._mapped else "descriptor"
        )
        self._tables = Recent(self._open_table, "map")
        self._faults = -1
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads - 1, "cache-copy") if threads > 1 else None

    @property
    def mirrored(self) -> bool:
        """Whether the store lies in a bucket, so that hints spare waiting for the network."""
        return isinstance(self.store.directory, BucketPath)

    def __len__(self) -> int:
        """Number of samples that are there in every view."""
        return int(self._lengths.min(axis=0).sum())

    def shards(self) -> list[ShardRange]:
        """Shards that are there in every view, with their rows: what an epoch is ordered from."""
        shared = np.asarray((self._lengths > 0).all(axis=0))
        return [shard for shard in self.store.samples.shards() if shared[shard.shard]]

    def take(
        self,
        rows: Sequence[int] | Rows,
        views: Views = 0,
        out: npt.NDArray[np.generic] | None = None,
    ) -> npt.NDArray[np.generic]:
        """Copy rows, in the given order, into one buffer: one copy, whatever the order.

        Args:
            rows: int64 [n].
            views: view of each row, [n], or one for all.
            out: [n, *row_shape] in storage dtype, C-contiguous; made if None.

        Returns:
            `out`. Invalid rows hold the array's fill value (NaN, or 0 for codes).

        Raises:
            ValueError: `out` does not fit.
            MissingSamples: a row is not in the store, or not in that view.
            Corrupt: a shard is not what its record says.
        """
        asked = np.asarray(rows, np.int64)
        shape = (*asked.shape, *self.row_shape)
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out: {out.dtype}{list(out.shape)}, wants C-contiguous {self.dtype}{list(shape)}"
            )
        if not len(asked):
            return out
        into = np.frombuffer(out, np.uint8)
        if self._undisturbed() or self._resident(self._pieces(asked, views)):
            copy_all(self._mapped_rows(asked, views), into, self._pool, self._threads)
        else:
            read_all(self._pieces(asked, views), into.reshape(-1, self._row_bytes))
        return out

    def read_ahead(self, rows: Sequence[int] | Rows, views: Views = 0) -> None:
        """Start bringing rows that will be taken soon: a hint.

        From a local disk the kernel is asked for those that are not in memory; of a bucket the
        rows' shards are mirrored by threads, and this returns at once.
        """
        asked = np.asarray(rows, np.int64)
        if not self.mirrored:
            if not self._undisturbed():
                pieces = self._pieces(asked, views)
                if not self._resident(pieces):
                    for piece in pieces:
                        piece.shard.will_need(piece.inside)
            return
        for view, shard, _, _ in self._groups(asked, views):
            if (view, shard) not in self._patches or (view, shard) not in self._tables:
                will_need([self._file(view, shard, "rows"), self._file(view, shard, "patches")])

    def summaries(self, rows: Sequence[int] | Rows, views: Views = 0) -> npt.NDArray[np.float32]:
        """Return summaries as float32 [n, D]; NaN for invalid rows."""
        asked = np.asarray(rows, np.int64)
        out = np.empty((*asked.shape, self.store.spec.summary_dim), np.float32)
        for view, shard, places, inside in self._groups(asked, views):
            out[places] = self._tables.get(view, shard).summary[inside]
        return out

    def valid(self, rows: Sequence[int] | Rows, views: Views = 0) -> npt.NDArray[np.bool_]:
        """Return validity as bool [n]."""
        asked = np.asarray(rows, np.int64)
        out = np.empty(asked.shape, bool)
        for view, shard, places, inside in self._groups(asked, views):
            out[places] = self._tables.get(view, shard).valid[inside]
        return out

    def escapes(self, rows: Sequence[int] | Rows, views: Views = 0) -> Escapes:
        """Return the escaped tokens of a batch, by place in the batch; what decode wants."""
        asked = np.asarray(rows, np.int64)
        dim = self.store.spec.patch_dim
        parts, places_of = [Escapes.none(dim)], [0]
        if self.store.codec.has_escapes:
            for view, shard, places, inside in self._groups(asked, views):
                table = self._tables.get(view, shard)
                for place, local in zip(places, inside, strict=True):
                    if table.num_escapes[local]:
                        token, values = rows_table.escapes_of(table.table, local, dim)
                        parts.append(Escapes(np.zeros(len(token), np.int64), token, values))
                        places_of.append(place)
        return Escapes.joined(parts, places_of)

    def decoded(self, rows: Sequence[int] | Rows, views: Views = 0) -> npt.NDArray[np.float32]:
        """Return features as float32 [n, N, D], escapes put in; NaN for invalid rows."""
        out = self.store.codec.decode(self.take(rows, views), self.escapes(rows, views))
        out[~self.valid(rows, views)] = np.nan
        return out

    def view_digests(self, rows: Sequence[int] | Rows, views: Views = 0) -> list[str | None]:
        """Return the digest of each view's canvas, None where there was no canvas."""
        return self._texts("view_digest", rows, views)

    def reasons(self, rows: Sequence[int] | Rows, views: Views = 0) -> list[str | None]:
        """Return why each row is invalid, None where it is valid."""
        return self._texts("reason", rows, views)

    def parameters(self, rows: Sequence[int] | Rows, views: Views = 0) -> list[str | None]:
        """Return each view's parameters as JSON text."""
        return self._texts("parameters", rows, views)

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return sample ids, in the given order."""
        return self.store.samples.sample_ids(rows)

    def _texts(self, column: str, rows: Sequence[int] | Rows, views: Views) -> list[str | None]:
        asked = np.asarray(rows, np.int64)
        out: list[str | None] = [None] * len(asked)
        for view, shard, places, inside in self._groups(asked, views):
            values = self._tables.get(view, shard).table[column]
            for place, local in zip(places, inside, strict=True):
                out[place] = values[local].as_py()
        return out

    def _mapped_rows(self, rows: Rows, views: Views) -> list[Bytes]:
        """Return each row [row_bytes] of a batch where it is mapped.

        What runs between two gathers runs from cold caches: so few and plain steps.
        """
        per_shard = self.store.samples.rows_per_shard
        shards: dict[tuple[int, int], ShardRows] = {}
        found: list[Bytes] = []
        for row, view in self._each(rows, views):
            number, inside = divmod(row, per_shard)
            shard = shards.get((view, number))
            if shard is None:
                if (view, number) not in self._patches:
                    self._require(view, number, inside)
                shard = shards[view, number] = self._patches.get(view, number)
            try:
                found.append(shard.row(inside))
            except IndexError:
                self._require(view, number, inside)
                raise
        return found

    def _pieces(self, rows: Rows, views: Views) -> list[Piece]:
        """Find a batch's rows in their files."""
        return [
            Piece(self._patches.get(view, shard), inside, places)
            for view, shard, places, inside in self._groups(rows, views)
        ]

    def _undisturbed(self) -> bool:
        """Whether the last rows were in memory and no fault of this process went to disk since."""
        return self._faults == major_faults()

    def _resident(self, pieces: list[Piece]) -> bool:
        """Say whether a batch is in memory, as far as a few of its rows tell."""
        if not self._mapped:
            return False
        faults = major_faults()
        probes = pieces[:: max(1, len(pieces) // PROBES)]
        per_piece = max(1, PROBES // max(1, len(probes)))
        resident = all(
            piece.shard.is_resident(inside)
            for piece in probes
            for inside in piece.inside[:: max(1, len(piece.inside) // per_piece)]
        )
        self._faults = faults if resident else -1  # -1: the next batch is asked about too
        return resident

    def _groups(self, rows: Rows, views: Views) -> list[Group]:
        """Sort a batch's rows by shard; places rise inside each."""
        per_shard = self.store.samples.rows_per_shard
        groups: dict[tuple[int, int], Group] = {}
        for place, (row, view) in enumerate(self._each(rows, views)):
            shard, inside = divmod(row, per_shard)
            group = groups.get((view, shard))
            if group is None:
                group = groups[view, shard] = Group(view, shard, [], [])
            group.places.append(place)
            group.inside.append(inside)
        for group in groups.values():
            self._require(group.view, group.shard, max(group.inside))
        return list(groups.values())

    def _each(self, rows: Rows, views: Views) -> Iterable[tuple[int, int]]:
        """Return each row with its view, as plain integers."""
        if rows.ndim != 1:
            raise ValueError(f"rows: shape {rows.shape}, wants one dimension")
        if isinstance(views, int):
            return zip(rows.tolist(), repeat(views), strict=False)
        return zip(rows.tolist(), np.broadcast_to(views, len(rows)).tolist(), strict=True)

    def _require(self, view: int, shard: int, inside: int) -> None:
        """Refuse a row that the store does not have in that view."""
        if view not in self._position:
            raise MissingSamples(
                f"{self.store.directory}: view {view} was not opened, only {self.views}"
            )
        known = 0 <= shard < len(self._stops)
        if known and inside < self._lengths[self._position[view], shard]:
            return
        row = shard * self.store.samples.rows_per_shard + inside
        if not known or row >= self._stops[shard]:
            raise MissingSamples(f"{self.store.directory}: row {row} holds no sample")
        raise MissingSamples(
            f"{self.store.directory}: row {row} of view {view} is not built at manifest version "
            f"{self.version}; build the missing shards"
        )

    def _record(self, view: int, shard: int, column: str) -> int | str:
        position = int(self._records[self._position[view], shard])
        value: int | str = self._table[column][position].as_py()
        return value

    def _file(self, view: int, shard: int, kind: Kind) -> tuple[Path, int, str]:
        """Return one of a shard's files: path, size and sha256."""
        named = layout.patches_file if kind == "patches" else layout.rows_file
        num_bytes, sha256 = (
            self._record(view, shard, f"{kind}_{what}") for what in ("bytes", "sha256")
        )
        return named(self.store.directory, view, shard), int(num_bytes), str(sha256)

    def _check_samples(self, view: int, shard: int) -> None:
        """Refuse features of other samples than the dataset now has in these rows."""
        position = int(self._records[self._position[view], shard])
        if self._checked[position]:
            return
        if self._record(view, shard, "samples_digest") != self.store.samples.shard_digest(shard):
            raise StoreError(
                f"{self.store.directory}: view {view}, shard {shard} was made of other samples or "
                f"images than the dataset's table names; restore that table, or delete the store "
                f"and build again"
            )
        self._checked[position] = True

    def _use(self, view: int, shard: int, kind: Kind, use: Callable[[Path, int], T]) -> T:
        """Open one of a shard's files, given as path and size."""
        self._check_samples(view, shard)
        path, num_bytes, sha256 = self._file(view, shard, kind)
        try:
            return using(path, lambda local: use(local, num_bytes), num_bytes, sha256)
        except NotBuilt as error:
            raise Corrupt(f"{error}, though the manifest has it; build again") from error
        except WrongSize as error:
            raise Corrupt(f"{error}; build again") from error

    def _open_patches(self, view: int, shard: int) -> ShardRows:
        samples = self.store.samples
        sizes = samples.rows_per_shard, len(samples.shard_range(shard))
        rows_class = MappedRows if self._mapped else PositionedRows
        return self._use(
            view,
            shard,
            "patches",
            lambda path, num_bytes: rows_class(path, num_bytes, *sizes, self._fill),
        )

    def _open_table(self, view: int, shard: int) -> TableRows:
        path = layout.rows_file(self.store.directory, view, shard)
        content = self._use(view, shard, "rows", arrow_tables.map_file)
        try:
            table = arrow_tables.parse_table(content, str(path))
        except Corrupt as error:
            raise Corrupt(f"{error}; {AGAIN}") from error
        if table.schema != self.store.rows_schema:
            raise Corrupt(f"{path}: {table.schema.names} are no columns of rows; {AGAIN}")
        return TableRows(table)
