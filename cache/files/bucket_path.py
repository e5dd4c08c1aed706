"""Names of a bucket's objects that behave like paths, and the questions a bucket can answer."""

import fnmatch
import os
import re
from collections.abc import Generator
from pathlib import PosixPath
from typing import IO, Any

import obstore

from cache.files.bucket_service import asking, store
from eupe.errors import BadInput

SCHEMES = ("s3", "gs", "az")
BUFFER_BYTES = 8 << 20
"""Read ahead of whoever reads an object like a file."""
_URI = re.compile(rf"({'|'.join(SCHEMES)}):/+(?=[^/])")


def is_uri(name: str) -> bool:
    """True if a name is that of a bucket or of its objects: `s3://bucket/prefix`."""
    return _URI.match(name) is not None


class BucketPath(PosixPath):
    """The name of an object, or of all objects below a prefix: `s3://bucket/prefix/key`.

    Joins, compares and pickles like any path, and answers the questions of Path that a bucket can
    answer, anew each time. To hand it to something that opens files itself is an error; such files
    come from the mirror (cache/files/mirror.py).
    """

    __slots__ = ()

    def __str__(self) -> str:
        return _URI.sub(r"\1://", super().__str__())

    def __fspath__(self) -> str:
        raise TypeError(f"{self}: an object of a bucket is no file; take it from the mirror")

    @property
    def key(self) -> str:
        """Name inside the bucket."""
        return "/".join(self.parts[2:])

    def read_bytes(self) -> bytes:
        """Return the object as it is now.

        Raises:
            FileNotFoundError: there is none.
            StoreError: it cannot be read.
        """
        with asking(self, "read"):
            return bytes(obstore.get(store(self), self.key).bytes())

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Return a result of which only `st_size` and `st_mtime` mean something.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: the bucket does not answer.
        """
        found = _head(self)
        written = int(found["last_modified"].timestamp())
        return os.stat_result((0o100444, 0, 0, 1, 0, 0, found["size"], 0, written, 0))

    def describe(self) -> tuple[int, str]:
        """Return size and entity tag, which another content does not have.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: the bucket does not answer.
        """
        found = _head(self)
        return found["size"], _tag(found)

    def is_file(self) -> bool:
        """True if there is such an object."""
        try:
            self.describe()
        except FileNotFoundError:
            return False
        return True

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        """True if there is such an object."""
        return self.is_file()

    def is_dir(self) -> bool:
        """True if there are objects below."""
        found = self._children()
        return bool(found["objects"] or found["common_prefixes"])

    def resolve(self, strict: bool = False) -> "BucketPath":
        """Return itself: nothing about it is relative."""
        return self

    def absolute(self) -> "BucketPath":
        """Return itself."""
        return self

    def files_below(self) -> list[tuple["BucketPath", int]]:
        """Return every object below with its size, sorted by name.

        Raises:
            StoreError: the bucket does not answer.
        """
        return [(path, size) for path, size, _ in self.listing()]

    def listing(self) -> list[tuple["BucketPath", int, float]]:
        """Return every object below, sorted by name: a request a thousand objects.

        Returns:
            Name, size, and when it was written, in seconds since 1970.

        Raises:
            StoreError: the bucket does not answer.
        """
        return sorted(
            (path, each["size"], each["last_modified"].timestamp()) for path, each in _below(self)
        )

    def described_below(self) -> list[tuple["BucketPath", int, str]]:
        """Return every object below with size and entity tag, a request a thousand objects.

        Raises:
            StoreError: the bucket does not answer.
        """
        return [(path, each["size"], _tag(each)) for path, each in _below(self)]

    def scan(self) -> tuple[list[str], list[tuple[str, int, str]]]:
        """Return names of the prefixes just below; and of objects, with size and entity tag.

        Raises:
            StoreError: the bucket does not answer.
        """
        found = self._children()
        prefixes = sorted(
            str(path).rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]
        )
        return prefixes, sorted(
            (each["path"].rpartition("/")[2], each["size"], _tag(each)) for each in found["objects"]
        )

    def glob(self, pattern: str) -> Generator["BucketPath", None, None]:
        """Yield objects and prefixes that match, part by part; one request a prefix on the way.

        Raises:
            ValueError: the pattern has `**`.
            StoreError: the bucket does not answer.
        """
        first, _, rest = pattern.partition("/")
        if first == "**":
            raise BadInput(f"{self}/{pattern}: ** would list the whole bucket; name the folder")
        if not _is_pattern(first):
            below = self / first
            if rest:
                yield from below.glob(rest)
            elif below.is_file():
                yield below
            return
        base = type(self)(*self.parts[:2])
        found = self._children()
        names = [str(name) for name in found["common_prefixes"]]
        if not rest:
            names += [each["path"] for each in found["objects"]]
        for below in sorted(base / name for name in names):
            if fnmatch.fnmatchcase(below.name, first):
                if rest:
                    yield from below.glob(rest)
                else:
                    yield below

    def open(self, mode: str = "r", *args: Any, **options: Any) -> IO[Any]:  # type: ignore[override]
        """Read the object as it is now, from the bucket: seekable, by ranges of BUFFER_BYTES.

        Raises:
            ValueError: a mode other than "rb".
        """
        if mode != "rb":
            raise ValueError(f"{self}: an object can be opened in mode 'rb' only, not {mode!r}")
        with asking(self, "read"):
            return _Ranges(self)  # type: ignore[return-value]

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object; one that is not there is none to delete."""
        with asking(self, "deleted"):
            obstore.delete(store(self), self.key)

    def _children(self) -> Any:
        with asking(self, "listed"):
            return obstore.list_with_delimiter(store(self), self.key or None)


class _Ranges:
    """A file object over an object of a bucket, with errors of ours."""

    def __init__(self, path: BucketPath):
        self._path = path
        self._reader = obstore.open_reader(store(path), path.key, buffer_size=BUFFER_BYTES)

    def __enter__(self) -> "_Ranges":
        return self

    def __exit__(self, *reason: object) -> None:
        self._reader.close()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset from the start (0) or the end (2)."""
        return int(self._reader.seek(offset, whence))

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, all that is left by default."""
        with asking(self._path, "read"):
            return bytes(self._reader.read(None if size < 0 else size))


def _head(path: BucketPath) -> Any:
    with asking(path, "read"):
        return obstore.head(store(path), path.key)


def _below(path: BucketPath) -> list[tuple[BucketPath, Any]]:
    base = BucketPath(*path.parts[:2])
    with asking(path, "listed"):
        found = obstore.list(store(path), prefix=path.key or None, chunk_size=1000)
        return [(base / each["path"], each) for part in found for each in part]


def _tag(found: Any) -> str:
    """Return what an object of other contents does not have."""
    return str(found["e_tag"] or found["last_modified"].isoformat())


def _is_pattern(part: str) -> bool:
    return any(sign in part for sign in "*?[")
