"""The walk over folders: of images, and of the files that other sources are kept in.

Each folder is walked once: those that lie there first, then those that a link leads to. A link to a
folder that was walked, its own parent say, is said and not followed.
"""

import glob
import hashlib
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import bracex

from cache.files import place
from cache.files.bucket_path import BucketPath
from eupe.errors import BadInput
from pipelines.images.aside import Aside
from pipelines.images.walks import (
    IMAGE_SUFFIXES,
    NOT_UTF8,
    PATTERN_SIGNS,
    Candidate,
    Piece,
    base,
    class_label,
    is_hidden,
    is_image,
    sample_id,
    shown,
    wanted,
)
from pipelines.recipe.config import SourceConfig

MOST_NAMES = 1_000_000
"""Files that a list in braces may name."""
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class File(NamedTuple):
    """A file as its folder lists it.

    Attributes:
        name: in its folder.
        bytes: of it.
        stamp: of its modification time, or its entity tag in a bucket.
        fault: why it cannot be read, else None.
    """

    name: str
    bytes: int
    stamp: str
    fault: str | None = None


class Listed(NamedTuple):
    """What lies in one folder, each in a fixed order; `links` lead to folders."""

    folders: list[str]
    links: list[str]
    files: list[File]


def pieces(config: SourceConfig, aside: Aside) -> list[Piece]:
    """List the folders of images below a folder: see `walks.Walk`."""
    found = list(_pieces(config, aside))
    if not found:
        raise _no_image(config, aside)
    return found


def first_piece(config: SourceConfig, aside: Aside) -> Piece:
    """Return the first of `pieces`; no more folders are listed than lead to it.

    Raises:
        BadInput: as `pieces`.
    """
    found = next(_pieces(config, aside), None)
    if found is None:
        raise _no_image(config, aside)
    return found


def _pieces(config: SourceConfig, aside: Aside) -> Iterator[Piece]:
    root = _folder(config)
    for folder, listed in _walked(root, aside):
        images = [file for file in listed.files if is_image(file.name)]
        for file in listed.files:
            if not is_image(file.name) and not is_hidden(file.name):
                _left_aside(folder, file, aside)
        if images:
            uri = shown(f"{folder.relative_to(root).as_posix()}/")
            num_bytes = sum(file.bytes for file in images)
            yield Piece(uri, folder, num_bytes, _stamp(images), len(images))


def _no_image(config: SourceConfig, aside: Aside) -> BadInput:
    others = "; ".join(aside.lines())
    return BadInput(
        f"{config.path}: no image in this folder ({others or 'nothing else either'}); images "
        f"are known by extension: {' '.join(sorted(IMAGE_SUFFIXES))}"
    )


def candidates(config: SourceConfig, piece: Piece, aside: Aside) -> Iterator[Candidate]:
    """Walk over the images of one folder: see `walks.Walk`."""
    below = piece.path.relative_to(place.root(config.path)).as_posix()
    for file in _scan(piece.path).files:
        if not is_image(file.name):
            continue
        name = file.name if below == "." else f"{below}/{file.name}"
        uri = shown(name)
        labels = class_label(uri)
        if not wanted(config, labels):
            continue
        fault = file.fault if uri == name else NOT_UTF8
        identity = sample_id(uri) if uri == name else uri
        yield Candidate(
            identity, uri, 0, file.bytes, labels, file=piece.path / file.name, fault=fault
        )


def file_pieces(config: SourceConfig, suffix: str, aside: Aside) -> list[Piece]:
    """List the files of a source, each a piece of its own: see `walks.Walk`."""
    files, where = files_of(config, suffix, aside), base(config)
    if isinstance(where, BucketPath) and len(files) > place.FEW:
        listed: dict[Path, tuple[int, str]] = {
            path: (size, stamp) for path, size, stamp in where.described_below()
        }
        told = [listed[path] for path in files]
    else:
        told = [_describe(file) for file in files]
    return [
        Piece(_uri(file, where), file, size, stamp)
        for file, (size, stamp) in zip(files, told, strict=True)
    ]


def files_of(config: SourceConfig, suffix: str, aside: Aside) -> list[Path]:
    """Return the files of a source in a fixed order: of a folder, of patterns, or the one named.

    Raises:
        BadInput: there is none, one that is named is not there, or one is no file.
    """
    path = place.root(config.path)
    found: list[Path]
    if _is_folder(config):
        found = _files_below(path, suffix, aside)
    elif path.is_file():
        found = [path]
    else:
        found = _matching(config, path)
    if not found:
        raise BadInput(
            f"{config.path}: no {suffix} file there{_others(aside)}; source.path wants a "
            f"{config.kind} file, a folder of them, or a pattern such as "
            f"data/train-{{000..099}}{suffix} or data/*{suffix}"
        )
    return sorted(found)


def check_there(config: SourceConfig, suffix: str | None) -> None:
    """Refuse a source that is not there, listing no folder.

    Args:
        config: the source.
        suffix: of its files; None where it is a folder of images.

    Raises:
        BadInput: naming it.
    """
    if suffix is None:
        _folder(config)
    elif not _is_folder(config):
        files_of(config, suffix, Aside())


def _folder(config: SourceConfig) -> Path:
    if not _is_folder(config):
        raise BadInput(f"{config.path}: no such folder; source.path wants a folder of images")
    return place.root(config.path)


def _is_folder(config: SourceConfig) -> bool:
    try:
        return place.root(config.path).is_dir()
    except PermissionError as error:
        raise BadInput(
            f"{config.path}: a folder on the way there may not be entered ({error.strerror}); "
            "allow it, or name another source.path"
        ) from error


