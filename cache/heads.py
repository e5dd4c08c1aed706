"""A folder of Arrow segments under a HEAD: how samples and manifests grow without being rewritten.

    <version>-<digest>.arrow   segments, named by their content: written once, never changed
    HEAD-<version>             JSON, a `Head`: names the segments that count, with their checksums
    HEAD                       a copy of the newest of these

What no HEAD names does not exist: a killed writer leaves a segment that nobody sees.

Committers need no lock that all of them see. Whoever makes `HEAD-<version>`, whole and only if
there is none, has committed that version; the others look again and try the next one. A committer
that is killed before it has copied its HEAD leaves a HEAD that is older than what is committed:
readers look for a newer `HEAD-<version>`, of which the last KEPT_HEADS stay. In a bucket there is
HEAD alone: it is replaced if it still says what its next writer has read.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cache.errors import Busy, Corrupt
from cache.files import atomic, bucket, sealed
from cache.files.bucket_path import BucketPath
from cache.format import layout
from cache.segments import Segment, version_of

KEPT_HEADS = 8
"""A committer overtaken by so many cannot tell what became of its version: it tries again."""
COMMIT_SECONDS = 60.0
RETRY_SECONDS = 0.05
REPAIR = "`eupe cache repair` makes it anew"
CHECKSUM = "head_sha256"
"""Field of a HEAD: the sha256 of the file as it is with zeros in this place."""
_NUMBERED = re.compile(rf"{layout.HEAD}-(\d+)")


class Head(BaseModel):
    """What every HEAD says.

    Attributes:
        format: of the cache root.
        version: commits that came before this one.
        segments: those that count, oldest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    version: int = 0
    segments: tuple[Segment, ...] = ()

    def pinned(self) -> list[Segment]:
        """Return every file that it names: segments, and what goes with them."""
        return list(self.segments)

    def to_bytes(self) -> bytes:
        """Return the HEAD file, its checksum in it: equal heads, equal bytes."""
        return sealed.seal(self.model_dump(mode="json"), CHECKSUM)

    @model_validator(mode="before")
    @classmethod
    def _without_checksum(cls, said: object) -> object:
        """Leave out what is said of the file: heads that say the same are equal."""
        if not isinstance(said, dict):
            return said
        return {name: value for name, value in said.items() if name != CHECKSUM}


H = TypeVar("H", bound=Head)


class HeadFile(NamedTuple, Generic[H]):
    """A HEAD as read: what it says, and what its next writer expects to find.

    Attributes:
        head: what it says.
        content: of the file.
        stamp: of an object of a bucket; see `bucket.Stamped`.
    """

    head: H
    content: bytes
    stamp: dict[str, str] | None = None


class _Numbered(NamedTuple):
    """What the names in a folder tell.

    Attributes:
        heads: versions of the `HEAD-<version>` that are there, rising.
        segments: version that wrote each segment -> its names.
    """

    heads: list[int]
    segments: dict[int, list[str]]


def read_head(directory: Path, kind: type[H]) -> HeadFile[H] | None:
    """Read the newest HEAD of a folder; None if it has none.

    Raises:
        Corrupt: it is no HEAD of that kind, it was damaged, or it is older than the segments.
    """
    seen: tuple[int, int] | None = None
    while True:
        found = _read(directory / layout.HEAD, kind)
        if isinstance(directory, BucketPath):
            return found
        version = -1 if found is None else found.head.version
        there = _numbered(directory)
        if there.heads and there.heads[-1] > version:
            version = there.heads[-1]
            found = _read(_numbered_head(directory, version), kind)
            if found is None:
                continue  # committers have gone on meanwhile
        newest = max(there.segments, default=-1)
        if found is None or newest <= version + 1:  # one may be about to be committed
            return found
        if seen == (version, newest):  # twice: this is no glance at a folder in motion
            raise Corrupt(
                f"{directory}: its HEAD is of version {version}, older than its segments (version "
                f"{newest}); was it restored from a backup? {REPAIR}"
            )
        seen = version, newest


