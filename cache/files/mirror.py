"""A bounded folder of local copies of a bucket's objects, filled ahead of need, mapped by readers.

    <folder>/<xx>/<name>     whole objects; the name is made of the object's and of what pins its
                             contents: a recorded sha256, or the bucket's entity tag
            /fill/           being filled: claimed at their full size, renamed when they are whole
            /scratch/        of writers to buckets: files not yet sent, locks between processes
            /locks/          one filler an object, one evictor
            /EVICTED         touched at every eviction: other processes then let go of old maps

All processes of a machine share it. When room is wanted, the least recently opened copies go that
nobody maps. A copy that another process maps goes too: its map stays good, and the disk gets the
space when that process lets go. Setting: EUPE_MIRROR (folder) and EUPE_MIRROR_BYTES (bound).
"""

import errno
import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from filelock import FileLock

from cache.errors import Corrupt, NotBuilt, StoreError
from cache.files import atomic, bucket, mapped
from cache.files.bucket import BucketPath

FOLDER_VARIABLE = "EUPE_MIRROR"
BYTES_VARIABLE = "EUPE_MIRROR_BYTES"
SHARE_OF_DISK = 0.9
"""Of what the disk has free or already mirrored, where BYTES_VARIABLE is not set."""
SPARE_SHARE = 0.05
"""Evicted beyond need, so that a full mirror is not searched through for every object."""
SEARCH_SHARE = 0.05
"""Of the time may go into adding up the folder; in between, this process's own fills are added."""
FILL_TRIES = 3
"""A copy may be evicted between being put in place and being noted as used."""
HINT_THREADS = 4
MAX_HINTS = 256
NUM_LOCKS = 64
ABANDONED_SECONDS = 1800.0
"""A fill that nobody has written to for so long: twice what one request may take."""
CHANGED = (
    "it was changed or damaged after it was recorded: restore it (of a store only patches and rows "
    "files are built again when they are deleted)"
)
POLL_SECONDS = 0.02
NAME_DIGITS = 2
"""Copies are spread over 256 folders."""


class Wanted(NamedTuple):
    """An object and what is known of its contents."""

    path: BucketPath
    num_bytes: int | None = None
    sha256: str | None = None


class _Copy(NamedTuple):
    """A file of the folder as one search saw it."""

    awaited: bool
    opened_ns: int
    num_bytes: int
    path: str
    inode: tuple[int, int]


