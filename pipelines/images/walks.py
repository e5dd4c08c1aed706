"""The three forms of image sources: walks over folders, WebDataset tars and Parquet files."""

import glob
import json
import os
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
PARQUET_SCHEME = "parquet"


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


def _folder(config: SourceConfig, known: Collection[str]) -> tuple[int | None, Iterator[Candidate]]:
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


def _webdataset(
    config: SourceConfig, known: Collection[str]
) -> tuple[int | None, Iterator[Candidate]]:
    files = _files(config, ".tar")

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


def _parquet(
    config: SourceConfig, known: Collection[str]
) -> tuple[int | None, Iterator[Candidate]]:
    files = _files(config, ".parquet")
    try:
        total = sum(place.using(file, pq.read_metadata).num_rows for file in files)
    except pa.ArrowException as error:
        raise BadInput(f"{config.path}: no whole Parquet file ({error})") from error

    def candidates() -> Iterator[Candidate]:
        for file in files:
            yield from _parquet_candidates(config, file, known)

    return None if config.where else total, candidates()


def _parquet_candidates(
    config: SourceConfig, path: Path, known: Collection[str]
) -> Iterator[Candidate]:
    labels = sorted({*config.label_columns, *config.where})
    key = config.key_column or f"{config.image_column}.path"
    uri = f"{PARQUET_SCHEME}:{quote(config.image_column, safe='')}:{path}"
    with place.using(path, pq.ParquetFile) as file:
        have = {part for name in _leaves(file.schema_arrow) for part in (name, name.split(".")[0])}
        for column in (config.image_column, key, *labels):
            if column not in have:
                raise BadInput(f"{path}: no column {column!r}; there are {', '.join(sorted(have))}")
        row = 0
        for group in range(file.num_row_groups):
            light = file.read_row_group(group, columns=[key, *labels])
            keys = light.column(0) if config.key_column is None else light[key]
            if config.key_column is None:
                keys = pc.struct_field(keys, "path")
            names = light.select(labels).to_pylist()
            ids = [
                _parquet_id(config, path, n, value) for n, value in enumerate(keys.to_pylist(), row)
            ]
            wanted = [{name: str(value) for name, value in each.items()} for each in names]
            images: pa.Array | None = None
            for position, (identity, own) in enumerate(zip(ids, wanted, strict=True)):
                data, fault = b"", None
                if identity not in known and config.where.items() <= own.items():
                    if images is None:
                        column = file.read_row_group(group, columns=[config.image_column]).column(0)
                        images = image_bytes(column)
                    data = images[position].as_py()
                    fault = "the row holds no image bytes" if data is None else None
                yield Candidate(identity, uri, row, len(data or b""), own, data or b"", fault)
                row += 1


WALKS: dict[str, Walk] = {
    "folder": _folder,
    "webdataset": _webdataset,
    "parquet": _parquet,
}


def _files(config: SourceConfig, suffix: str) -> list[Path]:
    """Return the files of a source in a fixed order: of a folder, a glob, or the one named."""
    path = place.root(config.path)
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


def _parquet_id(config: SourceConfig, path: Path, row: int, value: object) -> str:
    if value is None:
        raise BadInput(f"{path}: row {row} has no path; name source.key_column to be the sample_id")
    return str(value) if config.key_column else sample_id(str(value))


def _leaves(schema: pa.Schema) -> Iterable[str]:
    for field in schema:
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)
        else:
            yield field.name


def image_bytes(column: pa.ChunkedArray) -> pa.Array:
    """Return the binary values of an image column: itself, or the `bytes` of its structs."""
    array = column.combine_chunks()
    if pa.types.is_struct(array.type):
        array = pc.struct_field(array, "bytes")
    return array
