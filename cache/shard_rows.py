"""The rows of one shard: its patches, mapped or read by position, and its table."""

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import NamedTuple, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import AGAIN, Corrupt, NotBuilt, WrongSize
from cache.files.mapped import Bytes, MappedFile, inode, open_to_read
from cache.files.place import ranges
from cache.format import arrow_tables, rows_table, zarr_shard
from cache.shard_ranges import Rows

SHARES = 2
"""Parts that each copying thread does of a batch, on average: what a late one leaves, others do."""
DISK_READS = 8
"""Rows read from a disk at once: a disk, local or not, is slow one by one."""


class ShardRows(Protocol):
    """What the reader asks of a shard; rows are numbered inside it, absent ones hold the fill."""

    def row(self, inside: int) -> Bytes:
        """Return one row [row_bytes]: a view of the map, where there is one.

        Raises:
            IndexError: the shard has no such row.
        """
        ...

    def read(self, inside: Sequence[int], into: Bytes, places: Sequence[int]) -> None:
        """Read rows [k] from the file to into[places], into being [n, row_bytes]."""
        ...

    def is_resident(self, inside: int) -> bool:
        """True if reading this row needs no disk, as far as its first page tells."""
        ...

    def will_need(self, inside: Sequence[int]) -> None:
        """Ask the kernel to start reading rows [k]."""
        ...


class TableRows:
    """One mapped table of rows, its columns as arrays."""

    def __init__(self, table: pa.Table):
        """Keep the columns that batches ask for as arrays."""
        self.table = table
        self.valid = rows_table.valid(table)
        self.summary = rows_table.summaries(table)
        self.sums = rows_table.checksums(table)
        if "escape_token" in table.schema.names:
            lengths = pc.list_value_length(table["escape_token"])
            self.num_escapes: npt.NDArray[np.int32] = arrow_tables.to_numpy(lengths)


class MappedRows:
    """Rows through a map: one memory copy each, nothing else, once pages are in memory."""

    row: Callable[[int], Bytes]

    def __init__(
        self, path: Path, num_bytes: int, rows_per_shard: int, table: TableRows, fill: Bytes
    ):
        """Map a shard file and parse its index; see `zarr_shard`.

        Args:
            path: the file.
            num_bytes: its size, as its record says.
            rows_per_shard: entries of its index.
            table: of the shard's rows: which there are, and what each shall give.
            fill: what an absent row holds, [row_bytes].

        Raises:
            Corrupt: it is not the shard that the table of rows is of.
        """
        self._file = MappedFile(path, num_bytes)
        content = self._file.bytes
        end = max(len(content) - zarr_shard.index_bytes(rows_per_shard), 0)
        self._file.will_need(end, len(content) - end)  # and no more: a fault would read megabytes
        self._index = _Index(path, content[end:].tobytes(), num_bytes, table, fill)
        stored = content[:end].reshape(-1, self._index.stored_bytes)
        # None refers to this object but weakly: in a circle, the map would outlive its last user.
        self.row = _FirstTouch(stored[:, : len(fill)], self._index, weakref.ref(self))

    def read(self, inside: Sequence[int], into: Bytes, places: Sequence[int]) -> None:
        """Read rows from the file itself, in large pieces; the map would fetch page by page."""
        try:
            handle = open_to_read(self._index.path)
        except NotBuilt:  # another process made room in the mirror
            handle = None
        if handle is not None:
            try:
                if inode(os.fstat(handle)) == self._file.inode:
                    self._index.read(handle, inside, into, places)
                    return
            finally:
                os.close(handle)
        for place, row in zip(places, inside, strict=True):  # gone, or built anew: the map has it
            into[place] = self.row(row)

    def is_resident(self, inside: int) -> bool:
        """Ask the kernel about the row's first page."""
        slot = int(self._index.slots[inside])
        return slot < 0 or self._file.is_resident(slot * self._index.stored_bytes)

    def will_need(self, inside: Sequence[int]) -> None:
        """Ask for whole rows at once; page faults would ask for a few pages at a time."""
        for offset in self._index.offsets(inside):
            self._file.will_need(offset, self._index.stored_bytes)


class _CopiedRows(ABC):
    """Rows that are read where they are wanted, and lie nowhere else in memory."""

    _index: "_Index"

    def row(self, inside: int) -> Bytes:
        """Read one row; `read` is what batches use."""
        row: Bytes = np.empty_like(self._index.fill)
        self.read([inside], row[None], [0])
        return row

    @abstractmethod
    def read(self, inside: Sequence[int], into: Bytes, places: Sequence[int]) -> None:
        """Read each row into its place."""

    def is_resident(self, inside: int) -> bool:
        """Return False: it is not known without reading, or far away."""
        return False


