"""Trees: folders in a bucket whose files belong together, written by one process at a time.

    <tree>/HEAD                     which files it has: name -> size, sha256, object; whose it is
          /<number>-<random>/<name> a file, as it was sent with that number and not changed since

HEAD is replaced by compare and swap, after all that it names is there. What it does not name does
not exist: an upload that was cut off is nothing. Whoever begins to write puts a mark of its own
into HEAD (`taken`), so that nothing more comes from a process that was silent and is followed by
another one. Each works on a copy on its own disk (cache/files/copies.py), which `bring` makes equal
to HEAD. Names that begin with a dot, locks and LEFT_OUT stay on that disk.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout

from cache.errors import Busy, Corrupt, StoreError
from cache.files import atomic, bucket, copies, sealed
from cache.files.bucket import Stamped
from cache.files.bucket_path import BucketPath
from cache.files.refused import writing

HEAD, CHECKSUM = "HEAD", "head_sha256"
FORMAT = 1
LEFT_OUT = "ray"
"""A folder that Ray Train keeps; nothing of ours is in it."""
TRIES = 8
"""Files may be superseded while they are fetched; so often in a row they are not."""
ABANDONED_SECONDS = 24 * 3600.0
"""An object that no HEAD names, and that is so old, was left by a killed process."""
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class File:
    """A file of a tree.

    Attributes:
        num_bytes: its size.
        sha256: of its contents.
        at: name of its object below the tree.
    """

    num_bytes: int
    sha256: str
    at: str


@dataclass(frozen=True)
class Head:
    """What a tree is.

    Attributes:
        number: how often HEAD was replaced.
        files: name -> file.
        stamp: of the object HEAD; None where there is none.
    """

    number: int
    files: dict[str, File]
    stamp: dict[str, str] | None


def bring(tree: Path) -> None:
    """Make the copy of a tree what its HEAD says, unless a process of this machine writes to it.

    Nothing for what is no copy.

    Raises:
        Corrupt: an object or HEAD is not what was sent.
        StoreError: the bucket does not answer, or the copy cannot be written.
    """
    tree, there = _placed(tree)
    if there is None:
        return
    with writing(tree):
        atomic.make_directories(tree.parent)
        with copies.one_at_a_time(tree):
            try:
                idle = _writer(tree).acquire(timeout=0)
            except Timeout:
                return  # what it has is at least as new
            with idle:
                _bring(tree, there)


@contextmanager
def taken(tree: Path) -> Iterator[None]:
    """Be the one who writes to a tree inside the block, of all processes on all machines.

    Hold a lease on it: whoever takes it next makes this one's `publish` fail.

    Raises:
        Corrupt: as for `bring`.
        StoreError: as for `bring`.
    """
    tree, there = _placed(tree)
    if there is None:
        yield
        return
    with writing(tree):
        atomic.make_directories(tree.parent)
    lock = _writer(tree)
    with lock:
        with writing(tree), copies.one_at_a_time(tree):
            head = _bring(tree, there)
        _replace(tree, there, head.number + 1, head.files, head.stamp)
        _sweep(there, head)
        yield


def publish(tree: Path) -> None:
    """Send what is new of a tree, then let HEAD say so, then delete what it no longer names.

    Nothing for what is no copy. A file is looked at again only if its size or time has changed.

    Raises:
        Busy: another process has taken the tree.
        StoreError: it cannot be sent.
    """
    tree, there = _placed(tree)
    if there is None:
        return
    record = copies.read_record(tree / copies.RECORD)
    if "stamp" not in record:
        raise StoreError(f"{there}: this machine's copy was never taken; run the same again")
    number, known = record["number"] + 1, _known(tree, record)
    folder, files = f"{number:06d}-{secrets.token_hex(4)}", dict[str, File]()
    for name in _names(tree):
        files[name] = known.get(name) or _send(tree / name, there, f"{folder}/{name}")
    before = {name: File(*each[:3]) for name, each in record["files"].items()}
    if files == before:
        return
    _replace(tree, there, number, files, record["stamp"])
    for old in before.values():
        if old not in files.values():
            with suppress(StoreError):  # it is in nobody's way: `_sweep` finds it
                (there / old.at).unlink()


def _placed(tree: Path) -> tuple[Path, BucketPath | None]:
    """Return a tree, whatever link leads there, and what it is the copy of."""
    found = tree.resolve()
    return found, copies.remote(found)


def _bring(tree: Path, there: BucketPath) -> Head:
    for _ in range(TRIES):
        head = _read(there)
        if head.stamp is None and not (tree / copies.RECORD).exists():
            return head  # nor is there a copy of one
        try:
            _make_equal(tree, there, head)
        except FileNotFoundError:  # superseded meanwhile
            continue
        _note(tree, head)
        return head
    raise StoreError(f"{there}: objects that its HEAD names are not there; restore them")


def _make_equal(tree: Path, there: BucketPath, head: Head) -> None:
    """Bring what is missing of a tree, and remove what is too much; folders appear whole."""
    known = _known(tree, copies.read_record(tree / copies.RECORD))
    wanted = dict[str, File]()
    for name, file in head.files.items():
        have = known.get(name)
        if have is None or have.sha256 != file.sha256:
            path = tree / name
            if copies.stamp(path)[0] != file.num_bytes or _sha256(path) != file.sha256:
                wanted[name] = file
    folders = {str(folder) for name in head.files for folder in PurePosixPath(name).parents}
    for name in [*_names(tree)]:
        folder = os.path.dirname(name)
        if name in head.files:
            continue
        if not folder or folder in folders:
            (tree / name).unlink(missing_ok=True)
        elif (tree / folder).is_dir():  # nameless before its first file goes
            nameless = (tree / folder).with_name(_TEMPORARY + secrets.token_hex(4))
            shutil.rmtree((tree / folder).rename(nameless))
    for folder in sorted({os.path.dirname(name) for name in wanted}):
        inside = {n: file for n, file in wanted.items() if os.path.dirname(n) == folder}
        _fetch(tree / folder, there, inside)


def _fetch(folder: Path, there: BucketPath, files: dict[str, File]) -> None:
    """Fetch files of one folder; a folder that is not there appears with all of them."""
    atomic.make_directories(folder.parent)
    temporary = folder.with_name(_TEMPORARY + secrets.token_hex(4))
    temporary.mkdir()
    try:
        for name, file in files.items():
            with (temporary / os.path.basename(name)).open("wb") as into:
                got = bucket.receive(there / file.at, into, file.num_bytes)
                os.fsync(into.fileno())
            if got != (file.num_bytes, file.sha256):
                raise Corrupt(
                    f"{there / file.at}: contents do not match the sha256 in {HEAD}: it was "
                    "changed or damaged; restore it, or remove the whole folder to begin anew"
                )
        if not folder.exists():
            temporary.rename(folder)
            return
        for path in temporary.iterdir():
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _send(path: Path, there: BucketPath, at: str) -> File:
    """Send a file; return what was sent of it."""
    for _ in range(TRIES):
        before = copies.stamp(path)
        sha256 = _sha256(path)
        bucket.send(path, there / at)
        if copies.stamp(path) == before:
            return File(before[0], sha256, at)
    raise StoreError(f"{path}: was written to while it was sent; run the same again")


def _replace(
    tree: Path,
    there: BucketPath,
    number: int,
    files: dict[str, File],
    stamp: dict[str, str] | None,
) -> None:
    """Replace a tree's HEAD, if it is the one that this process knows, and note it here."""
    said: dict[str, object] = {
        "format": FORMAT,
        "number": number,
        "mark": secrets.token_hex(8),
        "files": {name: asdict(file) for name, file in files.items()},
    }
    expected = None if stamp is None else Stamped(b"", stamp)
    try:
        new = bucket.swap(there / HEAD, sealed.seal(said, CHECKSUM), expected)
    except Busy as error:
        raise Busy(
            f"{there}: another process has taken it over, because this one was silent for long; "
            "what this one did since its last checkpoint does not count: run the same again"
        ) from error
    _note(tree, Head(number, files, new))


