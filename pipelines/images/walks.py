"""Walks over folders and WebDataset tars of images, and what all walks have in common."""

import glob
import json
import os
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

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


@dataclass(frozen=True)
class Candidate:
    """One image to look at.

    Attributes:
        sample_id: from its path, or the key column's value.
        uri: file, or `parquet:<column>:<file>`.
        offset: of its bytes in the file, or the row's number.
        num_bytes: length of the image.
        labels: what the source says about it.
        data: its bytes; None where they are a file of their own, to be read by a worker.
        fault: why it is no usable image, where the source itself can tell.
    """

    sample_id: str
    uri: str
    offset: int
    num_bytes: int
    labels: Mapping[str, str]
    data: bytes | None = None
    fault: str | None = None


def sample_id(path: str) -> str:
    """Return the sample id of an image's path: posix, without leading ./ and image extension."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    whole = PurePosixPath(*parts)
    return str(whole.with_suffix("") if whole.suffix.lower() in IMAGE_SUFFIXES else whole)


class Walk(Protocol):
    """Lists the images of a source."""

    def __call__(
        self, config: SourceConfig, known: Collection[str]
    ) -> tuple[int | None, Iterator[Candidate]]:
        """Return how many candidates there are, if that is known, and the candidates.

        Those whose id is in `known` need no bytes.
        """
        ...


def folder(config: SourceConfig, known: Collection[str]) -> tuple[int | None, Iterator[Candidate]]:
    """List the images of a folder: see `Walk`."""
    root = place.root(config.path)
    if not root.is_dir():
        raise BadInput(f"{config.path}: no such folder; source.path wants a folder of images")
    sizes: dict[Path, int] = {}
    if isinstance(root, BucketPath):
        sizes = _in_walking_order(root, dict(root.files_below()))
        files = [file for file in sizes if _is_image(file.name)]
        others = len(sizes) - len(files)
    else:
        files, others = [], 0
        for directory, subdirectories, names in os.walk(root, followlinks=True):
            subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
            images = [name for name in names if _is_image(name)]
            others += len(names) - len(images)
            files += [Path(directory, name) for name in sorted(images)]
    if not files:
        raise BadInput(
            f"{config.path}: no image in this folder ({others} other files); images are known by "
            f"extension: {' '.join(sorted(IMAGE_SUFFIXES))}"
        )

    def candidates() -> Iterator[Candidate]:
        for file in files:
            relative = file.relative_to(root).as_posix()
            size = sizes[file] if sizes else file.stat().st_size
            yield Candidate(sample_id(relative), str(file), 0, size, _class(relative))

    return len(files), candidates()


def _in_walking_order(root: Path, sizes: Mapping[BucketPath, int]) -> dict[Path, int]:
    """Order a bucket's objects as a folder is walked: files first, then folders; none hidden."""

    def order(path: Path) -> list[tuple[bool, str]]:
        *folders, name = path.relative_to(root).parts
        return [*((True, folder) for folder in folders), (False, name)]

    shown = [p for p in sizes if not any(f[0] == "." for f in p.relative_to(root).parts[:-1])]
    return {path: sizes[path] for path in sorted(shown, key=order)}


def webdataset(
    config: SourceConfig, known: Collection[str]
) -> tuple[int | None, Iterator[Candidate]]:
    """List the images of WebDataset tars: see `Walk`."""
    files = files_of(config, ".tar")

    def candidates() -> Iterator[Candidate]:
        for file in files:
            try:
                with place.opened(file) as data, tarfile.open(fileobj=data, mode="r:") as tar:
                    yield from _tar_candidates(tar, str(file), known)
            except (tarfile.TarError, EOFError) as error:
                raise BadInput(f"{file}: no whole uncompressed tar file ({error})") from error

    return None, candidates()


def _tar_candidates(tar: tarfile.TarFile, path: str, known: Collection[str]) -> Iterator[Candidate]:
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
        data = None if identity in known else _member_bytes(tar, member)
        yield Candidate(identity, path, member.offset_data, member.size, labels, data)


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
