"""Walks over folders and WebDataset tars of images, and what all walks have in common."""

import glob
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cache.files import place
from cache.files.bucket import BucketPath
from eupe.errors import BadInput
from pipelines.recipe.config import SourceConfig

# Part of the key rule (identity), hence a fixed list and not what the installed Pillow can read.
IMAGE_SUFFIXES = frozenset(
    [
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
LABEL_SUFFIXES = frozenset((".cls", ".json", ".txt"))


class Piece(NamedTuple):
    """A part of a source that is recognised as a whole: a tar, a Parquet file, a folder's images.

    Attributes:
        uri: relative to the base of the source; a folder's ends in "/".
        path: where it lies now.
        bytes: of the file, or of a folder's images together.
        stamp: of modification times, or entity tags in a bucket: other contents, another stamp.
        num_images: in it, where listing it tells.
    """

    uri: str
    path: Path
    bytes: int
    stamp: str
    num_images: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One image to look at.

    Attributes:
        sample_id: from its path, or the key column's value.
        uri: file, or `parquet:<column>:<file>`, relative to the base of the source.
        offset: of its bytes in the file, or the row's number.
        num_bytes: length of the image.
        labels: what the source says about it.
        data: its bytes; None where they are a file of their own, to be read by a worker.
        file: that file.
        fault: why it is no usable image, where the source itself can tell.
    """

    sample_id: str
    uri: str
    offset: int
    num_bytes: int
    labels: Mapping[str, str]
    data: bytes | None = None
    file: Path | None = None
    fault: str | None = None


class Walk(NamedTuple):
    """How a form of source is walked.

    Attributes:
        pieces: lists a source's pieces, opening none.
        num_images: in a piece, if that is cheaper than walking over them.
        candidates: walks over the wanted images of a piece.
    """

    pieces: Callable[[SourceConfig], list[Piece]]
    num_images: Callable[[Piece], int | None]
    candidates: Callable[[SourceConfig, Piece], Iterator[Candidate]]


def base(config: SourceConfig) -> Path:
    """Return the folder that the paths of a source are relative to.

    The source itself, the folder of the one file that it names, or the part of a pattern before
    its first sign.
    """
    path = place.root(config.path)
    if config.kind == "folder" or path.is_dir():
        return path
    if path.is_file():
        return path.parent
    plain = list(takewhile(lambda part: not any(sign in part for sign in "*?["), path.parts))
    return type(path)(*plain) if len(plain) < len(path.parts) else path.parent


def sample_id(path: str) -> str:
    """Return the sample id of an image's path: posix, without leading ./ and image extension."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    whole = PurePosixPath(*parts)
    return str(whole.with_suffix("") if whole.suffix.lower() in IMAGE_SUFFIXES else whole)


def folder_pieces(config: SourceConfig) -> list[Piece]:
    """List the folders of images below a folder: see `Walk`."""
    root = place.root(config.path)
    if not root.is_dir():
        raise BadInput(f"{config.path}: no such folder; source.path wants a folder of images")
    pieces, num_others, below = [], 0, [root]
    while below:
        folder = below.pop()
        folders, files = _scan(folder)
        below += [folder / name for name in folders[::-1] if not name.startswith(".")]
        images = [file for file in files if _is_image(file[0])]
        num_others += len(files) - len(images)
        if images:
            uri = f"{folder.relative_to(root).as_posix()}/"
            num_bytes = sum(size for _, size, _ in images)
            pieces.append(Piece(uri, folder, num_bytes, _stamp(images), len(images)))
    if not pieces:
        raise BadInput(
            f"{config.path}: no image in this folder ({num_others} other files); images are known "
            f"by extension: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return pieces


def folder_candidates(config: SourceConfig, piece: Piece) -> Iterator[Candidate]:
    """Walk over the images of one folder: see `Walk`."""
    for name, size, _ in _scan(piece.path)[1]:
        uri = f"{piece.uri.removeprefix('./')}{name}"
        labels = _class(uri)
        if _is_image(name) and wanted(config, labels):
            yield Candidate(sample_id(uri), uri, 0, size, labels, file=piece.path / name)


def _scan(folder: Path) -> tuple[list[str], list[tuple[str, int, str]]]:
    """Return the folders in a folder, and its files with size and stamp, in a fixed order."""
    if isinstance(folder, BucketPath):
        return folder.scan()
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                folders.append(entry.name)
                continue
            try:
                found = entry.stat()
            except FileNotFoundError:  # a link to nowhere: whoever reads it says so
                files.append((entry.name, 0, ""))
            else:
                files.append((entry.name, found.st_size, str(found.st_mtime_ns)))
    return sorted(folders), sorted(files)


def _stamp(files: Iterable[tuple[str, int, str]]) -> str:
    lines = "".join(f"{name}\t{size}\t{stamp}\n" for name, size, stamp in files)
    return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()


def webdataset_candidates(config: SourceConfig, piece: Piece) -> Iterator[Candidate]:
    """Walk over the images of one WebDataset tar: see `Walk`."""
    try:
        with place.opened(piece.path) as data, tarfile.open(fileobj=data, mode="r:") as tar:
            yield from _tar_candidates(config, tar, piece.uri)
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(f"{piece.path}: no whole uncompressed tar file ({error})") from error


def _tar_candidates(config: SourceConfig, tar: tarfile.TarFile, uri: str) -> Iterator[Candidate]:
    """Images of one tar, each with the labels of the members that share its name."""
    images: dict[str, tarfile.TarInfo] = {}
    beside: dict[str, list[tarfile.TarInfo]] = {}
    for member in tar:
        if not member.isfile():
            continue
        name = PurePosixPath(member.name)
        if _is_image(name.name):
            images[member.name] = member
        elif name.suffix.lower() in LABEL_SUFFIXES:
            beside.setdefault(sample_id(str(name.with_suffix(""))), []).append(member)
    for name_in_tar, member in images.items():
        identity = sample_id(name_in_tar)
        labels = _class("/".join(PurePosixPath(name_in_tar).parts).removeprefix("./"))
        for other in beside.get(identity, []):
            labels |= _label_file(other.name, _member_bytes(tar, other))
        if wanted(config, labels):
            data = _member_bytes(tar, member)
            yield Candidate(identity, uri, member.offset_data, member.size, labels, data)


def wanted(config: SourceConfig, labels: Mapping[str, str]) -> bool:
    """Return True if an image of these labels is one that the source is asked for."""
    return config.where.items() <= labels.items()


def file_pieces(config: SourceConfig, suffix: str) -> list[Piece]:
    """List the files of a source, each a piece of its own: see `Walk`."""
    files, where = files_of(config, suffix), base(config)
    if isinstance(where, BucketPath) and len(files) > place.FEW:
        listed: dict[Path, tuple[int, str]] = {
            path: (size, stamp) for path, size, stamp in where.described_below()
        }
        told = [listed[path] for path in files]
    else:
        told = [_describe(file) for file in files]
    return [
        Piece(file.relative_to(where).as_posix(), file, size, stamp)
        for file, (size, stamp) in zip(files, told, strict=True)
    ]


def _describe(file: Path) -> tuple[int, str]:
    """Return size and stamp of a file."""
    if isinstance(file, BucketPath):
        return file.describe()
    found = file.stat()
    return found.st_size, str(found.st_mtime_ns)


def files_of(config: SourceConfig, suffix: str) -> list[Path]:
    """Return the files of a source in a fixed order: of a folder, a glob, or the one named."""
    path = place.root(config.path)
    found: list[Path]
    if path.is_dir():
        found = (
            [file for file, _ in path.files_below() if file.suffix == suffix]
            if isinstance(path, BucketPath)
            else sorted(path.rglob(f"*{suffix}"))
        )
    elif path.is_file():
        found = [path]
    elif isinstance(path, BucketPath):
        bucket = type(path)(*path.parts[:2])
        found = sorted(bucket.glob(path.key))
    else:
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise BadInput(
            f"{config.path}: no {suffix} file there; source.path wants a {config.kind} file, a "
            "folder or a glob of them"
        )
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def _class(path: str) -> dict[str, str]:
    """Return the class folder as label, where an image lies in one."""
    top, separator, _ = path.partition("/")
    return {"label": top} if separator else {}


def _label_file(name: str, content: bytes) -> dict[str, str]:
    """Read the labels in a WebDataset member: .json's plain values, the text of .cls and .txt."""
    suffix = PurePosixPath(name).suffix.lower()
    text = content.decode(errors="replace").strip()
    if suffix != ".json":
        return {suffix[1:]: text}
    try:
        values = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{name}: labels are no JSON ({error})") from error
    if not isinstance(values, dict):
        return {}
    return {key: str(value) for key, value in values.items() if isinstance(value, str | int)}


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None  # only regular files are asked for
    return file.read()