def _walked(root: Path, aside: Aside) -> Iterator[tuple[Path, Listed]]:
    """Yield a folder and all below it, each once whatever links lead to it."""
    local = not isinstance(root, BucketPath)
    tops = [os.path.realpath(root) if local else str(root)]  # of what is walked whole
    below, links = [(root, tops[0])], deque[Path]()
    while below or links:
        if below:
            folder, real = below.pop()
        else:
            folder = links.popleft()
            real = os.path.realpath(folder)
            if any(_is_below(real, top) for top in tops):
                aside.say(f"{folder}: a link to {real}, whose images are there without it")
                continue
            tops.append(real)
        listed = _scan(folder)
        yield folder, listed
        for name in reversed(listed.folders):
            inside = f"{real}/{name}"
            if inside in tops:
                aside.say(f"{folder / name}: its images are there through another link")
            elif not is_hidden(name):
                below.append((folder / name, inside))
        links += [folder / name for name in listed.links if not is_hidden(name)]


def _is_below(path: str, top: str) -> bool:
    """Return True if a walk over `top` comes to a folder."""
    if not PurePosixPath(path).is_relative_to(top):
        return False
    return not any(map(is_hidden, PurePosixPath(path).relative_to(top).parts))


def _scan(folder: Path) -> Listed:
    """List a folder.

    Raises:
        BadInput: that is not allowed.
    """
    if isinstance(folder, BucketPath):
        prefixes, objects = folder.scan()
        return Listed(prefixes, [], [File(*each) for each in objects])
    folders: list[str] = []
    links: list[str] = []
    files: list[File] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif isinstance(file := _file(entry), File):
                    files.append(file)
                else:
                    links.append(entry.name)
    except OSError as error:
        raise BadInput(
            f"{shown(str(folder))}: this folder cannot be listed ({error.strerror}); allow it to "
            "be read, or name a source.path without it"
        ) from error
    return Listed(sorted(folders), sorted(links), sorted(files))


def _file(entry: "os.DirEntry[str]") -> File | None:
    """Look at what is no folder; None for a link to one."""
    try:
        found = entry.stat()
    except OSError as error:
        what = "a link to nowhere" if entry.is_symlink() else "it cannot be looked at"
        return File(entry.name, 0, "", f"{what} ({error.strerror})")
    if stat.S_ISDIR(found.st_mode):
        return None
    if not stat.S_ISREG(found.st_mode):
        return File(entry.name, 0, "", f"no file but {_KINDS[stat.S_IFMT(found.st_mode)]}")
    return File(entry.name, found.st_size, str(found.st_mtime_ns))


def _left_aside(folder: Path, file: File, aside: Aside) -> None:
    """Count a file that is none of those looked for; a broken link may have been a folder."""
    if file.fault:
        aside.say(f"{shown(str(folder / file.name))}: {file.fault}")
    else:
        aside.file(file.name)


def _stamp(files: Iterable[File]) -> str:
    lines = "".join(f"{name}\t{size}\t{stamp}\n" for name, size, stamp, _ in files)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def _files_below(root: Path, suffix: str, aside: Aside) -> list[Path]:
    """Return the files of a suffix below a folder."""
    if isinstance(root, BucketPath):
        names = [path for path, _ in root.files_below()]
        for path in names:
            if path.suffix != suffix:
                aside.file(path.name)
        return [path for path in names if path.suffix == suffix]
    found = []
    for folder, listed in _walked(root, aside):
        for file in listed.files:
            if is_hidden(file.name):
                continue
            if PurePosixPath(file.name).suffix == suffix:
                found.append(folder / file.name)
            else:
                _left_aside(folder, file, aside)
    return found


def _matching(config: SourceConfig, path: Path) -> list[Path]:
    """Return the files that a pattern names; each name of a list in braces has to be there.

    Raises:
        BadInput: one is not.
    """
    names = bracex.expand(str(path), limit=MOST_NAMES) if "{" in str(path) else [str(path)]
    there: set[str] | None = None
    if isinstance(path, BucketPath) and len(names) > place.FEW:
        there = {str(file) for file, _ in base(config).files_below()}  # type: ignore[attr-defined]
    found: dict[Path, None] = {}
    missing = []
    for name in names:
        literal = place.root(name)
        if literal.is_file() if there is None else name in there:
            matches = [literal]
        else:
            matches = _globbed(name) if there is None or _is_pattern(name) else []
        found.update(dict.fromkeys(matches))
        if not matches:
            missing.append(name)
    if missing and len(names) > 1:
        raise BadInput(
            f"{config.path}: {len(missing)} of its {len(names)} names are not there, the first is "
            f"{missing[0]}"
        )
    return list(found)


def _globbed(name: str) -> list[Path]:
    path = place.root(name)
    if isinstance(path, BucketPath):
        return list(type(path)(*path.parts[:2]).glob(path.key))
    return [file for each in glob.iglob(name, recursive=True) if not (file := Path(each)).is_dir()]


def _is_pattern(name: str) -> bool:
    return any(sign in name for sign in PATTERN_SIGNS)


def _others(aside: Aside) -> str:
    lines = "; ".join(aside.lines())
    return f" ({lines})" if lines else ""


def _describe(file: Path) -> tuple[int, str]:
    """Return size and stamp of a file.

    Raises:
        BadInput: it is none.
    """
    if isinstance(file, BucketPath):
        return file.describe()
    try:
        found = file.stat()
    except OSError as error:
        raise BadInput(f"{shown(str(file))}: a link to nowhere ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise BadInput(f"{shown(str(file))}: no file but {_KINDS[stat.S_IFMT(found.st_mode)]}")
    return found.st_size, str(found.st_mtime_ns)


def _uri(file: Path, where: Path) -> str:
    uri = file.relative_to(where).as_posix()
    if shown(uri) != uri:
        raise BadInput(f"{shown(str(file))}: {NOT_UTF8}; give it another name")
    return uri
