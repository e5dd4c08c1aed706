"""Anybody's pictures: a path to an image source, and the first few of one."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from cache.files import place
from eupe.errors import BadInput
from eupe.spec import CentreView
from eupe.views import Canvas, ImageError, make_view
from pipelines.images import columns, folders, index, looker, parquet
from pipelines.images.aside import Aside
from pipelines.recipe.config import ROW_KEY, SourceConfig

KINDS = {".tar": "webdataset", ".parquet": "parquet"}
"""How a file ends -> the kind of source it belongs to; others are a folder's."""


def source_of(
    path: str, image_column: str = "image", key_column: str | None = None
) -> SourceConfig:
    """Return the source that a path means: a folder of images, tars or Parquet files, or a glob.

    Of Parquet files every plain column but those of the images and keys is a label.

    Args:
        path: folder, file, or glob of files, here or in a bucket.
        image_column: of Parquet files.
        key_column: of Parquet files; None: the path beside the image's bytes, or row numbers
            where there is none.

    Raises:
        BadInput: nothing is there, a file that is no whole Parquet file, or a column of what has
            none.
    """
    kind = KINDS.get(Path(path).suffix) or _kind_of_folder(path)
    said = {"kind": kind, "path": path, "image_column": image_column, "key_column": key_column}
    try:
        bare = SourceConfig.model_validate(said)
    except ValidationError as error:  # columns of what has none
        raise BadInput(error.errors()[0]["msg"]) from error
    if kind != "parquet":
        return bare
    first = folders.files_of(bare, parquet.SUFFIX, Aside())[0]
    try:
        schema = place.using(first, pq.read_schema)
    except pa.ArrowException as error:
        raise BadInput(f"{first}: no whole Parquet file ({error})") from error
    labels = [
        field.name
        for field in schema
        if field.name not in (image_column, key_column)
        and not pa.types.is_nested(field.type)
        and not pa.types.is_binary(field.type)
    ]
    by_row = key_column is None and columns.field(schema, f"{image_column}.path") is None
    key = ROW_KEY if by_row else key_column
    return bare.model_copy(update={"label_columns": tuple(labels), "key_column": key})


def _kind_of_folder(path: str) -> str:
    """Return the kind of source that a folder is, by the first file in it that tells."""
    folder = place.root(path)
    if not folder.is_dir():
        return "folder"
    for suffix, kind in KINDS.items():
        if next(iter(folder.glob(f"*{suffix}")), None) is not None:
            return kind
    return "folder"


def first(source: SourceConfig, views: CentreView, count: int) -> list[Canvas]:
    """Return the centre views of the first pictures of a source, uint8 [C, C, 3] each.

    Raises:
        BadInput: there is none.
    """
    found: list[Canvas] = []
    for data in _bytes(source):
        try:
            found.append(make_view(data, views, "", 0).canvas)
        except ImageError:
            continue
        if len(found) == count:
            break
    if not found:
        raise BadInput(f"{source.path}: no usable image in this {source.kind} source")
    return found


def _bytes(source: SourceConfig) -> Iterator[bytes]:
    walk = looker.WALKS[source.kind]
    for piece in index.pieces(source):
        for candidate in walk.candidates(source, piece, Aside()):
            if candidate.data is not None:
                yield candidate.data
            elif candidate.file is not None:
                yield candidate.file.read_bytes()
