"""What lies in a cache root and is named by nothing: what killed and superseded work has left.

An orphan is older than any work that may still be about to name it. A builder writes the files of a
shard seconds before it commits them, and writes them anew if a killed one has left some; so a file
that nobody has written to for OLDER_THAN_SECONDS, and that no HEAD, record or sample table names,
will be named by nobody. A store whose HEAD or segments cannot be read has no orphans: it names less
than it holds, until it is mended.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cache.errors import StoreError
from cache.files import atomic, place
from cache.format import arrow_tables, layout
from cache.heads import read_head, superseded
from cache.manifest import Manifest
from cache.samples import Samples, SamplesHead
from cache.verify import Problem, all_folders

OLDER_THAN_SECONDS = atomic.ABANDONED_SECONDS


@dataclass(frozen=True)
class Orphan:
    """A file that nothing names.

    Attributes:
        path: of the file.
        num_bytes: its size.
        what: it is.
    """

    path: Path
    num_bytes: int
    what: str


@dataclass
class Found:
    """What nothing names, and where that cannot be told.

    Attributes:
        orphans: files that may go.
        untold: folders that are damaged; their files stay.
    """

    orphans: list[Orphan] = field(default_factory=list)
    untold: list[Problem] = field(default_factory=list)


def find(root: str | Path, older_than_seconds: float = OLDER_THAN_SECONDS) -> Found:
    """Find the orphans of a cache root.

    Args:
        root: the cache root.
        older_than_seconds: a file that was written to since is no orphan.

    Raises:
        NotBuilt: there is no such folder.
    """
    base, before = layout.cache_root(root), time.time() - older_than_seconds
    tables, stores = all_folders(base)
    never = {path.parent for path in base.glob("*/*/*/*/spec.json")}
    never |= {path.parent for path in base.glob("*/*/*/*/moments.arrow")}
    found = Found()
    looks = (
        *((directory, _of_samples) for directory in tables),
        *((directory, _of_store) for directory in stores),
        *((directory, _never_made) for directory in sorted(never - set(stores))),
    )
    for directory, unnamed in looks:
        try:
            files = {path: (size, at) for path, size, at in place.listing(directory)}
            own = [
                Orphan(path, files[path][0], what)
                for path, what in unnamed(directory, list(files))
                if files[path][1] <= before
            ]
        except StoreError as error:
            found.untold.append(Problem(directory, str(error).removeprefix(f"{directory}: ")))
            continue
        found.orphans += sorted(own, key=lambda orphan: orphan.path)
        scratch = layout.scratch_directory(directory)
        found.orphans += [
            Orphan(path, path.stat().st_size, "of a writer that is gone")
            for path in sorted(atomic.abandoned(scratch, older_than_seconds))
        ]
    return found


def remove(orphan: Orphan, older_than_seconds: float = OLDER_THAN_SECONDS) -> bool:
    """Delete an orphan; returns False if somebody has written to it meanwhile."""
    with suppress(FileNotFoundError):
        if orphan.path.stat().st_mtime > time.time() - older_than_seconds:
            return False
        orphan.path.unlink(missing_ok=True)
    return True


Unnamed = Iterator[tuple[Path, str]]
"""Files that nothing names, whatever their age, and what they are."""


def _of_samples(directory: Path, files: list[Path]) -> Unnamed:
    Samples.open(directory.parent.parent, directory.parent.name)  # is all of it whole?
    there = read_head(directory, SamplesHead)
    assert there is not None
    names = [path.name for path in files if path.parent == directory]
    for name in superseded(names, there.head):
        yield directory / name, "a segment or HEAD that no HEAD names"


def _of_store(directory: Path, files: list[Path]) -> Unnamed:
    manifest = Manifest.open(directory)
    committed: set[tuple[int, int]] = set()
    for table in manifest.tables():
        columns = (arrow_tables.to_numpy(table[name]).tolist() for name in ("view", "shard"))
        committed.update(zip(*columns, strict=True))
    views = {view for view, _ in committed}
    names = [path.name for path in files if path.parent == manifest.directory]
    for name in superseded(names, manifest.head):
        yield manifest.directory / name, "a segment or HEAD that no HEAD names"
    for path in files:
        number = path.parent.name.removeprefix("view-")
        if path.parent.parent != directory or not number.isdigit():
            continue
        shard = layout.shard_of(path)
        if shard is not None and shard not in committed:
            yield path, "of a shard that was never committed"
        array = layout.zarr_file(directory, int(number)), layout.codec_file(path.parent)
        if path in array and int(number) not in views:
            yield path, "of an array without a shard"


def _never_made(directory: Path, files: list[Path]) -> Unnamed:
    for named in (layout.spec_file, layout.moments_file, layout.codec_file):
        path = named(directory)
        if path in files:
            yield path, "of a store that was never made"
