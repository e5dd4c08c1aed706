"""Memory-mapped files and the maps that a process keeps.

Unlike Python's mmap these maps hold no file descriptor, and can tell whether a page is already in
memory. With the usual limit of 1024 descriptors a store of a few hundred shards would exhaust them.
The kernel allows 65,530 maps a process, so the bound is the process's, not that of each reader.
"""

import ctypes
import errno
import mmap
import os
import resource
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any, Generic, Literal, TypeVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from cache.errors import NotBuilt, StoreError, WrongSize

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")
MAX_MAPS = 32_768
"""Files that all readers of a process keep mapped: half of the 65,530 maps it may have."""
MAX_OPEN = 4096
"""Files that they keep open for positioned reads: all that a shuffle buffer is waiting in, of 256
lanes and several stores, at one and a half shards a lane; less where descriptors are fewer."""
SHARE_OF_DESCRIPTORS = 4
"""One of so many may be theirs."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_FAILED = ctypes.c_void_p(-1).value


class MappedFile:
    """A whole file mapped for reading; unmapped when the last view of it is gone.

    Attributes:
        bytes: its contents, uint8 [file size]; every view of it keeps the map alive.
        inode: (device, inode) of what is mapped, whatever has its name by now.
    """

    def __init__(self, path: Path, num_bytes: int | None = None):
        """Map a file.

        Args:
            path: the file.
            num_bytes: the size it must have, if known. A shorter file must not be mapped: reading
                past its end would kill the process.

        Raises:
            NotBuilt: there is no such file.
            WrongSize: it is empty or has another size.
            StoreError: it cannot be mapped.
        """
        handle = open_to_read(path)
        try:
            status = os.fstat(handle)
            size = status.st_size
            if size == 0 or num_bytes not in (None, size):
                wanted = "more than none" if num_bytes is None else f"{num_bytes}"
                raise WrongSize(f"{path}: {size} bytes, its record says {wanted}")
            address, failed = _map(size, handle)
            if failed == errno.ENOMEM and let_go():
                address, failed = _map(size, handle)
        finally:
            os.close(handle)
        if failed:
            raise StoreError(
                f"{path}: cannot be mapped: {os.strerror(failed)}; {len(live_inodes())} files are, "
                f"and `sysctl vm.max_map_count` and `ulimit -v` say how many may be"
            )
        self.inode = inode(status)
        self._region = _Region(address, size, self.inode)
        self.bytes: Bytes = np.asarray(self._region)

    def is_resident(self, offset: int) -> bool:
        """True if the page at an offset is in memory, or the kernel does not tell."""
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        told = ctypes.create_string_buffer(1)
        failed = _libc.mincore(self._region.address + page, 1, told)
        return bool(failed) or bool(told.raw[0] & 1)

    def forget(self) -> None:
        """Leave to the kernel what was read once; its pages come back when they are touched."""
        _libc.madvise(self._region.address, len(self.bytes), mmap.MADV_DONTNEED)

    def will_need(self, offset: int, num_bytes: int) -> None:
        """Ask the kernel to start reading a range; a hint, so a refusal does not matter."""
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = offset + num_bytes - page
        _libc.madvise(self._region.address + page, length, mmap.MADV_WILLNEED)


def open_to_read(path: Path) -> int:
    """Open a file and return its descriptor; where there are no more, others are closed first.

    Raises:
        NotBuilt: there is no such file.
        StoreError: it cannot be opened.
    """
    try:
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno != errno.EMFILE or not let_go():
                raise
            return os.open(path, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotBuilt(f"{path}: no such file") from error
    except OSError as error:
        advice = "; raise `ulimit -n`" if error.errno == errno.EMFILE else ""
        raise StoreError(f"{path}: cannot be opened: {error.strerror}{advice}") from error


def inode(status: os.stat_result) -> tuple[int, int]:
    """Return device and inode: which file it is, whatever its name."""
    return status.st_dev, status.st_ino


def _map(size: int, handle: int) -> tuple[int, int]:
    """Map a whole file: its address, or what went wrong (0 if nothing did)."""
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
    return address, ctypes.get_errno() if address == _FAILED else 0


class _Region:
    """Owns the mapped addresses; numpy keeps it alive as the base of its views."""

    def __init__(self, address: int, size: int, inode: tuple[int, int]):
        self.address, self.size, self.inode = address, size, inode
        with _regions_lock:
            _regions.add(self)
        self.__array_interface__ = {
            "version": 3,
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, True),
        }

    def __del__(self) -> None:
        _libc.munmap(self.address, self.size)


_regions: WeakSet[_Region] = WeakSet()
_regions_lock = Lock()


def live_inodes() -> set[tuple[int, int]]:
    """Return (device, inode) of every file that this process maps."""
    with _regions_lock:
        return {region.inode for region in _regions}


def major_faults() -> int:
    """Count page faults of this process that went to a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def let_go() -> bool:
    """Forget the less recently used half of what every `Recent` keeps. False if it kept nothing.

    Files are unmapped as soon as nobody reads them; mapping one again takes microseconds.
    """
    return any([recent.forget((len(recent) + 1) // 2) for recent in _all_recent()])


@cache
def _most_open() -> int:
    """Return how many descriptors may be for files that are kept open.

    The limit of this process is raised as far as it may be, and wants to be: 1024 is usual, and is
    meant for programs that still use select(2).
    """
    wanted = SHARE_OF_DESCRIPTORS * MAX_OPEN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted:
        soft = wanted if hard < 0 else min(wanted, hard)
        with suppress(OSError, ValueError):  # not everywhere may a process do so
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted // SHARE_OF_DESCRIPTORS if soft < 0 else soft // SHARE_OF_DESCRIPTORS


class Recent(Generic[T]):
    """The most recently used values by (view, shard), made on demand. Thread-safe.

    All of a process share one bound: beyond it the one that keeps most forgets its oldest.
    """

    def __init__(self, make: Callable[[int, int], T], holds: Literal["map", "descriptor"]):
        """Keep what `make(view, shard)` gives; each value holds one map or one descriptor."""
        self.holds = holds
        self._make = make
        self._values: OrderedDict[tuple[int, int], T] = OrderedDict()
        self._lock = Lock()
        with _recents_lock:
            _recents.add(self)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._values

    def get(self, view: int, shard: int) -> T:
        """Return the value of a shard."""
        key = (view, shard)
        try:  # without the lock: another thread may forget it at any moment
            self._values.move_to_end(key)
            return self._values[key]
        except KeyError:
            pass
        value = self._make(view, shard)  # two threads may both make it; either is right
        with self._lock:
            self._values[key] = value
        self._keep_bound()
        return value

    def all(self, keys: Sequence[tuple[int, int]]) -> list[T]:
        """Return the value of each (view, shard), [n]; many may be of the same shard.

        What runs between two copies of a batch runs from cold caches: so no step here is Python's.
        """
        try:
            deque(map(self._values.move_to_end, keys), maxlen=0)
            return list(map(self._values.__getitem__, keys))
        except KeyError:
            return [self.get(*key) for key in keys]

    def drop(self, view: int, shard: int) -> None:
        """Forget the value of a shard, so that it is made anew."""
        with self._lock:
            self._values.pop((view, shard), None)

    def forget(self, count: int) -> bool:
        """Forget so many of the oldest. Returns False if there were none."""
        with self._lock:
            count = min(count, len(self._values))
            for _ in range(count):
                self._values.popitem(last=False)  # freed when its last user lets go
        return count > 0

    def _keep_bound(self) -> None:
        bound = MAX_MAPS if self.holds == "map" else min(MAX_OPEN, _most_open())
        alike = [recent for recent in _all_recent() if recent.holds == self.holds]
        while sum(map(len, alike)) > bound:
            max(alike, key=len).forget(1)


def _all_recent() -> list[Recent[Any]]:
    with _recents_lock:
        return list(_recents)


_recents: WeakSet[Recent[Any]] = WeakSet()
_recents_lock = Lock()
