"""The rows of one shard: its patches, mapped or read by position, and its table."""

import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache import arrow_shard, arrow_tables, zarr_shard
from cache.errors import Corrupt, NotBuilt
from cache.mapped import Bytes, MappedFile
from cache.samples import Rows

DISK_READS = 4
"""Rows read from a disk at once: a disk, local or not, is slow one by one."""


class ShardRows(Protocol):
    """What the reader asks of a shard.

    Attributes:
        slots: int64 [rows of the shard], each row's place in the file; -1 for absent rows.
        dense: whether row n is at place n, for all of them.
    """

    slots: Rows
    dense: bool

    def copy(self, slots: Rows, into: Bytes, places: Rows) -> None:
        """Copy slots [k] to into[places], places rising, into being [n, row_bytes]."""
        ...

    def read(self, slots: Rows, into: Bytes, places: Rows) -> None:
        """Do what `copy` does, for rows that are not in memory."""
        ...

    def is_resident(self, slot: int) -> bool:
        """Whether reading this slot needs no disk, as far as its first page tells."""
        ...

    def will_need(self, slots: Rows) -> None:
        """Ask the kernel to start reading slots [k]."""
        ...


class MappedRows:
    """Rows through a map: one memory copy each, nothing else, once pages are in memory."""

    def __init__(
        self, path: Path, num_bytes: int, rows_per_shard: int, num_rows: int, row_bytes: int
    ):
        """Map a shard file and parse its index; see `zarr_shard`."""
        self._path, self._file = path, MappedFile(path, num_bytes)
        content = self._file.bytes
        end = len(content) - zarr_shard.index_bytes(rows_per_shard)
        self.slots, self.dense = _parse(
            content[max(end, 0) :].tobytes(), num_bytes, num_rows, row_bytes, path
        )
        self._row_bytes = row_bytes
        self._rows = content[:end].reshape(-1, row_bytes)

    def copy(self, slots: Rows, into: Bytes, places: Rows) -> None:
        """Copy rows; one call of numpy where they are neighbours in the buffer."""
        if len(places) > 1 and places[-1] - places[0] == len(places) - 1:
            target = into[places[0] : places[-1] + 1]
            # Any mode but "raise" lets numpy write straight into out; slots come from the index.
            np.take(self._rows, slots, axis=0, out=target, mode="clip")
        else:
            for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
                into[place] = self._rows[slot]

    def read(self, slots: Rows, into: Bytes, places: Rows) -> None:
        """Read rows from the file itself, in large pieces; the map would fetch page by page."""
        try:
            handle = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:  # another process made room in the mirror; the map still holds it
            self.copy(slots, into, places)
            return
        try:
            _read(handle, slots, into, places, self._row_bytes, self._path)
        finally:
            os.close(handle)

    def is_resident(self, slot: int) -> bool:
        """Ask the kernel about the row's first page."""
        return self._file.is_resident(slot * self._row_bytes)

    def will_need(self, slots: Rows) -> None:
        """Ask for whole rows at once; page faults would ask for a few pages at a time."""
        for slot in slots.tolist():
            self._file.will_need(slot * self._row_bytes, self._row_bytes)


class PositionedRows:
    """Rows through pread: for file systems on which maps are slow (NFS, Lustre)."""

    def __init__(
        self, path: Path, num_bytes: int, rows_per_shard: int, num_rows: int, row_bytes: int
    ):
        """Open a shard file and parse its index; see `zarr_shard`."""
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise NotBuilt(f"{path}: no such file") from error
        weakref.finalize(self, os.close, self._handle)
        self._path, self._row_bytes = path, row_bytes
        size = os.fstat(self._handle).st_size
        if size != num_bytes:
            raise Corrupt(f"{path}: {size} bytes, its record says {num_bytes}; build again")
        tail_bytes = zarr_shard.index_bytes(rows_per_shard)
        tail = os.pread(self._handle, tail_bytes, max(size - tail_bytes, 0))
        self.slots, self.dense = _parse(tail, num_bytes, num_rows, row_bytes, path)

    def copy(self, slots: Rows, into: Bytes, places: Rows) -> None:
        """Read each row straight into its place."""
        _read(self._handle, slots, into, places, self._row_bytes, self._path)

    read = copy

    def is_resident(self, slot: int) -> bool:
        """Not known without reading: hints are always given, one system call a row."""
        return False

    def will_need(self, slots: Rows) -> None:
        """Ask for whole rows at once, so that the reads that follow overlap."""
        for slot in slots.tolist():
            offset = slot * self._row_bytes
            os.posix_fadvise(self._handle, offset, self._row_bytes, os.POSIX_FADV_WILLNEED)


class TableRows:
    """One mapped table of rows, its columns as arrays."""

    def __init__(self, table: pa.Table):
        """Keep the columns that batches ask for as arrays."""
        self.table = table
        self.valid = arrow_shard.valid(table)
        self.summary = arrow_shard.summaries(table)
        if "escape_token" in table.schema.names:
            lengths = pc.list_value_length(table["escape_token"])
            self.num_escapes: npt.NDArray[np.int32] = arrow_tables.to_numpy(lengths)


class Piece(NamedTuple):
    """Rows of a batch that lie in one shard: slots [k] there, places [k] in the batch."""

    shard: ShardRows
    slots: Rows
    places: Rows


def copy_all(
    pieces: Sequence[Piece], into: Bytes, pool: ThreadPoolExecutor | None, threads: int
) -> None:
    """Copy rows that are in memory into a batch [n, row_bytes], by so many threads of a pool."""
    if pool is None:
        for piece in pieces:
            piece.shard.copy(piece.slots, into, piece.places)
    else:
        work = _split(pieces, -(-len(into) // threads))
        list(pool.map(lambda p: p.shard.copy(p.slots, into, p.places), work))


def read_all(pieces: Sequence[Piece], into: Bytes) -> None:
    """Read rows that are not in memory into a batch [n, row_bytes], DISK_READS at once."""
    work = _split(pieces, -(-len(into) // DISK_READS))
    list(_disk().map(lambda p: p.shard.read(p.slots, into, p.places), work))


def _split(pieces: Sequence[Piece], num_rows: int) -> list[Piece]:
    """Cut pieces so that none has more than num_rows rows."""
    return [
        Piece(shard, slots[start : start + num_rows], places[start : start + num_rows])
        for shard, slots, places in pieces
        for start in range(0, len(slots), num_rows)
    ]


@cache
def _disk() -> ThreadPoolExecutor:
    """Threads that wait for disks, one set a process."""
    return ThreadPoolExecutor(DISK_READS, "cache-disk")


os.register_at_fork(after_in_child=_disk.cache_clear)


def _read(handle: int, slots: Rows, into: Bytes, places: Rows, row_bytes: int, path: Path) -> None:
    """Read each row straight into its place."""
    for place, slot in zip(places.tolist(), slots.tolist(), strict=True):
        rest, offset = into[place].data, slot * row_bytes
        while len(rest):
            count = os.preadv(handle, [rest], offset)
            if not count:
                raise Corrupt(f"{path}: was cut while it was read; build again")
            rest, offset = rest[count:], offset + count


def _parse(
    tail: bytes, num_bytes: int, num_rows: int, row_bytes: int, path: Path
) -> tuple[Rows, bool]:
    slots = zarr_shard.parse_index(tail, row_bytes, num_bytes, str(path))[:num_rows]
    return slots, bool((slots == np.arange(num_rows)).all())
