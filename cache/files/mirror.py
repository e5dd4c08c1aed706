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

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from functools import cache, cached_property
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from cache.errors import Corrupt, NotBuilt, StoreError
from cache.files import atomic, bucket
from cache.files.bucket_path import BucketPath
from cache.files.mirror_space import (
    BYTES_VARIABLE,
    FOLDER_VARIABLE,
    NAME_DIGITS,
    Space,
)
from cache.files.refused import FULL, writing
from eupe.errors import BadInput

FILL_TRIES = 3
"""A copy may be evicted between being put in place and being noted as used."""
HINT_THREADS = 8
"""Objects that a process brings at once; all their ranges share `bucket.STREAMS`."""
MAX_HINTS = 256
NUM_LOCKS = 1024
"""Many more than objects that a node fills at once: a hint whose lock is taken is dropped."""
CHANGED = (
    "it was changed or damaged after it was recorded: restore it (of a store only patches and rows "
    "files are built again when they are deleted)"
)


class Wanted(NamedTuple):
    """An object and what is known of its contents."""

    path: BucketPath
    num_bytes: int | None = None
    sha256: str | None = None


class Mirror:
    """Local copies of objects; see the top of this file.

    Attributes:
        folder: where they lie.
        space: its room, bounded.
    """

    def __init__(self, folder: Path, max_bytes: int | None = None):
        """Open a mirror, which may be in use by other processes.

        Args:
            folder: where; made if it is not there.
            max_bytes: bound; None: `mirror_space.SHARE_OF_DISK`.

        Raises:
            StoreError: it cannot be made.
        """
        self.folder = folder
        with writing(folder):
            atomic.make_directories(folder)
        self.space = Space(folder, max_bytes)
        self._lock = Lock()
        self._hinted: set[str] = set()
        self._waiting: deque[tuple[Wanted, Path]] = deque()
        self._num_filling = 0
        self._tags: dict[BucketPath, tuple[int, str]] = {}

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
        self.space.notice_evictions()
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

    def has(self, wanted: Wanted) -> bool:
        """True if there is a local copy of an object; it may be evicted before it is opened."""
        copy = self._copy(wanted)
        return copy is not None and copy.exists()

    def drop_damaged(self, wanted: Wanted) -> None:
        """Delete an object's copy if it has another checksum.

        Readers that have it mapped keep what they have. Without a sha256 there is nothing to
        compare with: the copy goes, and is filled from the object as it is.
        """
        copy = self._copy(wanted)
        if copy is None:
            return
        with self._one_filler(copy), suppress(FileNotFoundError):
            with copy.open("rb") as file:
                sound = hashlib.file_digest(file, "sha256").hexdigest() == wanted.sha256
            if not sound:
                try:
                    copy.unlink()
                except PermissionError as error:
                    raise StoreError(
                        f"{copy}: damaged, and another user's: have it deleted, or name another "
                        f"folder in {FOLDER_VARIABLE}"
                    ) from error

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
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        folder = self.folder / "scratch" / name
        self.space.make_folder(folder)
        return folder

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
        self.space.opened(copy)
        return copy

    def _one_filler(self, copy: Path, wait: bool = True) -> AbstractContextManager[None]:
        return self.space.locked(f"{int(copy.name[:8], 16) % NUM_LOCKS:02d}", wait)

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
            with self._one_filler(copy, wait=False):
                if not copy.exists():
                    self._fill(wanted, copy, hint=True)
        except (StoreError, OSError):
            pass  # another process brings it; or it is said when the object is asked for
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
        temporary = self.space.claim(path, num_bytes, hint)
        if temporary is None:
            return
        try:
            with open(temporary, "r+b") as file:
                got, digest = bucket.receive(path, file, num_bytes)
                if got != num_bytes:
                    raise Corrupt(f"{path}: {got} bytes, its record says {num_bytes}; {CHANGED}")
                if sha256 not in (None, digest):
                    raise Corrupt(f"{path}: contents do not match the recorded sha256; {CHANGED}")
                file.flush()
                os.fsync(file.fileno())
            self.space.make_folder(copy.parent)
            if hint:
                self.space.awaits(copy)
            now = time.time_ns()  # not when its room was taken: it would be the next to go
            os.utime(temporary, ns=(now, now))
            os.replace(temporary, copy)
        except FileNotFoundError as error:
            raise NotBuilt(f"{path}: no such object") from error
        except OSError as error:
            if error.errno in FULL:
                raise self.space.full(path, num_bytes, str(error.strerror)) from error
            raise self.space.refused(error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def evicted(self, path: BucketPath, times: int) -> StoreError:
        """Say that a copy never lasted until it was opened."""
        return StoreError(
            f"{self.folder}: the copy of {path} was evicted {times} times before it was opened; "
            f"raise {BYTES_VARIABLE} of all processes that share this mirror"
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
        raise BadInput(f"{BYTES_VARIABLE} = {max_bytes!r}: wants a number of bytes")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    where = Path(folder) if folder else Path(home, "eupe", "mirror")
    return Mirror(where.expanduser().absolute(), int(max_bytes) if max_bytes else None)


os.register_at_fork(after_in_child=_opened.cache_clear)  # its threads stay in the parent
