"""The room of a mirror: its copies added up and searched, the least recently opened evicted.

`claim` takes room for a file to be filled, `full` says that there is none. All processes that share
the folder agree by one lock (`locks/room`) and one file that every eviction touches (`EVICTED`).

Who may share it says the folder's own mode: what is made in it may be read and written by the same,
whatever a user's umask is. Copies that a user may not delete are not evicted by him.
"""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from filelock import FileLock, Timeout

from cache.errors import Busy, StoreError
from cache.files import atomic, mapped
from cache.files.bucket_path import BucketPath
from cache.files.refused import FULL, reason

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
            folder: of the mirror; what it wants in it is made.
            max_bytes: bound; None: SHARE_OF_DISK.

        Raises:
            StoreError: it cannot be made.
        """
        self.folder = folder
        self._lock = Lock()
        self._awaited: set[str] = set()
        self._total, self._search_again = 0, 0.0
        self._evicted_ns = self._last_eviction()
        self._mode = stat.S_IMODE(os.stat(folder).st_mode)
        for name in ("fill", "locks", "scratch"):
            self.make_folder(folder / name)
        atomic.sweep(folder / "fill", ABANDONED_SECONDS)
        if max_bytes is None:
            disk = os.statvfs(folder)
            there = sum(copy.num_bytes for copy in self.search())
            max_bytes = int(SHARE_OF_DISK * (disk.f_bavail * disk.f_frsize + there))
        self.max_bytes = max_bytes

    def make_folder(self, folder: Path) -> None:
        """Make a folder in the mirror, for all who share it.

        Raises:
            StoreError: it cannot be made.
        """
        if folder.is_dir():
            return
        try:
            folder.mkdir()
            os.chmod(folder, self._mode)
        except FileExistsError:
            pass
        except OSError as error:
            raise self.refused(error) from error

    @contextmanager
    def locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """Be the one process that has a lock of the mirror.

        Args:
            name: of the lock.
            wait: until whoever has it lets go.

        Raises:
            Busy: somebody has it, and `wait` is False.
            StoreError: there is none to be had, because the folder cannot be written, say.
        """
        path = self.folder / "locks" / name
        lock = FileLock(
            path, mode=self._mode & 0o666, poll_interval=POLL_SECONDS, fallback_to_soft=False
        )
        try:
            lock.acquire(blocking=wait)
        except Timeout as error:
            raise Busy(f"{path}: another process has it") from error
        except OSError as error:
            raise self.refused(error) from error
        try:
            yield
        finally:
            lock.release()

    def opened(self, copy: Path) -> None:
        """Note that a copy is used now, as far as a user may who does not own it.

        Raises:
            FileNotFoundError: there is no such copy.
        """
        try:
            os.utime(copy, ns=(time.time_ns(), os.stat(copy).st_mtime_ns))
        except PermissionError:  # only the owner may say when; who may write may say now
            with suppress(PermissionError):
                os.utime(copy)
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
            with self.locked("room"):
                if self._make_room(num_bytes, target, hint):
                    try:
                        handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
                        try:
                            os.fchmod(handle, self._mode & 0o666)
                            os.posix_fallocate(handle, 0, max(num_bytes, 1))
                            os.ftruncate(handle, num_bytes)
                        finally:
                            os.close(handle)
                        self._total += num_bytes
                        return temporary
                    except OSError as error:
                        temporary.unlink(missing_ok=True)
                        if error.errno not in FULL:
                            raise self.refused(error) from error
                        if disk_full:
                            raise self.full(path, num_bytes, str(error.strerror)) from error
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
            try:
                Path(copy.path).unlink(missing_ok=True)
            except PermissionError:
                continue  # another user's, who does not let us
            with self._lock:
                self._awaited.discard(copy.path)
            freed += copy.num_bytes
        if freed:
            self._tell_eviction()
            self._evicted_ns = self._last_eviction()
        self._total -= freed

    def _tell_eviction(self) -> None:
        path = self.folder / "EVICTED"
        with suppress(PermissionError):  # they hold maps for longer than they need
            if not path.exists():
                path.touch()
                os.chmod(path, self._mode & 0o666)
            os.utime(path)

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

    def refused(self, error: OSError) -> StoreError:
        """Say that the mirror cannot be written, for another reason than its room."""
        return StoreError(
            f"{self.folder}: the mirror cannot be written: {reason(error, self.folder)}; another "
            f"folder can be named in {FOLDER_VARIABLE}"
        )

    def full(self, path: BucketPath, num_bytes: int, why: str) -> StoreError:
        """Say that an object has no room."""
        return StoreError(
            f"{self.folder}: the mirror has no room for {num_bytes} more bytes of {path} "
            f"({why}, and all that is there is in use); raise {BYTES_VARIABLE}, or name a folder "
            f"on a larger disk in {FOLDER_VARIABLE}"
        )
