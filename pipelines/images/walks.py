"""What all walks over a source have in common: pieces, candidates, ids and labels."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cache.files import place
from pipelines.images.aside import Aside
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
PATTERN_SIGNS = "*?[{"
NOT_UTF8 = "the name is not UTF-8"


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
        suffix: of the files that are its pieces; None: they are folders of images.
        num_images: in a piece, if that is cheaper than walking over them.
        candidates: walks over the wanted images of a piece.
    """

    suffix: str | None
    num_images: Callable[[Piece], int | None]
    candidates: Callable[[SourceConfig, Piece, Aside], Iterator[Candidate]]


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
    plain = list(
        takewhile(lambda part: not any(sign in part for sign in PATTERN_SIGNS), path.parts)
    )
    return type(path)(*plain) if len(plain) < len(path.parts) else path.parent


def sample_id(path: str) -> str:
    """Return the sample id of an image's path: posix, without leading ./ and image extension."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    whole = PurePosixPath(*parts)
    return str(whole.with_suffix("") if whole.suffix.lower() in IMAGE_SUFFIXES else whole)


def wanted(config: SourceConfig, labels: Mapping[str, str]) -> bool:
    """Return True if an image of these labels is one that the source is asked for."""
    return config.where.items() <= labels.items()


def is_hidden(name: str) -> bool:
    """Return True for names that nobody means: `.DS_Store`, `._photo.jpg`, `.cache`."""
    return name.startswith(".")


def is_image(name: str) -> bool:
    """Return True if a file of this name is looked at as an image."""
    return not is_hidden(name) and PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def class_label(path: str) -> dict[str, str]:
    """Return the class folder as label, where an image lies in one."""
    top, separator, _ = path.partition("/")
    return {"label": top} if separator else {}


def shown(name: str) -> str:
    """Return a name of the file system as text; what is not UTF-8 of it as escaped bytes."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def text(value: str) -> str:
    """Return a label as it can be kept: half of a surrogate pair, as JSON may hold, as U+FFFD."""
    if value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
