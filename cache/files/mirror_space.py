"""The room of a mirror: its copies added up and searched, the least recently opened evicted.

`claim` takes room for a file to be filled, `full` says that there is none. All processes that share
the folder agree by one lock (`locks/room`) and one file that every eviction touches (`EVICTED`).
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from filelock import FileLock

from cache.errors import StoreError
from cache.files import atomic, mapped
from cache.files.bucket import BucketPath

FOLDER_VARIABLE = "EUPE_MIRROR"
BYTES_VARIABLE = "EUPE_MIRROR_BYTES"
SHARE_OF_DISK = 0.9
"""Of what the disk has free or already mirrored, where BYTES_VARIABLE is not set."""
SPARE_SHARE = 0.05
"""Evicted beyond need, so that a full mirror is not searched through for every object."""
SEARCH_SHARE = 0.05
"""Of the time may go into adding up the folder; in between, this process's own fills are added."""
ABANDONED_SECONDS = 1800.0
"""A fill that nobody has written to for so long: twice what one request may take."""
POLL_SECONDS = 0.02
NAME_DIGITS = 2
"""Copies are spread over 256 folders."""


class Copy(NamedTuple):
    """A file of the folder as one search saw it; sorted, those to evict first come first.

    Attributes:
        awaited: True if a hint brought it and nobody has opened it yet.
        opened_ns: when it was last opened.
        num_bytes: its size.
        path: where it lies.
        inode: device and inode, as maps know it.
    """

    awaited: bool
    opened_ns: int
    num_bytes: int
    path: str
    inode: tuple[int, int]