class PositionedRows(_CopiedRows):
    """Rows through pread: for file systems on which maps are slow (NFS, Lustre)."""

    def __init__(
        self, path: Path, num_bytes: int, rows_per_shard: int, table: TableRows, fill: Bytes
    ):
        """Open a shard file and parse its index; as `MappedRows`."""
        self._handle = open_to_read(path)
        weakref.finalize(self, os.close, self._handle)
        size = os.fstat(self._handle).st_size
        if size != num_bytes:
            raise WrongSize(f"{path}: {size} bytes, its record says {num_bytes}")
        tail_bytes = zarr_shard.index_bytes(rows_per_shard)
        tail = os.pread(self._handle, tail_bytes, max(size - tail_bytes, 0))
        self._index = _Index(path, tail, num_bytes, table, fill)

    def read(self, inside: Sequence[int], into: Bytes, places: Sequence[int]) -> None:
        """Read each row straight into its place."""
        self._index.read(self._handle, inside, into, places)

    def will_need(self, inside: Sequence[int]) -> None:
        """Ask for whole rows at once, so that the reads that follow overlap."""
        for offset in self._index.offsets(inside):
            size = self._index.stored_bytes
            os.posix_fadvise(self._handle, offset, size, os.POSIX_FADV_WILLNEED)


class RangedRows(_CopiedRows):
    """Rows by range out of a bucket, past the mirror: for who wants a few of a large shard."""

    def __init__(
        self, path: Path, num_bytes: int, rows_per_shard: int, table: TableRows, fill: Bytes
    ):
        """Fetch an object's index and parse it; as `MappedRows`."""
        self._path = path
        tail_bytes = zarr_shard.index_bytes(rows_per_shard)
        (tail,) = ranges(path, [max(num_bytes - tail_bytes, 0)], tail_bytes)
        self._index = _Index(path, tail, num_bytes, table, fill)

    def read(self, inside: Sequence[int], into: Bytes, places: Sequence[int]) -> None:
        """Fetch rows, each into its place, those that lie near each other by one request."""
        index = self._index
        offsets = index.offsets(inside)
        found = iter(ranges(self._path, offsets, len(index.fill)) if offsets else ())
        for place, row, slot in zip(places, inside, index.slots[inside].tolist(), strict=True):
            if slot < 0:
                into[place] = index.fill
                continue
            into[place] = np.frombuffer(next(found), np.uint8)
            index.check(into[place], row)

    def will_need(self, inside: Sequence[int]) -> None:
        """Do nothing: what is asked for comes at once."""


class Piece(NamedTuple):
    """Rows of a batch that lie in one shard: numbers [k] inside it, places [k] in the batch."""

    shard: ShardRows
    inside: Sequence[int]
    places: Sequence[int]


def mapped_rows(shards: Sequence[ShardRows], inside: Sequence[int]) -> list[Bytes]:
    """Return each row [row_bytes] of a batch [n] where it is mapped: its shard's, by number."""
    return [shard.row(number) for shard, number in zip(shards, inside, strict=True)]


class CopyingThreads:
    """Threads that copy beside the one that calls; all readers of a process share them.

    A ThreadPoolExecutor took a fifteenth of the time of a batch: a future has a lock and a
    condition, and what is made between two copies is made from cold caches.
    """

    def __init__(self) -> None:
        """Start none yet."""
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = Lock()
        self._count = 0

    def call(self, copy: Callable[[], None], count: int) -> None:
        """Have `copy` called by so many threads, whenever they come to it; wait for none."""
        if self._count < count:
            with self._lock:
                for number in range(self._count, count):
                    Thread(target=self._run, name=f"cache-copy-{number}", daemon=True).start()
                self._count = max(self._count, count)
        for _ in range(count):
            self._calls.put(copy)

    def _run(self) -> None:
        while True:
            self._calls.get()()


