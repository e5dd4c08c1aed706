"""Where a cache root lies: in a local folder, or in a bucket seen through the local mirror.

The one place that tells the two apart. Names are paths either way (`BucketPath` in a bucket);
files to be mapped or opened are asked for here.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TypeVar

from cache.errors import Corrupt, NotBuilt
from cache.files import bucket, mirror
from cache.files.bucket_path import SCHEMES, BucketPath, is_uri
from cache.files.mirror import Wanted
from eupe.errors import BadInput

T = TypeVar("T")
OPEN_TRIES = 8
"""A copy may be evicted between being filled and being opened; so often in a row it is not."""
FEW = 4
"""Sizes of so many objects are asked one by one; of more, by listing."""
LISTED = 1000
"""Objects that one request lists."""
AT_ONCE = 16
"""Requests to a bucket that are worth making at once."""


def root(name: str | Path) -> Path:
    """Return a folder, or what a URI names, as an absolute path.

    Raises:
        BadInput: a URI of another kind, or one that goes upwards.
    """
    if isinstance(name, BucketPath):
        return name
    text = str(name)
    if is_uri(text):
        path = BucketPath(text)
        if ".." in path.parts:
            raise BadInput(f"{text!r}: a name in a bucket has no `..`; wants it without")
        return path
    if "://" in text:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise BadInput(f"{text!r}: no place known here; wants a local path or one of {known}")
    return Path(name).expanduser().absolute()


def using(
    path: Path, use: Callable[[Path], T], num_bytes: int | None = None, sha256: str | None = None
) -> T:
    """Open a file: call `use` with it, or with its mirrored copy.

    Args:
        path: the file or object.
        use: opens it; called again if the copy was evicted before that.
        num_bytes: its size, if known.
        sha256: its checksum, if known; compared when the copy is filled.

    A copy that `use` finds damaged is dropped and filled again, once. Where it is sound, another
    process has done so meanwhile: it is opened again.

    Raises:
        NotBuilt: there is no such object; or what `use` raises.
        StoreError: see `Mirror.local`.
    """
    if not isinstance(path, BucketPath):
        return use(path)
    wanted, again = Wanted(path, num_bytes, sha256), False
    for _ in range(OPEN_TRIES):
        copy = mirror.default().local(wanted)
        try:
            return use(copy)
        except (NotBuilt, FileNotFoundError):
            continue
        except Corrupt:
            if again:
                raise
            mirror.default().drop_damaged(wanted)
            again = True
    raise mirror.default().evicted(path, OPEN_TRIES)


def drop_damaged(path: Path, num_bytes: int, sha256: str) -> None:
    """Drop the copy of an object if it is not what it should be; a local file stays.

    Args:
        path: of the object.
        num_bytes: its size.
        sha256: its checksum.
    """
    if isinstance(path, BucketPath):
        mirror.default().drop_damaged(Wanted(path, num_bytes, sha256))


def opened(path: Path, num_bytes: int | None = None, sha256: str | None = None) -> IO[bytes]:
    """Open a file or an object's copy for reading.

    Raises:
        OSError: there is no such file.
        StoreError: see `using`.
    """
    return using(path, lambda local: open(local, "rb"), num_bytes, sha256)


def will_need(files: Iterable[tuple[Path, int | None, str | None]]) -> None:
    """Start mirroring objects (path, size, sha256) that will be opened soon; nothing for files."""
    wanted = [Wanted(path, *known) for path, *known in files if isinstance(path, BucketPath)]  # type: ignore[arg-type]
    if wanted:
        mirror.default().will_need(wanted)


def is_mirrored(path: Path, num_bytes: int, sha256: str) -> bool:
    """True if a file needs no network now: it is local, or its object has a copy."""
    if not isinstance(path, BucketPath):
        return True
    return mirror.default().has(Wanted(path, num_bytes, sha256))


def sizes_below(
    directory: Path, num_files: int, num_there: int | None = None
) -> Callable[[Path], int]:
    """Return what tells the size of a file below a directory, -1 where there is none.

    Args:
        directory: the folder; of a bucket it is listed at once where that takes fewer requests.
        num_files: that will be asked for, about.
        num_there: files below it, about; None: those that will be asked for.
    """
    listed = FEW + (num_files if num_there is None else num_there) // LISTED
    if isinstance(directory, BucketPath) and num_files > listed:
        there: dict[Path, int] = dict(directory.files_below())
        return lambda path: there.get(path, -1)
    return size


def ranges(path: Path, starts: Sequence[int], num_bytes: int) -> list[bytes]:
    """Return parts of a file or object, not of its mirrored copy: few of a large one.

    Args:
        path: of the file.
        starts: of the parts.
        num_bytes: of each.

    Raises:
        OSError: there is no such file.
        StoreError: the bucket does not answer.
    """
    if isinstance(path, BucketPath):
        return bucket.ranges(path, starts, num_bytes)
    with path.open("rb") as file:
        found = []
        for start in starts:
            file.seek(start)
            found.append(file.read(num_bytes))
        return found


def at_once(directory: Path) -> int:
    """Return how many files of a folder are worth asking for at once."""
    return AT_ONCE if isinstance(directory, BucketPath) else 1


def listing(directory: Path) -> Iterator[tuple[Path, int, float]]:
    """Yield every file below a directory: path, size, when it was written (seconds since 1970)."""
    if isinstance(directory, BucketPath):
        yield from directory.listing()
        return
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                status = path.stat()
                yield path, status.st_size, status.st_mtime


def scratch(directory: Path, name: str) -> Path:
    """Return a local folder for files on their way to a directory, and for its locks."""
    if isinstance(directory, BucketPath):
        return mirror.default().scratch(directory)
    return directory / name


def may_write(directory: Path) -> bool:
    """Return True if this process may add files to a folder; of a bucket it is told when it does.

    Args:
        directory: the folder, or one that would be made.
    """
    if isinstance(directory, BucketPath):
        return True
    there = next(path for path in (directory, *directory.parents) if path.exists())
    return os.access(there, os.W_OK, effective_ids=True)


def size(path: Path) -> int:
    """Return the size of a file or object, -1 where there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1