class Space:
    """The bounded folder of a mirror.

    Attributes:
        folder: where the copies lie.
        max_bytes: bound of all copies, those being filled included.
    """

    def __init__(self, folder: Path, max_bytes: int | None):
        """Add up what is there.

        Args:
            folder: of the mirror, with its folders `fill` and `locks`.
            max_bytes: bound; None: SHARE_OF_DISK.
        """
        self.folder = folder
        self._lock = Lock()
        self._awaited: set[str] = set()
        self._total, self._search_again = 0, 0.0
        self._evicted_ns = self._last_eviction()
        atomic.sweep(folder / "fill", ABANDONED_SECONDS)
        if max_bytes is None:
            disk = os.statvfs(folder)
            there = sum(copy.num_bytes for copy in self.search())
            max_bytes = int(SHARE_OF_DISK * (disk.f_bavail * disk.f_frsize + there))
        self.max_bytes = max_bytes

    def opened(self, copy: Path) -> None:
        """Note that a copy is used now.

        Raises:
            FileNotFoundError: there is no such copy.
        """
        os.utime(copy, ns=(time.time_ns(), os.stat(copy).st_mtime_ns))
        with self._lock:
            self._awaited.discard(str(copy))

    def awaits(self, copy: Path) -> None:
        """Note that a hint brings this copy: until it is opened, other hints do not evict it."""
        with self._lock:
            self._awaited.add(str(copy))

    def claim(self, path: BucketPath, num_bytes: int, hint: bool) -> Path | None:
        """Make room for an object and take it with a file of full size.

        Args:
            path: the object, for the error.
            num_bytes: its size.
            hint: True if it will be asked for later; None is returned where it finds no room.

        Raises:
            StoreError: there is no room to be had.
        """
        temporary = self.folder / "fill" / atomic.temporary_name("fill")
        target, disk_full = self.max_bytes, False
        while True:
            with FileLock(self.folder / "locks" / "room", poll_interval=POLL_SECONDS):
                if self._make_room(num_bytes, target, hint):
                    try:
                        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                        try:
                            os.posix_fallocate(handle, 0, max(num_bytes, 1))
                            os.ftruncate(handle, num_bytes)
                        finally:
                            os.close(handle)
                        self._total += num_bytes
                        return temporary
                    except OSError as error:
                        temporary.unlink(missing_ok=True)
                        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or disk_full:
                            why = error.strerror or str(error)
                            raise self.full(path, num_bytes, why) from error
                        # Others fill this disk too: evict as much as is wanted, and try once more.
                        target, disk_full = min(self._total, self.max_bytes), True
                        self._search_again = 0.0
                        continue
                filling = bool(os.listdir(self.folder / "fill"))
            if hint:
                return None
            if not filling or num_bytes > self.max_bytes:
                why = "its disk is full" if disk_full else f"it may hold {self.max_bytes} bytes"
                raise self.full(path, num_bytes, why)
            atomic.sweep(self.folder / "fill", ABANDONED_SECONDS)
            time.sleep(POLL_SECONDS)  # what others are filling can be evicted soon

    def _make_room(self, num_bytes: int, target: int, hint: bool) -> bool:
        """Evict copies until `num_bytes` fit. Returns False if they cannot.

        Call with the room lock held.
        """
        started = time.monotonic()
        if self._total + num_bytes <= target and started < self._search_again:
            return True
        while True:
            copies = self.search()
            now = time.monotonic()
            self._search_again = now + (now - started) / SEARCH_SHARE
            self._total = sum(copy.num_bytes for copy in copies)
            over = self._total + num_bytes - target
            if over <= 0:
                return True
            if num_bytes > self.max_bytes:
                return False
            live = mapped.live_inodes()
            free = [c for c in copies if c.inode not in live and not (hint and c.awaited)]
            spare = 0 if hint or target < self.max_bytes else int(SPARE_SHARE * self.max_bytes)
            self._evict(free, over + spare)
            if self._total + num_bytes <= target:
                return True
            if hint or not mapped.let_go():
                return False

    def search(self) -> list[Copy]:
        """List all copies, those being filled included.

        Fills come first: what is renamed meanwhile may be seen twice, which its inode tells, but
        it is never missed.
        """
        with self._lock:
            awaited = set(self._awaited)
        copies: dict[tuple[int, int], Copy] = {}
        for folder in self._folders():
            for file in os.scandir(folder):
                try:
                    status = file.stat()
                except FileNotFoundError:
                    continue
                inode = status.st_dev, status.st_ino
                copies[inode] = Copy(
                    file.path in awaited, status.st_atime_ns, status.st_size, file.path, inode
                )
        return list(copies.values())

    def _folders(self) -> Iterator[str]:
        """Yield the folders that hold copies, that of fills first."""
        yield str(self.folder / "fill")
        for part in os.scandir(self.folder):
            if len(part.name) == NAME_DIGITS and part.is_dir():
                yield part.path

    def _evict(self, copies: list[Copy], num_bytes: int) -> None:
        """Delete the least recently opened copies until so many bytes are freed."""
        freed = 0
        fill = f"{self.folder / 'fill'}{os.sep}"
        for copy in sorted(copies):
            if freed >= num_bytes:
                break
            if copy.path.startswith(fill):
                continue
            Path(copy.path).unlink(missing_ok=True)
            with self._lock:
                self._awaited.discard(copy.path)
            freed += copy.num_bytes
        if freed:
            (self.folder / "EVICTED").touch()
            self._evicted_ns = self._last_eviction()
        self._total -= freed

    def _last_eviction(self) -> int:
        with suppress(FileNotFoundError):
            return os.stat(self.folder / "EVICTED").st_mtime_ns
        return 0

    def notice_evictions(self) -> None:
        """Unmap what has not been used for long if another process evicts: it may be among it."""
        last = self._last_eviction()
        if last != self._evicted_ns:
            self._evicted_ns = last
            mapped.let_go()

    def full(self, path: BucketPath, num_bytes: int, why: str) -> StoreError:
        """Say that an object has no room."""
        return StoreError(
            f"{self.folder}: the mirror has no room for {num_bytes} more bytes of {path} "
            f"({why}, and all that is there is in use); raise {BYTES_VARIABLE}, or name a folder "
            f"on a larger disk in {FOLDER_VARIABLE}"
        )
