"""What the operating system refuses to write becomes one sentence: which file, why, what to do."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import StoreError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""No room: on the file system, or of this user's quota."""
AGAIN = "then run the same command again: it goes on, and what was finished is kept"


@contextmanager
def writing(path: Path, where: Path | None = None) -> Iterator[None]:
    """Turn an OSError of writing into a StoreError.

    Args:
        path: what the sentence names.
        where: a folder of the file system that is written to; None: `path` lies there.

    Raises:
        FileExistsError: as it is; whoever creates exclusively asks for it.
        StoreError: the block raised another OSError.
    """
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise refusal(path, error, where) from error


def refusal(path: Path, error: OSError, where: Path | None = None) -> StoreError:
    """Say that a file cannot be written; see `writing`."""
    return StoreError(f"{path}: cannot be written: {reason(error, where or path)}")


def reason(error: OSError, where: Path) -> str:
    """Return why, and for a disk that is full or fails what to do, in half a sentence.

    Args:
        error: what the operating system says.
        where: a file or folder of the file system; it need not be there.
    """
    why = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        return f"{why} ({_left(where)}); free some, {AGAIN}"
    if error.errno == errno.EDQUOT:
        return f"{why} ({_left(where)}, of which your quota leaves you none); free some, {AGAIN}"
    if error.errno == errno.EIO:
        return f"{why}; the disk or the way to it fails: see the system's log, mend it, {AGAIN}"
    return why


def _left(where: Path) -> str:
    """Say what the file system of a place has left."""
    there = where.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        disk = os.statvfs(there)
    except OSError:
        return f"on the file system of {there}"
    megabytes = f"{disk.f_bavail * disk.f_frsize / 1e6:.1f} MB"
    inodes = " and no inode" if disk.f_files and not disk.f_favail else ""
    return f"{megabytes}{inodes} left on the file system of {there}"
