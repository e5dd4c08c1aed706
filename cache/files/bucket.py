"""Objects of a bucket (s3, gs, az), named and read like files; sent whole, or not at all.

obstore speaks to the services; credentials and endpoints come from their usual environment
variables (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, GOOGLE_SERVICE_ACCOUNT, AZURE_STORAGE_ACCOUNT_NAME
and so on), and requests that fail for a while (no connection, 429, 5xx) are retried by it.
"""

import errno
import fnmatch
import hashlib
import os
import re
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path, PosixPath
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import obstore
from obstore import exceptions
from obstore.store import ObjectStore, from_url

from cache.errors import Busy, StoreError
from eupe.errors import BadInput

if TYPE_CHECKING:
    from obstore import Bytes, GetResult

SCHEMES = ("s3", "gs", "az")
RETRY_VARIABLE = "EUPE_BUCKET_RETRY_SECONDS"
RETRY_SECONDS = 180.0
"""How long one request is tried again, unless RETRY_VARIABLE says otherwise."""
MAX_RETRIES = 30
REQUEST_SECONDS = 900
"""A whole request, its body included: a shard of 256 MB at 0.3 MB/s."""
PART_BYTES = 16 << 20
"""Larger files are sent in parts of this size; the object appears when the last part is there."""
READ_BYTES = 8 << 20
STREAMS = 24
"""Ranges that a process asks for at once: at 60 to 90 MB/s each one process fills 10 Gbit/s."""
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
        with _asking(self, "read"):
            return bytes(obstore.get(_store(self), self.key).bytes())

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
        """Read the object as it is now, from the bucket: seekable, by ranges of READ_BYTES.

        Raises:
            ValueError: a mode other than "rb".
        """
        if mode != "rb":
            raise ValueError(f"{self}: an object can be opened in mode 'rb' only, not {mode!r}")
        with _asking(self, "read"):
            return _Ranges(self)  # type: ignore[return-value]

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the object; one that is not there is none to delete."""
        with _asking(self, "deleted"):
            obstore.delete(_store(self), self.key)

    def _children(self) -> Any:
        with _asking(self, "listed"):
            return obstore.list_with_delimiter(_store(self), self.key or None)


class _Ranges:
    """A file object over an object of a bucket, with errors of ours."""

    def __init__(self, path: BucketPath):
        self._path = path
        self._reader = obstore.open_reader(_store(path), path.key, buffer_size=READ_BYTES)

    def __enter__(self) -> "_Ranges":
        return self

    def __exit__(self, *reason: object) -> None:
        self._reader.close()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset from the start (0) or the end (2)."""
        return int(self._reader.seek(offset, whence))

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes, all that is left by default."""
        with _asking(self._path, "read"):
            return bytes(self._reader.read(None if size < 0 else size))


def ranges(path: BucketPath, starts: Sequence[int], num_bytes: int) -> list[bytes]:
    """Return parts of an object, those that lie near each other by one request.

    Args:
        path: the object.
        starts: of the parts.
        num_bytes: of each.

    Raises:
        FileNotFoundError: there is no such object.
        StoreError: it cannot be read.
    """
    with _asking(path, "read"):
        lengths = [num_bytes] * len(starts)
        found = obstore.get_ranges(_store(path), path.key, starts=starts, lengths=lengths)
        return [bytes(part) for part in found]


def receive(path: BucketPath, into: IO[bytes], num_bytes: int) -> tuple[int, str]:
    """Copy an object into a file; return how many bytes came and their sha256.

    Args:
        path: the object.
        into: the file.
        num_bytes: size that the object should have; a large one comes by several streams.

    Raises:
        FileNotFoundError: there is no such object.
        OSError: the file cannot be written.
        StoreError: the object cannot be read.
    """
    digest, got = hashlib.sha256(), 0
    with _asking(path, "read"):
        for part in _parts(path, num_bytes):
            into.write(part)
            digest.update(part)
            got += len(part)
    return got, digest.hexdigest()


def _parts(path: BucketPath, num_bytes: int) -> "Iterator[Bytes]":
    """Yield the bytes of an object in order, by ranges if it should have more than READ_BYTES.

    One stream of a bucket gives a tenth of what a link takes, so ranges are asked for STREAMS at
    once, all of the object as the first one found it.
    """
    store = _store(path)
    if num_bytes <= READ_BYTES:
        yield from obstore.get(store, path.key).stream(min_chunk_size=READ_BYTES)
        return

    def ask(start: int, same: Mapping[str, str]) -> "GetResult":
        options: Any = {"range": (start, start + READ_BYTES), **same}
        return obstore.get(store, path.key, options=options)

    try:
        first = ask(0, {})
    except exceptions.BaseError as error:
        if "416" not in str(error):
            raise
        return  # no range begins in an object of no bytes
    tag = first.meta["e_tag"]
    same = {"if_match": tag} if tag else {}

    def part(start: int) -> "Future[Bytes]":
        return _streams().submit(lambda: ask(start, same).bytes())

    starts = iter(range(READ_BYTES, first.meta["size"], READ_BYTES))
    ahead = deque(map(part, islice(starts, STREAMS)))
    try:
        yield first.bytes()
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(map(part, islice(starts, 1)))
    finally:
        for future in ahead:
            future.cancel()


@cache
def _streams() -> ThreadPoolExecutor:
    """Return the threads that ask for ranges, those of all objects of the process."""
    return ThreadPoolExecutor(STREAMS, "cache-bucket")


os.register_at_fork(after_in_child=_streams.cache_clear)  # its threads stay in the parent


def send(file: Path, path: BucketPath, new: bool = False) -> None:
    """Make a local file an object: readers see the old one or the new one, whole.

    Args:
        file: its contents.
        path: its name.
        new: refuse to replace an object.

    Raises:
        FileExistsError: `new`, and there is such an object.
        StoreError: it cannot be sent.
    """
    with _asking(path, "written"):
        if new:
            obstore.put(_store(path), path.key, file, mode="create", use_multipart=False)
        else:
            obstore.put(_store(path), path.key, file, chunk_size=PART_BYTES)


class Stamped(NamedTuple):
    """An object as read, and what tells whether it has been replaced since.

    Attributes:
        content: of the object.
        stamp: entity tag, which S3 and Azure compare, and version, which Google does.
        written: when, seconds since 1970 by the bucket's clock.
    """

    content: bytes
    stamp: dict[str, str]
    written: float = 0.0


def read(path: BucketPath) -> Stamped | None:
    """Return an object as it is now, to be swapped; None if there is none.

    Raises:
        StoreError: it cannot be read.
    """
    with _asking(path, "read"):
        try:
            found = obstore.get(_store(path), path.key)
            written = found.meta["last_modified"].timestamp()
            return Stamped(bytes(found.bytes()), _stamp(found.meta), written)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise
            return None


def swap(path: BucketPath, content: bytes, there: Stamped | None) -> dict[str, str]:
    """Replace an object if it is as it was read, in the bucket; return its new stamp.

    Args:
        path: the object.
        content: what it shall be.
        there: what it was; None: there was none.

    Raises:
        Busy: somebody else has written it.
        StoreError: it cannot be written.
    """
    store = _store(path)
    mode: Any = "create" if there is None else there.stamp
    with _asking(path, "written"):
        try:
            return _stamp(obstore.put(store, path.key, content, mode=mode, use_multipart=False))
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileNotFoundError):
            # An attempt whose answer was lost may have been ours.
            now = read(path)
            if now is not None and now.content == content:
                return now.stamp
    raise Busy(f"{path}: another process has replaced it meanwhile; run the same again")


def _head(path: BucketPath) -> Any:
    with _asking(path, "read"):
        return obstore.head(_store(path), path.key)


def _below(path: BucketPath) -> list[tuple[BucketPath, Any]]:
    base = BucketPath(*path.parts[:2])
    with _asking(path, "listed"):
        found = obstore.list(_store(path), prefix=path.key or None, chunk_size=1000)
        return [(base / each["path"], each) for part in found for each in part]


def _stamp(meta: Any) -> dict[str, str]:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name]}


def _tag(found: Any) -> str:
    """Return what an object of other contents does not have."""
    return str(found["e_tag"] or found["last_modified"].isoformat())


def _is_pattern(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def _store(path: BucketPath) -> ObjectStore:
    scheme, bucket = path.parts[0], path.parts[1]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return _connected(f"{scheme}//{bucket}", endpoint, os.environ.get(RETRY_VARIABLE))


@cache
def _connected(url: str, endpoint: str | None, retry_seconds: str | None) -> ObjectStore:
    """Return the connection pool of one bucket."""
    try:
        seconds = float(retry_seconds or RETRY_SECONDS)
    except ValueError as error:
        raise BadInput(f"{RETRY_VARIABLE} = {retry_seconds!r}: wants a number") from error
    extra: dict[str, Any] = {}
    if endpoint and url.startswith("s3:"):
        extra["endpoint"] = endpoint
    return from_url(
        url,
        client_options={
            # Plain http only where the user names such an endpoint (a service on this machine).
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
            "timeout": timedelta(seconds=REQUEST_SECONDS),
            "connect_timeout": timedelta(seconds=10),
        },
        retry_config={
            "max_retries": MAX_RETRIES,
            "retry_timeout": timedelta(seconds=seconds),
        },
        **extra,
    )


@contextmanager
def _asking(path: BucketPath, done: str) -> Iterator[None]:
    """Turn what the service or the network says into one sentence about the object."""
    try:
        yield
    except FileNotFoundError as error:
        if "NoSuchBucket" in str(error):
            raise StoreError(f"{path}: there is no bucket {path.parts[1]!r}") from error
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path)) from error
    except exceptions.AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, "there is such an object", str(path)) from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        raise StoreError(
            f"{path}: may not be {done} with the credentials in the environment "
            f"({_reason(error)}); see docs/operations.md, A bucket as cache root"
        ) from error
    except exceptions.BaseError as error:
        raise StoreError(f"{path}: cannot be {done}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Shorten obstore's account of a failed request to status, code and number of retries."""
    text = str(error).partition("\n\nDebug source:")[0]
    status = re.search(r"status code:? (\d{3}[A-Za-z ]*)|status (\d{3}[A-Za-z ]*)", text)
    code = re.search(r"<Code>(\w+)</Code>", text)
    told = [(status.group(1) or status.group(2)).strip()] if status else []
    told += [code.group(1)] if code else []
    if not told:
        told = [text.splitlines()[0].rpartition(" - ")[2].strip()]
    retries = re.search(r"after (\d+) retries", text)
    told += [f"after {retries.group(1)} retries"] if retries else []
    throttled = status is not None and (status.group(1) or status.group(2))[:3] in ("429", "503")
    advice = f"; the bucket throttles: use fewer readers or raise {RETRY_VARIABLE}"
    return ", ".join(told) + (advice if throttled else "")