def copy_all(rows: Sequence[Bytes], into: Bytes, threads: int) -> None:
    """Copy mapped rows [row_bytes] into a batch [n * row_bytes], by so many threads.

    By few calls of numpy: a row of some 400 KB sweeps the processor's caches, so that what is done
    between two rows is done from memory. The calling thread is one of the threads, and no thread is
    waited for before it runs: waking one takes as long as copying a few rows.

    Args:
        rows: where they are mapped.
        into: the batch.
        threads: that copy.
    """
    if threads == 1:
        np.concatenate(rows, out=into)
        return
    share, row_bytes = -(-len(rows) // (threads * SHARES)), len(rows[0])
    starts = range(0, len(rows), share)
    left = iter(starts)
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def copy() -> None:
        for start in left:  # shared: each thread takes the next
            try:
                part = rows[start : start + share]
                begin = start * row_bytes
                np.concatenate(part, out=into[begin : begin + len(part) * row_bytes])
                done.put(None)
            except BaseException as error:  # the caller raises it: it waits for every share
                done.put(error)

    _copying().call(copy, threads - 1)
    copy()
    for _ in starts:
        if (error := done.get()) is not None:
            raise error


def read_all(pieces: Sequence[Piece], into: Bytes) -> None:
    """Read rows that are not in memory into a batch [n, row_bytes], DISK_READS at once."""
    share = -(-len(into) // DISK_READS)
    work = [
        Piece(shard, inside[start : start + share], places[start : start + share])
        for shard, inside, places in pieces
        for start in range(0, len(inside), share)
    ]
    list(_disk().map(lambda p: p.shard.read(p.inside, into, p.places), work))


@cache
def _disk() -> ThreadPoolExecutor:
    """Threads that wait for disks, one set a process."""
    return ThreadPoolExecutor(DISK_READS, "cache-disk")


@cache
def _copying() -> CopyingThreads:
    return CopyingThreads()


os.register_at_fork(after_in_child=_disk.cache_clear)  # a child has none of the threads
os.register_at_fork(after_in_child=_copying.cache_clear)


class _Index:
    """Where a shard file has its rows, and what each of them shall be.

    Attributes:
        path: of the file, for errors.
        slots: int64 [rows], place of each row in the file; -1 where absent.
        stored_bytes: of one row in the file.
        fill: what an absent row holds, [row_bytes].
    """

    def __init__(self, path: Path, tail: bytes, num_bytes: int, table: TableRows, fill: Bytes):
        """Parse the index, the last bytes of the file.

        Raises:
            Corrupt: the file is damaged, or not the shard that the table of rows is of.
        """
        self.path, self.fill = path, fill
        self.stored_bytes = zarr_shard.stored_bytes(len(fill))
        slots = zarr_shard.parse_index(tail, len(fill), num_bytes, str(path))
        self.slots = slots[: len(table.valid)]
        self._sums = table.sums
        if not np.array_equal(self.slots >= 0, table.valid):
            raise Corrupt(
                f"{path}: the rows in its index are not the valid rows of its table: the file was "
                f"exchanged for another; {AGAIN}"
            )

    def offsets(self, inside: Sequence[int]) -> list[int]:
        """Return where those of rows [k] that are stored begin in the file, bytes."""
        slots = self.slots[inside]
        offsets: list[int] = (slots[slots >= 0] * self.stored_bytes).tolist()
        return offsets

    def check(self, row: Bytes, inside: int) -> None:
        """Compare a row [row_bytes] with the crc32c that its table of rows has."""
        if google_crc32c.value(row) != self._sums[inside]:
            raise Corrupt(
                f"{self.path}: row {inside} of the shard does not match its crc32c: the file was "
                f"damaged, or exchanged for another; {AGAIN}"
            )

    def read(self, handle: int, inside: Sequence[int], into: Bytes, places: Sequence[int]) -> None:
        """Read each row straight into its place and check it; the fill where there is none."""
        for place, row, slot in zip(places, inside, self.slots[inside].tolist(), strict=True):
            if slot < 0:
                into[place] = self.fill
                continue
            rest, offset = into[place].data, slot * self.stored_bytes
            while len(rest):
                count = os.preadv(handle, [rest], offset)
                if not count:
                    raise Corrupt(f"{self.path}: was cut while it was read; {AGAIN}")
                rest, offset = rest[count:], offset + count
            self.check(into[place], row)


class _FirstTouch:
    """Rows of a map, each compared with its crc32c when it is first asked for.

    At every read that would cost twice the copy (docs/log.md). Once all rows are checked the shard
    gets the plain way back; a shard that is mapped anew is checked anew.

    Args:
        rows: as stored, uint8 [stored rows, row_bytes].
        index: of the shard.
        owner: whose `row` this is.
    """

    def __init__(self, rows: Bytes, index: _Index, owner: "weakref.ref[MappedRows]") -> None:
        slots = index.slots
        dense = len(rows) == len(slots) and (slots == np.arange(len(slots))).all()
        self._plain = rows.__getitem__ if dense else partial(_row, rows, slots, index.fill)
        self._index, self._owner = index, owner
        self._pending = bytearray((slots >= 0).tobytes())
        self._left = sum(self._pending)

    def __call__(self, inside: int) -> Bytes:
        """Return a row [row_bytes].

        Raises:
            Corrupt: it is not what was written.
        """
        row: Bytes = self._plain(inside)
        if self._pending[inside]:
            self._index.check(row, inside)
            self._pending[inside] = 0
            self._left -= 1
        # Threads that check one row at once count it twice: look again before letting go.
        if self._left <= 0 and not any(self._pending):
            owner = self._owner()
            if owner is not None:
                owner.row = self._plain
        return row


def _row(stored: Bytes, slots: Rows, fill: Bytes, inside: int) -> Bytes:
    """Return one row [row_bytes] of a shard that does not hold every row."""
    slot = int(slots[inside])
    row: Bytes = fill if slot < 0 else stored[slot]
    return row
