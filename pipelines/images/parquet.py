"""Parquet files of images: walked row by row, and row groups of images kept for reading again.

The address of a row is `parquet:<column>:<file>`, the file relative to the base of the source, and
its number in the file.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.files import place
from eupe.errors import BadInput
from pipelines.images.walks import Candidate, Piece, sample_id, wanted
from pipelines.recipe.config import SourceConfig

SCHEME = "parquet"
ROW_GROUP_BYTES = 2 << 30
"""Of row groups that a reader keeps: about those of a shuffle buffer (cache.order)."""


def is_row(uri: str) -> bool:
    """Return True if a sample's uri names a row of a Parquet file."""
    return uri.startswith(f"{SCHEME}:")


def file_name(uri: str) -> str:
    """Return the file of a row's uri."""
    return uri.split(":", 2)[2]


def column_name(uri: str) -> str:
    """Return the column of images in a row's uri."""
    return unquote(uri.split(":", 2)[1])


def num_rows(piece: Piece) -> int:
    """Return how many rows a Parquet file has.

    Raises:
        BadInput: it is no whole Parquet file.
    """
    try:
        rows: int = place.using(piece.path, pq.read_metadata).num_rows
    except pa.ArrowException as error:
        raise BadInput(f"{piece.path}: no whole Parquet file ({error})") from error
    return rows


def candidates(config: SourceConfig, piece: Piece) -> Iterator[Candidate]:
    """Walk over the rows of one Parquet file: see `walks.Walk`."""
    path = piece.path
    labels = sorted({*config.label_columns, *config.where})
    key = config.key_column or f"{config.image_column}.path"
    uri = f"{SCHEME}:{quote(config.image_column, safe='')}:{piece.uri}"
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
                _sample_id(config, path, n, value) for n, value in enumerate(keys.to_pylist(), row)
            ]
            labelled = [{name: str(value) for name, value in each.items()} for each in names]
            images: pa.Array | None = None
            for position, (identity, own) in enumerate(zip(ids, labelled, strict=True)):
                if not wanted(config, own):
                    continue
                if images is None:
                    column = file.read_row_group(group, columns=[config.image_column]).column(0)
                    images = _image_bytes(column)
                data = images[position].as_py()
                fault = "the row holds no image bytes" if data is None else None
                yield Candidate(
                    identity, uri, row + position, len(data or b""), own, data or b"", fault=fault
                )
            row += len(ids)


class RowGroups:
    """Images of Parquet row groups, the most recently used kept; safe to share between threads.

    They are kept because a row cannot be read alone.

    Args:
        max_bytes: of images kept; the row group just read is kept whatever its size.
    """

    def __init__(self, max_bytes: int = ROW_GROUP_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._groups: OrderedDict[tuple[Path, str, int], Future[pa.Array]] = OrderedDict()
        self._starts: dict[Path, list[int]] = {}
        self._lock = threading.Lock()

    def read(self, path: Path, column: str, row: int) -> bytes:
        """Return the image of one row, b"" if the file has no such row or no bytes in it.

        Args:
            path: of the file.
            column: of the images.
            row: its number in the file.

        Raises:
            OSError: there is no such file.
            NotBuilt: there is no such object.
            pyarrow.ArrowException: it is no Parquet file, or has no such column.
        """
        starts = self._starts.get(path)
        if starts is None:
            metadata = place.using(path, pq.read_metadata)
            lengths = (metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
            starts = self._starts[path] = list(accumulate(lengths, initial=0))
        if row >= starts[-1]:
            return b""
        group = bisect_right(starts, row) - 1
        images = self._group(path, column, group)
        return images[row - starts[group]].as_py() or b""

    def _group(self, path: Path, column: str, group: int) -> pa.Array:
        """Return the images of a row group; one of the threads that want it at once reads it."""
        key = path, column, group
        with self._lock:
            wanted = self._groups.get(key)
            mine = wanted is None
            if wanted is None:
                wanted = self._groups[key] = Future()
            self._groups.move_to_end(key)
        if not mine:
            return wanted.result()
        try:
            with place.using(path, pq.ParquetFile) as file:
                images = _image_bytes(file.read_row_group(group, [column]).column(0))
        except BaseException as error:
            with self._lock:
                del self._groups[key]
            wanted.set_exception(error)
            raise
        wanted.set_result(images)
        with self._lock:
            self._num_bytes += images.nbytes
            for old in [each for each, found in self._groups.items() if found.done()][:-1]:
                if self._num_bytes <= self._max_bytes:
                    break
                self._num_bytes -= self._groups.pop(old).result().nbytes
        return images


def _sample_id(config: SourceConfig, path: Path, row: int, value: object) -> str:
    if value is None:
        raise BadInput(f"{path}: row {row} has no path; name source.key_column to be the sample_id")
    return str(value) if config.key_column else sample_id(str(value))


def _leaves(schema: pa.Schema) -> Iterable[str]:
    for field in schema:
        if pa.types.is_struct(field.type):
            yield from (f"{field.name}.{inner.name}" for inner in field.type)
        else:
            yield field.name


def _image_bytes(column: pa.ChunkedArray) -> pa.Array:
    """Return the binary values of an image column: itself, or the `bytes` of its structs."""
    array = column.combine_chunks()
    if pa.types.is_struct(array.type):
        array = pc.struct_field(array, "bytes")
    return array
