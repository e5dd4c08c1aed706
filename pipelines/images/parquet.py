"""Parquet files of images: walked row by row, and row groups of images kept for reading again.

The address of a row is `parquet:<column>:<file>`, the file relative to the base of the source, and
its number in the file.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from cache.files import place
from eupe.errors import BadInput
from pipelines.images import columns
from pipelines.images.aside import Aside
from pipelines.images.walks import Candidate, Piece, sample_id, wanted
from pipelines.recipe.config import ROW_KEY, SourceConfig

SCHEME = "parquet"
SUFFIX = ".parquet"
IMAGE_ROWS = 16
"""Images that are decoded from a Parquet file at once: of up to 128 MiB each."""
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


def candidates(config: SourceConfig, piece: Piece, aside: Aside) -> Iterator[Candidate]:
    """Walk over the rows of one Parquet file: see `walks.Walk`."""
    try:
        yield from _rows(config, piece)
    except UnicodeDecodeError as error:
        raise BadInput(f"{piece.path}: a key or label is no UTF-8 ({error})") from error
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{piece.path}: no whole Parquet file ({error})") from error


def _rows(config: SourceConfig, piece: Piece) -> Iterator[Candidate]:
    uri = f"{SCHEME}:{quote(config.image_column, safe='')}:{piece.uri}"
    labels = sorted({*config.label_columns, *config.where})
    with place.using(piece.path, pq.ParquetFile) as file:
        key = columns.checked(piece.path, file.schema_arrow, config, labels)
        names = columns.class_names(file.schema_arrow, labels)
        first = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            asked = [*labels] if key is None else [key, *labels]
            light = file.read_row_group(group, columns=asked) if asked else None
            ids = _ids(config, piece, first, num_rows, light, key)
            own = columns.labels(light, names, num_rows)
            chosen = [position for position, found in enumerate(own) if wanted(config, found)]
            for position, data in _images(file, group, config.image_column, chosen):
                fault = "the row holds no image bytes" if data is None else None
                yield Candidate(
                    ids[position],
                    uri,
                    first + position,
                    len(data or b""),
                    own[position],
                    data or b"",
                    fault=fault,
                )
            first += num_rows


class RowGroups:
    """Images of Parquet row groups, the most recently used kept; safe to share between threads.

    They are kept because a row cannot be read alone.

    Args:
        max_bytes: of images kept; the row group just read is kept whatever its size.
    """

    def __init__(self, max_bytes: int = ROW_GROUP_BYTES) -> None:
        self._max_bytes, self._num_bytes = max_bytes, 0
        self._groups: OrderedDict[tuple[Path, str, int], Future[pa.ChunkedArray]] = OrderedDict()
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

    def _group(self, path: Path, column: str, group: int) -> pa.ChunkedArray:
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
                images = pa.chunked_array(_image_batches(file, group, column))
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


def _ids(
    config: SourceConfig,
    piece: Piece,
    first: int,
    num_rows: int,
    light: pa.Table | None,
    key: str | None,
) -> list[str]:
    """Return the sample ids of a row group's rows.

    Raises:
        BadInput: a row has none.
    """
    if light is None or key is None:
        return [f"{piece.uri.removesuffix(SUFFIX)}/{first + n}" for n in range(num_rows)]
    values = columns.column(light, key).to_pylist()
    if None in values:
        raise BadInput(
            f"{piece.path}: row {first + values.index(None)} has no {key}; name in "
            f"source.key_column another column, or {ROW_KEY} (file and row number)"
        )
    if config.key_column:
        return [str(value) for value in values]
    return [sample_id(value) for value in values]


def _images(
    file: pq.ParquetFile, group: int, column: str, wanted: Sequence[int]
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the images of some rows of a row group, rising, with their numbers in it."""
    if not wanted:
        return
    start, waiting = 0, iter(wanted)
    position = next(waiting, None)
    for images in _image_batches(file, group, column):
        while position is not None and position < start + len(images):
            yield position, images[position - start].as_py()
            position = next(waiting, None)
        start += len(images)


def _image_batches(file: pq.ParquetFile, group: int, column: str) -> Iterator[pa.Array]:
    """Yield the images of a row group, binary, a few at a time.

    All at once would be an array, which has room for 2 GiB.
    """
    field = columns.field(file.schema_arrow, column)
    assert field is not None  # it was when the file was indexed
    name = f"{column}.bytes" if pa.types.is_struct(field.type) else column
    for batch in file.iter_batches(IMAGE_ROWS, row_groups=[group], columns=[name]):
        yield from columns.column(pa.Table.from_batches([batch]), name).chunks
