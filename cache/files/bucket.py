"""Objects of a bucket (s3, gs, az): read, sent and swapped whole, or not at all."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import obstore
from obstore import exceptions

from cache.errors import Busy
from cache.files.bucket_path import BucketPath
from cache.files.bucket_service import asking, store

if TYPE_CHECKING:
    from obstore import Bytes, GetResult

PART_BYTES = 16 << 20
"""Larger files are sent in parts of this size; the object appears when the last part is there."""
READ_BYTES = 8 << 20
"""Of a range that is asked for; a smaller object comes by one stream."""
STREAMS = 24
"""Ranges that a process asks for at once: at 60 to 90 MB/s each one process fills 10 Gbit/s."""


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
    with asking(path, "read"):
        lengths = [num_bytes] * len(starts)
        found = obstore.get_ranges(store(path), path.key, starts=starts, lengths=lengths)
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
    with asking(path, "read"):
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
    bucket = store(path)
    if num_bytes <= READ_BYTES:
        yield from obstore.get(bucket, path.key).stream(min_chunk_size=READ_BYTES)
        return

    def ask(start: int, same: Mapping[str, str]) -> "GetResult":
        options: Any = {"range": (start, start + READ_BYTES), **same}
        return obstore.get(bucket, path.key, options=options)

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
    with asking(path, "written"):
        if new:
            obstore.put(store(path), path.key, file, mode="create", use_multipart=False)
        else:
            obstore.put(store(path), path.key, file, chunk_size=PART_BYTES)


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
    with asking(path, "read"):
        try:
            found = obstore.get(store(path), path.key)
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
    bucket = store(path)
    mode: Any = "create" if there is None else there.stamp
    with asking(path, "written"):
        try:
            return _stamp(obstore.put(bucket, path.key, content, mode=mode, use_multipart=False))
        except (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileNotFoundError):
            # An attempt whose answer was lost may have been ours.
            now = read(path)
            if now is not None and now.content == content:
                return now.stamp
    raise Busy(f"{path}: another process has replaced it meanwhile; run the same again")


def _stamp(meta: Any) -> dict[str, str]:
    return {name: meta[name] for name in ("e_tag", "version") if meta[name]}