def commit(
    directory: Path,
    kind: type[H],
    change: Callable[[HeadFile[H] | None], H | None],
    scratch: Path,
) -> HeadFile[H] | None:
    """Put the next HEAD in its place, built on the newest one.

    Args:
        directory: the folder.
        kind: of HEAD.
        change: HEAD as it is (None: there is none) -> the next one, whose segments are written and
            whose version is `next_version`, or None if nothing is to change. Called again when
            another committer was faster.
        scratch: for files while they are written.

    Returns:
        The newest HEAD.

    Raises:
        Busy: others have been faster for a minute.
        Corrupt: see `read_head`.
        StoreError: it cannot be written.
    """
    given = time.monotonic() + COMMIT_SECONDS
    while True:
        there = read_head(directory, kind)
        head = change(there)
        if head is None:
            if there is not None and not isinstance(directory, BucketPath):
                _copy_newest(directory, there.head.version, there.content, scratch)
            return there
        try:
            return _put(directory, head, there, scratch)
        except Busy:
            if time.monotonic() > given:
                raise
            # Two that keep step would meet again; nobody gains by guessing.
            time.sleep(random.uniform(0, RETRY_SECONDS))  # noqa: S311


def next_version(there: HeadFile[H] | None) -> int:
    """Return the version of the HEAD that follows."""
    return 0 if there is None else there.head.version + 1


class Left(NamedTuple, Generic[H]):
    """What is left of a folder's HEADs, whatever of them is damaged.

    Attributes:
        newest: the newest that can be read; None if none can.
        fault: what is wrong; None if they are sound.
        next_version: beyond all that the folder's names tell.
    """

    newest: H | None
    fault: str | None
    next_version: int


def left_of(directory: Path, kind: type[H]) -> Left[H]:
    """Look what is left of a folder's HEADs."""
    try:
        sound = read_head(directory, kind)
        if sound is not None and _is_of(directory, sound.head):
            return Left(sound.head, None, sound.head.version + 1)
        fault = "lost" if sound is None else "names no segment that is here, so is another's"
    except Corrupt as error:
        fault = str(error)
    readable = []
    for path in directory.glob(f"{layout.HEAD}*"):
        with suppress(Corrupt, OSError):
            found = _read(path, kind)
            readable += [] if found is None else [found.head]
    readable = [head for head in readable if _is_of(directory, head)] or readable
    names = [path.name for path in directory.glob("*")]
    versions = [version for version in map(_any_version, names) if version is not None]
    newest = max(readable, key=lambda head: head.version, default=None)
    versions += [] if newest is None else [newest.version]
    return Left(newest, fault, max(versions, default=-1) + 1)


def _is_of(directory: Path, head: Head) -> bool:
    """True if a HEAD speaks of this folder: of what it names, something is here."""
    named = [directory / segment.name for segment in head.segments]
    return not named or any(path.is_file() for path in named)


def restore(directory: Path, head: Head, scratch: Path) -> None:
    """Make a HEAD the newest, whatever is there.

    Args:
        directory: the folder.
        head: of `Left.next_version`.
        scratch: for files while they are written.

    Raises:
        Busy: in a bucket somebody else has replaced HEAD meanwhile.
        StoreError: it cannot be written.
    """
    path, content = directory / layout.HEAD, head.to_bytes()
    if isinstance(path, BucketPath):
        bucket.swap(path, content, bucket.read(path))
        return
    atomic.write(_numbered_head(directory, head.version), [content], scratch)
    atomic.write(path, [content], scratch)


def files(directory: Path, head: Head) -> list[tuple[Path, str]]:
    """Return path and sha256 of every segment."""
    return [(directory / segment.name, segment.sha256) for segment in head.pinned()]


def superseded(names: Iterable[str], head: Head) -> Iterator[str]:
    """Yield the names of HEADs and segments that the newest HEAD makes superfluous."""
    named = {segment.name for segment in head.pinned()}
    for name in names:
        version = _version_of_head(name)
        is_old = version is not None and version <= head.version - KEPT_HEADS
        if is_old or (version_of(name) is not None and name not in named):
            yield name


