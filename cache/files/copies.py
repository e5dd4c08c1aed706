"""Working copies: folders that are worked on here, and lie in a bucket.

    <folder>/s3/<bucket>/<key>    the copy of s3://<bucket>/<key>; EUPE_RUN_COPIES names <folder>

What lies in the bucket counts, and the copy may be deleted when nothing runs. Files that stand each
for itself are here: sent as they are written, under their own names; a link is an object
`<name>.link` that says where it leads. Files that belong together are a tree (trees.py).
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from cache.files import atomic, bucket
from cache.files.bucket_path import SCHEMES, BucketPath, is_uri
from cache.files.refused import writing
from eupe.errors import BadInput

FOLDER_VARIABLE = "EUPE_RUN_COPIES"
LINK = ".link"
RECORD = ".copy.json"
"""In a copy: what of it is known to be as it is in the bucket."""
ABSENT = -1, -1
"""The stamp of a file that is not there."""


def folder() -> Path:
    """Return where working copies lie, whatever links lead there."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    named = os.environ.get(FOLDER_VARIABLE)
    return (Path(named).expanduser() if named else Path(home, "eupe", "runs")).resolve()


def local(name: str | Path) -> Path:
    """Return where a folder is worked on: itself, or the copy of what a URI names.

    Raises:
        BadInput: the URI leads upwards.
    """
    if not is_uri(str(name)):
        return Path(name)
    scheme, *rest = BucketPath(str(name)).parts
    if ".." in rest:
        raise BadInput(f"{BucketPath(str(name))}: wants a folder in the bucket, without '..'")
    return folder().joinpath(scheme.rstrip(":"), *rest)


def remote(path: Path) -> BucketPath | None:
    """Return what a path is the copy of, None for what lies in no bucket."""
    root, absolute = folder(), path.absolute()
    if not absolute.is_relative_to(root):
        return None
    scheme, *rest = (*absolute.relative_to(root).parts, "")
    if scheme not in SCHEMES or len(rest) < 3:
        return None
    return BucketPath(f"{scheme}://{'/'.join(rest[:-1])}")


def named(path: Path) -> Path:
    """Return a path as its user knows it: of a copy, what it is the copy of."""
    there = remote(path)
    return path if there is None else there


def write(path: Path, content: bytes, scratch: Path) -> None:
    """Write a file whole; of a copy in the bucket first.

    Args:
        path: of the file.
        content: of it.
        scratch: folder for the temporary file, on the same file system.

    Raises:
        StoreError: it cannot be written.
    """
    if (there := remote(path)) is not None:
        atomic.write(there, [content], scratch)
    atomic.write(path, [content], scratch)


def send_link(path: Path, leads_to: Path, scratch: Path) -> None:
    """Have a link of a copy in the bucket, too; the caller makes the one here.

    Args:
        path: of the link.
        leads_to: relative to its folder.
        scratch: folder for the temporary file.
    """
    if (there := remote(path)) is not None:
        text = leads_to.as_posix().encode()
        atomic.write(there.with_name(there.name + LINK), [text], scratch)


def bring_link(path: Path) -> bool:
    """Make a link as it is in the bucket; return False where there is none, or no bucket.

    Raises:
        StoreError: the bucket does not answer.
    """
    there = remote(path)
    if there is None:
        return False
    found = bucket.read(there.with_name(there.name + LINK))
    if found is None:
        return False
    with writing(path):
        atomic.make_directories(path.parent)
    _point(path, found.content.decode())
    return True


def bring(directory: Path) -> None:
    """Make the files and links of a folder those that are in the bucket; nothing for no copy.

    Folders in it, and files whose name begins with a dot, stay as they are.

    Raises:
        StoreError: the bucket does not answer, or the copy cannot be written.
    """
    there = remote(directory)
    if there is None:
        return
    with writing(directory):
        atomic.make_directories(directory)
        with one_at_a_time(directory):
            _bring(directory, there)


def _bring(directory: Path, there: BucketPath) -> None:
    record = directory / RECORD
    known, here = read_record(record), [*directory.iterdir()]  # before it is asked what is there
    files = {name: tag for name, _, tag in there.scan()[1] if not name.startswith(".")}
    links = {name.removesuffix(LINK) for name in files if name.endswith(LINK)}
    for path in here:
        if path.name.startswith(".") or (path.is_dir() and not path.is_symlink()):
            continue
        if path.name not in (links if path.is_symlink() else files):
            path.unlink(missing_ok=True)
    now = dict[str, Any]()
    for name, tag in files.items():
        path = directory / name.removesuffix(LINK)
        if known.get(name) != [tag, *stamp(path)]:
            content = bucket.read(there / name)
            if content is None:  # deleted meanwhile
                continue
            if name.endswith(LINK):
                _point(path, content.content.decode())
            else:
                atomic.write(path, [content.content], directory)
        now[name] = [tag, *stamp(path)]
    if now != known:
        atomic.write(record, [json.dumps(now).encode()], directory)


def _point(path: Path, leads_to: str) -> None:
    if path.is_symlink() and str(path.readlink()) == leads_to:
        return
    with writing(path):
        temporary = path.with_name(atomic.temporary_name(path.name))
        temporary.symlink_to(leads_to, target_is_directory=True)
        temporary.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """Return what a copy's record says, nothing where there is none or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stamp(path: Path) -> tuple[int, int]:
    """Return what changes with a file: size, and when it was written; of a link, its own."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return ABSENT
    return status.st_size, status.st_mtime_ns


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Be the one process of this machine that brings a copy inside the block."""
    with FileLock(directory.with_name(f".{directory.name}.bringing")):
        yield
