"""Files mapped into memory, with what the standard mmap lacks: no descriptor kept, residency asked.

Python's mmap keeps a file descriptor open for as long as the map lives; with the usual limit of
1024 descriptors a store of a few hundred shards would exhaust them. The kernel allows 65,530 maps.
"""

import ctypes
import mmap
import os
import resource
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from cache.errors import Corrupt, NotBuilt, StoreError

Bytes = npt.NDArray[np.uint8]
T = TypeVar("T")

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
    """

    def __init__(self, path: Path, num_bytes: int | None = None):
        """Map a file.

        Args:
            path: the file.
            num_bytes: the size it must have, if known. A shorter file must not be mapped: reading
                past its end would kill the process.

        Raises:
            NotBuilt: there is no such file.
            Corrupt: it is empty or has another size.
            StoreError: it cannot be mapped.
        """
        try:
            handle = os.open(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotBuilt(f"{path}: no such file") from error
        except OSError as error:
            raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            status = os.fstat(handle)
            size = status.st_size
            if size == 0 or num_bytes not in (None, size):
                wanted = "more than none" if num_bytes is None else f"{num_bytes}"
                raise Corrupt(f"{path}: {size} bytes, its record says {wanted}; build again")
            address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        finally:
            os.close(handle)
        if address == _FAILED:
            reason = os.strerror(ctypes.get_errno())
            raise StoreError(f"{path}: cannot be mapped: {reason}")
        self._region = _Region(address, size, (status.st_dev, status.st_ino))
        self.bytes: Bytes = np.asarray(self._region)

    def is_resident(self, offset: int) -> bool:
        """Whether the page at an offset is in memory; True where the kernel does not tell."""
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        told = ctypes.create_string_buffer(1)
        failed = _libc.mincore(self._region.address + page, 1, told)
        return bool(failed) or bool(told.raw[0] & 1)

    def will_need(self, offset: int, num_bytes: int) -> None:
        """Ask the kernel to start reading a range; a hint, so a refusal does not matter."""
        page = offset // mmap.PAGESIZE * mmap.PAGESIZE
        length = offset + num_bytes - page
        _libc.madvise(self._region.address + page, length, mmap.MADV_WILLNEED)


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
    """Forget the less recently used half of what every `Recent` keeps; whether there was any.

    Files are unmapped as soon as nobody reads them; mapping one again takes microseconds.
    """
    return any([recent.forget_half() for recent in list(_recents)])


class Recent(Generic[T]):
    """The most recently used values by (view, shard), made on demand. Thread-safe."""

    def __init__(self, capacity: int, make: Callable[[int, int], T]):
        """Keep `capacity` values; `make(view, shard)` gives one that is not there."""
        self._capacity, self._make = capacity, make
        self._values: OrderedDict[tuple[int, int], T] = OrderedDict()
        self._lock = Lock()
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
            while len(self._values) > self._capacity:
                self._values.popitem(last=False)  # freed when its last user lets go
        return value

    def forget_half(self) -> bool:
        """Forget the older half; whether there was anything."""
        with self._lock:
            count = (len(self._values) + 1) // 2
            for _ in range(count):
                self._values.popitem(last=False)
        return count > 0


_recents: WeakSet[Recent[Any]] = WeakSet()