def _put(directory: Path, head: H, there: HeadFile[H] | None, scratch: Path) -> HeadFile[H]:
    """Make a version the newest, if it is still the next.

    Raises:
        Busy: it is not.
    """
    assert head.version == next_version(there)
    content = head.to_bytes()
    if isinstance(directory, BucketPath):
        expected = None if there is None else bucket.Stamped(there.content, there.stamp or {})
        bucket.swap(directory / layout.HEAD, content, expected)
        return HeadFile(head, content)
    claim = _numbered_head(directory, head.version)
    try:
        atomic.write(claim, [content], scratch, new=True)
    except FileExistsError as error:
        raise Busy(f"{claim}: another process was faster; run the same again") from error
    # The name was free: nobody had it, or so many have committed since that it was cleared away.
    overtaken = _numbered(directory).heads[-1] >= head.version + KEPT_HEADS
    if overtaken or not _is_there(directory, there):
        claim.unlink(missing_ok=True)
        raise Busy(f"{directory}: others have replaced its HEAD meanwhile; run the same again")
    _copy_newest(directory, head.version, content, scratch)
    _clear(directory, head)
    return HeadFile(head, content)


def _is_there(directory: Path, there: HeadFile[H] | None) -> bool:
    """True if the folder still has a HEAD: it is not that of a store made anew meanwhile."""
    if there is None:
        return True
    for path in (_numbered_head(directory, there.head.version), directory / layout.HEAD):
        try:
            if path.read_bytes() == there.content:
                return True
        except FileNotFoundError:
            pass
    return False


def _copy_newest(directory: Path, version: int, content: bytes, scratch: Path) -> None:
    """Make HEAD the newest version: that of this process, or what others have committed since."""
    path = directory / layout.HEAD
    while True:
        if not path.is_file() or path.read_bytes() != content:
            atomic.write(path, [content], scratch)
        newest = max(_numbered(directory).heads, default=version)
        if newest <= version:
            return
        version, content = newest, _numbered_head(directory, newest).read_bytes()


def _clear(directory: Path, head: Head) -> None:
    """Delete what no reader wants once a HEAD is committed: old HEADs, and segments without one.

    A segment of that version or before that this HEAD does not name was merged, or is of a
    committer that was slower or killed: HEADs to come name it neither.
    """
    named = {segment.name for segment in head.pinned()}
    there = _numbered(directory)
    for version in there.heads:
        if version <= head.version - KEPT_HEADS:
            _numbered_head(directory, version).unlink(missing_ok=True)
    for version, names in there.segments.items():
        if version <= head.version:
            for name in set(names) - named:
                (directory / name).unlink(missing_ok=True)


def _numbered(directory: Path) -> _Numbered:
    """Look which HEADs and segments are there."""
    there = _Numbered([], {})
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return there
    for name in names:
        if (version := _version_of_head(name)) is not None:
            there.heads.append(version)
        elif (version := version_of(name)) is not None:
            there.segments.setdefault(version, []).append(name)
    there.heads.sort()
    return there


def _version_of_head(name: str) -> int | None:
    match = _NUMBERED.fullmatch(name)
    return None if match is None else int(match[1])


def _any_version(name: str) -> int | None:
    """Return the version in the name of a HEAD or of a segment; None if it is neither's."""
    version = _version_of_head(name)
    return version_of(name) if version is None else version


def _numbered_head(directory: Path, version: int) -> Path:
    return directory / f"{layout.HEAD}-{version:08d}"


def _read(path: Path, kind: type[H]) -> HeadFile[H] | None:
    """Read a HEAD file; None if there is none."""
    stamp = None
    try:
        if isinstance(path, BucketPath):
            found = bucket.read(path)
            if found is None:
                return None
            content, stamp = found.content, found.stamp
        else:
            content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        head = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        what = f"no HEAD of format 1 ({where}: {first['msg']})"
        raise Corrupt(f"{path}: {what}; {REPAIR}") from error
    if not sealed.is_whole(content, CHECKSUM):
        raise Corrupt(f"{path}: contents do not match the {CHECKSUM} in it; {REPAIR}")
    return HeadFile(head, content, stamp)