class Mirror:
    """Local copies of objects; see the top of this file.

    Attributes:
        folder: where they lie.
        max_bytes: bound of all copies, those being filled included.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None):
        """Open a mirror, which may be in use by other processes.

        Args:
            folder: where; made if it is not there.
            max_bytes: bound; None: SHARE_OF_DISK.
        """
        self.folder = folder
        for name in ("fill", "locks", "scratch"):
            atomic.make_directories(folder / name)
        self._lock = Lock()
        self._awaited: set[str] = set()
        self._hinted: set[str] = set()
        self._waiting: deque[tuple[Wanted, Path]] = deque()
        self._num_filling = 0
        self._tags: dict[BucketPath, tuple[int, str]] = {}
        self._total, self._search_again = 0, 0.0
        self._evicted_ns = self._last_eviction()
        atomic.sweep(folder / "fill", ABANDONED_SECONDS)
        if max_bytes is None:
            disk = os.statvfs(folder)
            there = sum(copy.num_bytes for copy in self._search())
            max_bytes = int(SHARE_OF_DISK * (disk.f_bavail * disk.f_frsize + there))
        self.max_bytes = max_bytes

    def local(self, wanted: Wanted) -> Path:
        """Return the local copy of an object, filled first if it is not there.

        The copy may be evicted by others before it is opened: fill it again then (`place.using`).

        Args:
            wanted: the object; without sha256 its entity tag is asked for once a process.

        Raises:
            NotBuilt: there is no such object.
            Corrupt: it has another size or checksum than it should.
            StoreError: it cannot be read, or the mirror is full.
        """
        self._notice_evictions()
        if wanted.sha256 is None:
            self._describe(wanted.path)
        copy = self._copy(wanted)
        assert copy is not None
        with suppress(FileNotFoundError):
            return self._opened(copy)
        with self._one_filler(copy):
            for _ in range(FILL_TRIES):
                with suppress(FileNotFoundError):
                    return self._opened(copy)
                self._fill(wanted, copy, hint=False)
            with suppress(FileNotFoundError):
                return self._opened(copy)
        raise self.evicted(wanted.path, FILL_TRIES)

    def will_need(self, files: Iterable[Wanted]) -> None:
        """Start filling objects that will be asked for soon; returns at once.

        A hint: what cannot be had now (no room without evicting what other hints brought, too many
        hints, a failure) is left to `local`, which says what is wrong.
        """
        for wanted in files:
            copy = self._copy(wanted)
            with self._lock:
                if copy is None or str(copy) in self._hinted or len(self._hinted) >= MAX_HINTS:
                    continue
                if copy.exists():
                    continue
                self._hinted.add(str(copy))
                self._waiting.append((wanted, copy))
            self._fill_next()

    def scratch(self, directory: BucketPath) -> Path:
        """Return the folder for files on their way to a directory of a bucket, and its locks."""
        return self.folder / "scratch" / hashlib.sha256(str(directory).encode()).hexdigest()[:16]

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(HINT_THREADS, "cache-mirror")

    def _describe(self, path: BucketPath) -> tuple[int, str]:
        """Return an object's size and entity tag, asked for once a process."""
        try:
            return self._tags.get(path) or self._tags.setdefault(path, path.describe())
        except FileNotFoundError as error:
            raise NotBuilt(f"{path}: no such object") from error

    def _copy(self, wanted: Wanted) -> Path | None:
        """Where an object's copy lies; None if that must be asked of the bucket."""
        if wanted.sha256 is None and wanted.path not in self._tags:
            return None
        pin = wanted.sha256 or "{} bytes, {}".format(*self._tags[wanted.path])
        name = hashlib.sha256(f"{wanted.path}\0{pin}".encode()).hexdigest()[:32]
        readable = "-".join(wanted.path.parts[-3:])[-64:].encode("ascii", "replace").decode()
        return self.folder / name[:NAME_DIGITS] / f"{name}-{readable.replace('?', '_')}"

    def _opened(self, copy: Path) -> Path:
        """Note that a copy is used now; FileNotFoundError if there is none."""
        os.utime(copy, ns=(time.time_ns(), os.stat(copy).st_mtime_ns))
        with self._lock:
            self._awaited.discard(str(copy))
        return copy

    def _one_filler(self, copy: Path) -> FileLock:
        number = int(copy.name[:8], 16) % NUM_LOCKS
        return FileLock(self.folder / "locks" / f"{number:02d}", poll_interval=POLL_SECONDS)

    def _fill_next(self) -> None:
        """Give the pool the next hint, if it has a thread for it.

        Never more than it works on: at exit the interpreter waits for all that a pool was given.
        """
        with self._lock:
            if not self._waiting or self._num_filling >= HINT_THREADS:
                return
            wanted, copy = self._waiting.popleft()
            self._num_filling += 1
        with suppress(RuntimeError):  # the interpreter is about to end
            self._pool.submit(self._fill_ahead, wanted, copy)

    def _fill_ahead(self, wanted: Wanted, copy: Path) -> None:
        try:
            with self._one_filler(copy):
                if not copy.exists():
                    self._fill(wanted, copy, hint=True)
        except (StoreError, OSError):
            pass  # said when the object is asked for
        finally:
            with self._lock:
                self._hinted.discard(str(copy))
                self._num_filling -= 1
            self._fill_next()

    def _fill(self, wanted: Wanted, copy: Path, hint: bool) -> None:
        """Bring an object: claim its room, copy, compare, sync, rename."""
        path, num_bytes, sha256 = wanted
        if num_bytes is None:
            num_bytes, _ = self._describe(path)
        temporary = self._claim(wanted, num_bytes, hint)
        if temporary is None:
            return
        try:
            with open(temporary, "r+b") as file:
                got, digest = bucket.receive(path, file)
                if got != num_bytes:
                    raise Corrupt(f"{path}: {got} bytes, its record says {num_bytes}; {CHANGED}")
                if sha256 not in (None, digest):
                    raise Corrupt(f"{path}: contents do not match the recorded sha256; {CHANGED}")
                file.flush()
                os.fsync(file.fileno())
            copy.parent.mkdir(exist_ok=True)
            if hint:
                with self._lock:
                    self._awaited.add(str(copy))
            now = time.time_ns()  # not when its room was taken: it would be the next to go
            os.utime(temporary, ns=(now, now))
            os.replace(temporary, copy)
        except FileNotFoundError as error:
            raise NotBuilt(f"{path}: no such object") from error
        except OSError as error:
            raise self._full(wanted, num_bytes, error.strerror or str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)

    def _claim(self, wanted: Wanted, num_bytes: int, hint: bool) -> Path | None:
        """Make room and take it with a file of full size; None where a hint finds none.

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
                            raise self._full(wanted, num_bytes, why) from error
                        # Others fill this disk too: evict as much as is wanted, and try once more.
                        target, disk_full = min(self._total, self.max_bytes), True
                        self._search_again = 0.0
                        continue
                filling = bool(os.listdir(self.folder / "fill"))
            if hint:
                return None
            if not filling or num_bytes > self.max_bytes:
                why = "its disk is full" if disk_full else f"it may hold {self.max_bytes} bytes"
                raise self._full(wanted, num_bytes, why)
            atomic.sweep(self.folder / "fill", ABANDONED_SECONDS)
            time.sleep(POLL_SECONDS)  # what others are filling can be evicted soon

    def _make_room(self, num_bytes: int, target: int, hint: bool) -> bool:
        """Evict until there is room; whether there is. The caller holds the room lock."""
        started = time.monotonic()
        if self._total + num_bytes <= target and started < self._search_again:
            return True
        while True:
            copies = self._search()
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

    def _search(self) -> list[_Copy]:
        """List all copies, those being filled included.

        Fills come first: what is renamed meanwhile may be seen twice, which its inode tells, but
        it is never missed.
        """
        with self._lock:
            awaited = set(self._awaited)
        copies: dict[tuple[int, int], _Copy] = {}
        for folder in self._folders():
            for file in os.scandir(folder):
                try:
                    status = file.stat()
                except FileNotFoundError:
                    continue
                inode = status.st_dev, status.st_ino
                copies[inode] = _Copy(
                    file.path in awaited, status.st_atime_ns, status.st_size, file.path, inode
                )
        return list(copies.values())

    def _folders(self) -> Iterator[str]:
        """Yield the folders that hold copies, that of fills first."""
        yield str(self.folder / "fill")
        for part in os.scandir(self.folder):
            if len(part.name) == NAME_DIGITS and part.is_dir():
                yield part.path

    def _evict(self, copies: list[_Copy], num_bytes: int) -> None:
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

    def _notice_evictions(self) -> None:
        """Unmap what has not been used for long if another process evicts: it may be among it."""
        last = self._last_eviction()
        if last != self._evicted_ns:
            self._evicted_ns = last
            mapped.let_go()

    def evicted(self, path: BucketPath, times: int) -> StoreError:
        """Say that a copy never lasted until it was opened."""
        return StoreError(
            f"{self.folder}: the copy of {path} was evicted {times} times before it was opened; "
            f"raise {BYTES_VARIABLE} of all processes that share this mirror"
        )

    def _full(self, wanted: Wanted, num_bytes: int, why: str) -> StoreError:
        return StoreError(
            f"{self.folder}: the mirror has no room for {num_bytes} more bytes of {wanted.path} "
            f"({why}, and all that is there is in use); raise {BYTES_VARIABLE}, or name a folder "
            f"on a larger disk in {FOLDER_VARIABLE}"
        )


def default() -> Mirror:
    """Return the mirror that the environment names, one a process.

    Raises:
        ValueError: EUPE_MIRROR_BYTES is no number of bytes.
    """
    return _opened(os.environ.get(FOLDER_VARIABLE, ""), os.environ.get(BYTES_VARIABLE, ""))


@cache
def _opened(folder: str, max_bytes: str) -> Mirror:
    if max_bytes and not max_bytes.isdigit():
        raise ValueError(f"{BYTES_VARIABLE} = {max_bytes!r}: wants a number of bytes")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    where = Path(folder) if folder else Path(home, "eupe", "mirror")
    return Mirror(where.expanduser().absolute(), int(max_bytes) if max_bytes else None)


os.register_at_fork(after_in_child=_opened.cache_clear)  # its threads stay in the parent