def _read(there: BucketPath) -> Head:
    path = there / HEAD
    found = bucket.read(path)
    if found is None:
        return Head(0, {}, None)
    if not sealed.is_whole(found.content, CHECKSUM):
        raise Corrupt(f"{path}: contents do not match the {CHECKSUM} in it; restore it")
    said = json.loads(found.content)
    if said["format"] != FORMAT:
        raise StoreError(f"{path}: format {said['format']!r}; this version reads {FORMAT}")
    files = {name: File(**each) for name, each in said["files"].items()}
    for name in files:
        if name.startswith("/") or {"", ".."} & {*name.split("/")}:
            raise Corrupt(f"{path}: names a file outside of its folder, {name!r}; restore it")
    return Head(said["number"], files, found.stamp)


def _note(tree: Path, head: Head) -> None:
    """Write down that a copy is what a HEAD says."""
    text = json.dumps(
        {
            "number": head.number,
            "stamp": head.stamp,
            "files": {
                name: [file.num_bytes, file.sha256, file.at, *copies.stamp(tree / name)]
                for name, file in head.files.items()
            },
        }
    )
    with writing(tree):
        atomic.write(tree / copies.RECORD, [text.encode()], tree / ".tmp")


def _known(tree: Path, record: dict[str, Any]) -> dict[str, File]:
    """Return the files of a copy that are as its record says."""
    return {
        name: File(*each[:3])
        for name, each in record.get("files", {}).items()
        if tuple(each[3:]) == copies.stamp(tree / name) != copies.ABSENT
    }


def _names(tree: Path) -> Iterator[str]:
    """Yield the names of a copy's files that belong in the bucket."""
    for folder, below, names in os.walk(tree):
        inside = Path(folder).relative_to(tree)
        below[:] = [
            each
            for each in sorted(below)
            if not each.startswith(".") and (inside / each).as_posix() != LEFT_OUT
        ]
        for name in sorted(names):
            if not name.startswith(".") and not name.endswith(".lock"):
                yield (inside / name).as_posix()


def _sweep(there: BucketPath, head: Head) -> None:
    """Delete objects of a tree that killed processes left."""
    named = {there / file.at for file in head.files.values()} | {there / HEAD}
    for path, _, written in there.listing():
        if path not in named and time.time() - written > ABANDONED_SECONDS:
            path.unlink()


def _writer(tree: Path) -> FileLock:
    """Return the lock that the process of this machine holds that writes to a tree."""
    return FileLock(tree.with_name(f".{tree.name}.writing"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
