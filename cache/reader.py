"""Read a store by (row, view): mapped files, one copy into the caller's buffer.

A shard's index is parsed once when the shard is first touched; from then on a row costs one memory
copy. Maps are kept in a bounded least-recently-used set. Thread-safe.
"""

import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache import arrow_shard, arrow_tables, layout, zarr_shard
from cache.errors import Corrupt, MissingSamples, NotBuilt, StoreError
from cache.samples import Rows, ShardRange
from cache.store import Store

MAX_MAPS = 4096
"""Shards mapped at once, patches and rows each. The kernel allows 65,530 maps a process, and every
map holds a file descriptor (Python's mmap keeps one)."""

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]


class _Patches(NamedTuple):
    """One mapped shard: its rows [k, row_bytes], and each local row's slot (-1 absent)."""

    rows: Bytes
    slots: Rows
    dense: bool


class _Table:
    """One mapped table of rows; columns are unpacked on first use."""

    def __init__(self, table: pa.Table):
        self.table = table
        self.valid = arrow_shard.valid(table)
        self.summary = arrow_shard.summaries(table)


class _Recent(Generic[T]):
    """The most recently used values by key, made on demand."""

    def __init__(self, capacity: int, make: Callable[[int, int], T]):
        self._capacity, self._make = capacity, make
        self._values: OrderedDict[tuple[int, int], T] = OrderedDict()
        self._lock = Lock()

    def get(self, view: int, shard: int) -> T:
        key = (view, shard)
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
                return value
        value = self._make(view, shard)  # two threads may both make it; either is right
        with self._lock:
            self._values[key] = value
            while len(self._values) > self._capacity:
                self._values.popitem(last=False)  # unmapped when its last user lets go
        return value


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
        max_maps: int = MAX_MAPS,
    ):
        """Open a store for reading.

        Args:
            store: from `open_store`.
            views: how many views, from view 0, or which.
            version: manifest version to read; None is the newest.
            max_maps: bound of mapped shards.

        Raises:
            NotBuilt: one of the views has no shard in the manifest.
        """
        self.store = store
        self.views = list(range(views)) if isinstance(views, int) else sorted(set(views))
        manifest = store.manifest()
        self.version = manifest.version if version is None else version
        table = manifest.table(self.version)
        self._num_shards = -(-store.samples.num_rows // store.samples.rows_per_shard)
        self._digests: dict[int, pa.ChunkedArray] = {}
        self._records: dict[int, Rows] = {}
        view_column, shard_column = table["view"].to_numpy(), table["shard"].to_numpy()
        shared = np.ones(self._num_shards, bool)
        for view in self.views:
            of_view = np.flatnonzero(view_column == view)
            if not len(of_view):
                raise NotBuilt(f"{store.directory}: view {view} has no shard yet; build it first")
            record = np.full(self._num_shards, -1, np.int64)
            record[shard_column[of_view]] = of_view
            self._records[view] = record
            shared &= record >= 0
        self._shared = shared
        self._table = table
        self._checked = np.zeros(table.num_rows, bool)
        self.row_shape = store.row_shape
        self.dtype = store.codec.storage_dtype
        self._row_bytes = int(np.prod(self.row_shape)) * self.dtype.itemsize
        self._patches = _Recent(max_maps, self._map_patches)
        self._tables = _Recent(max_maps, self._map_table)

    def __len__(self) -> int:
        """Number of samples that are there in every view."""
        return sum(len(shard) for shard in self.shards())

    def shards(self) -> list[ShardRange]:
        """Shards that are there in every view, with their rows: what an epoch is ordered from."""
        return [shard for shard in self.store.samples.shards() if self._shared[shard.shard]]

    def take(
        self,
        rows: Sequence[int] | Rows,
        views: int | Sequence[int] | Rows = 0,
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
        asked, of_view = self._addresses(rows, views)
        shape = (len(asked), *self.row_shape)
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out: {out.dtype}{list(out.shape)}, wants C-contiguous {self.dtype}{list(shape)}"
            )
        into = out.reshape(len(asked), int(np.prod(self.row_shape))).view(np.uint8)
        for view, shard, places, inside in self._groups(asked, of_view):
            patches = self._patches.get(view, shard)
            slots = inside if patches.dense else patches.slots[inside]
            if not patches.dense and (slots < 0).any():
                self._fill(out, places[slots < 0])
                places, slots = places[slots >= 0], slots[slots >= 0]
            if len(places) > 1 and places[-1] - places[0] == len(places) - 1:
                target = into[places[0] : places[-1] + 1]
                np.take(patches.rows, slots, axis=0, out=target, mode="clip")
            else:
                for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
                    into[place] = patches.rows[slot]
        return out

    def summaries(
        self, rows: Sequence[int] | Rows, views: int | Sequence[int] | Rows = 0
    ) -> npt.NDArray[np.float32]:
        """Return summaries as float32 [n, D]; NaN for invalid rows."""
        asked, of_view = self._addresses(rows, views)
        out = np.empty((len(asked), self.store.spec.summary_dim), np.float32)
        for view, shard, places, inside in self._groups(asked, of_view):
            out[places] = self._tables.get(view, shard).summary[inside]
        return out

    def valid(
        self, rows: Sequence[int] | Rows, views: int | Sequence[int] | Rows = 0
    ) -> npt.NDArray[np.bool_]:
        """Return validity as bool [n]."""
        asked, of_view = self._addresses(rows, views)
        out = np.empty(len(asked), bool)
        for view, shard, places, inside in self._groups(asked, of_view):
            out[places] = self._tables.get(view, shard).valid[inside]
        return out

    def view_digests(
        self, rows: Sequence[int] | Rows, views: int | Sequence[int] | Rows = 0
    ) -> list[str | None]:
        """Return the digest of each view's canvas, None where there was no canvas."""
        return self._texts("view_digest", rows, views)

    def reasons(
        self, rows: Sequence[int] | Rows, views: int | Sequence[int] | Rows = 0
    ) -> list[str | None]:
        """Return why each row is invalid, None where it is valid."""
        return self._texts("reason", rows, views)

    def parameters(
        self, rows: Sequence[int] | Rows, views: int | Sequence[int] | Rows = 0
    ) -> list[str | None]:
        """Return each view's parameters as JSON text."""
        return self._texts("parameters", rows, views)

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return sample ids, in the given order."""
        return self.store.samples.sample_ids(rows)

    def _texts(
        self, column: str, rows: Sequence[int] | Rows, views: int | Sequence[int] | Rows
    ) -> list[str | None]:
        asked, of_view = self._addresses(rows, views)
        out: list[str | None] = [None] * len(asked)
        for view, shard, places, inside in self._groups(asked, of_view):
            values = self._tables.get(view, shard).table[column]
            for place, local in zip(places.tolist(), inside.tolist(), strict=True):
                out[place] = values[local].as_py()
        return out

    def _addresses(
        self, rows: Sequence[int] | Rows, views: int | Sequence[int] | Rows
    ) -> tuple[Rows, Rows]:
        asked = np.asarray(rows, np.int64)
        of_view = np.broadcast_to(np.asarray(views, np.int64), asked.shape)
        if asked.ndim != 1:
            raise ValueError(f"rows: shape {asked.shape}, wants one dimension")
        outside = (asked < 0) | (asked >= self.store.samples.num_rows)
        if outside.any():
            raise MissingSamples(
                f"{self.store.directory}: row {asked[outside][0]} is none of the dataset's "
                f"{self.store.samples.num_rows} rows"
            )
        return asked, of_view

    def _groups(self, rows: Rows, views: Rows) -> Iterator[tuple[int, int, Rows, Rows]]:
        """Yield (view, shard, places in the batch, rows inside the shard) of a batch."""
        shards, inside = np.divmod(rows, self.store.samples.rows_per_shard)
        key = views * self._num_shards + shards
        order = np.argsort(key, kind="stable")
        bounds = np.flatnonzero(np.diff(key[order], prepend=-1, append=-1))
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            places = order[start:stop]
            view, shard = int(views[places[0]]), int(shards[places[0]])
            self._require(view, shard, rows[places])
            yield view, shard, places, inside[places]

    def _require(self, view: int, shard: int, rows: Rows) -> None:
        """Refuse rows that are not in the manifest."""
        record = self._records.get(view)
        if record is None:
            raise MissingSamples(
                f"{self.store.directory}: view {view} was not opened, only {self.views}"
            )
        if record[shard] < 0:
            raise MissingSamples(
                f"{self.store.directory}: row {rows[0]} of view {view} is not built at manifest "
                f"version {self.version}; build the missing shards"
            )
        if rows.max() >= self.store.samples.shard_range(shard).stop:
            raise MissingSamples(f"{self.store.directory}: row {rows.max()} holds no sample")

    def _fill(self, out: npt.NDArray[np.generic], places: Rows) -> None:
        fill = self.store.codec.fill_value
        out[places] = np.nan if fill == "NaN" else fill

    def _record(self, view: int, shard: int, column: str) -> int | str:
        value: int | str = self._table[column][int(self._records[view][shard])].as_py()
        return value

    def _check_samples(self, view: int, shard: int) -> None:
        """Refuse features of other samples than the dataset now has in these rows."""
        position = int(self._records[view][shard])
        if self._checked[position]:
            return
        if self._record(view, shard, "samples_digest") != self.store.samples.shard_digest(shard):
            raise StoreError(
                f"{self.store.directory}: view {view}, shard {shard} was made of other samples or "
                f"images than the dataset's table names; restore that table or rebuild the store"
            )
        self._checked[position] = True

    def _map_patches(self, view: int, shard: int) -> _Patches:
        self._check_samples(view, shard)
        path = layout.patches_file(self.store.directory, view, shard)
        mapped = _map(path, int(self._record(view, shard, "patches_bytes")))
        tail = zarr_shard.index_bytes(self.store.samples.rows_per_shard)
        slots = zarr_shard.parse_index(
            mapped[len(mapped) - tail :].data, self._row_bytes, len(mapped), str(path)
        )
        num_rows = len(self.store.samples.shard_range(shard))
        dense = bool((slots[:num_rows] == np.arange(num_rows)).all())
        rows = mapped[: len(mapped) - tail].reshape(-1, self._row_bytes)
        return _Patches(rows, slots[:num_rows], dense)

    def _map_table(self, view: int, shard: int) -> _Table:
        self._check_samples(view, shard)
        path = layout.rows_file(self.store.directory, view, shard)
        table = arrow_tables.map_table(path)
        if table.schema != arrow_shard.schema(self.store.spec.summary_dim):
            raise Corrupt(f"{path}: columns {table.schema.names} are not those of a table of rows")
        return _Table(table)


def _map(path: Path, num_bytes: int) -> Bytes:
    """Map a whole file whose size is known."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise Corrupt(f"{path}: missing, though the manifest has it; build again") from error
    except ValueError as error:
        raise Corrupt(f"{path}: empty; build again") from error
    if len(mapped) != num_bytes:
        raise Corrupt(f"{path}: {len(mapped)} bytes, its record says {num_bytes}; build again")
    return np.frombuffer(mapped, np.uint8)
