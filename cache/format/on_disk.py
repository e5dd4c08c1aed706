"""Tables in files without a name: of what is only passed on, nothing is anonymous memory.

Their pages are the kernel's to write out and to drop. A file ends with its last view.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from cache.files import atomic
from cache.files.mapped import MappedFile
from cache.files.refused import writing
from cache.format import arrow_tables

SMALL_BYTES = 4 << 20
"""A table of fewer bytes is in memory: nobody misses it there, and files cost time."""
_TEXT_BYTES = 2**31 - 1
_NONE = pa.py_buffer(b"")


def kept(table: pa.Table, scratch: Path) -> pa.Table:
    """Return a table as mapped from a file that has no name any more.

    Args:
        table: of at least one row.
        scratch: a folder for the file.

    Raises:
        StoreError: it cannot be written.
    """
    with _written(scratch) as (file, path):
        file.writelines(arrow_tables.to_pieces(table))
        file.flush()
        return arrow_tables.map_table(path)


class Kept:
    """Tables of one schema in a file without a name, to be read one at a time, often.

    One map and no Python object a table: there may be tens of thousands of them.

    Args:
        tables: each made when those before it are written; tables without rows are left out.
        schema: theirs.
        scratch: a folder for the file.

    Raises:
        StoreError: it cannot be written.
    """

    def __init__(self, tables: Iterable[pa.Table], schema: pa.Schema, scratch: Path) -> None:
        with _written(scratch) as (file, path):
            with pa.ipc.new_file(pa.PythonFile(file, mode="w"), schema) as writer:
                for table in tables:
                    for batch in table.combine_chunks().to_batches():
                        writer.write_batch(batch)
            file.flush()
            self._content = pa.py_buffer(MappedFile(path).bytes)

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the tables, in their order; each is mapped."""
        reader = pa.ipc.open_file(self._content)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


def combined(table: pa.Table, scratch: Path) -> pa.Table:
    """Return a table in one piece, as `combine_chunks` does, its columns mapped from files.

    Args:
        table: of any size; in memory is a chunk of a column at a time, where the table is large.
        scratch: a folder for the files.

    Raises:
        StoreError: they cannot be written.
    """
    if table.nbytes < SMALL_BYTES:
        return table.combine_chunks()
    columns = [joined(column, scratch) for column in table.columns]
    return pa.table(columns, schema=table.schema).combine_chunks()


def joined(column: pa.ChunkedArray, scratch: Path) -> pa.ChunkedArray:
    """Return a column in one chunk, mapped from files; as it is, if it is of another kind.

    Args:
        column: integers, text or bytes of one length, and none of them null.
        scratch: a folder for the files.

    Raises:
        StoreError: they cannot be written.
    """
    if column.num_chunks < 2 or column.null_count:
        return column
    if pa.types.is_string(column.type):
        return _joined_text(column, scratch)
    if not (pa.types.is_integer(column.type) or pa.types.is_fixed_size_binary(column.type)):
        return column
    width = column.type.bit_width // 8
    spans = [
        chunk.buffers()[1].slice(chunk.offset * width, len(chunk) * width)
        for chunk in column.chunks
        if len(chunk)
    ]
    buffers = [None, _mapped(iter(spans), scratch)]
    return pa.chunked_array([pa.Array.from_buffers(column.type, len(column), buffers)])


def _joined_text(column: pa.ChunkedArray, scratch: Path) -> pa.ChunkedArray:
    chunks = [chunk for chunk in column.chunks if len(chunk)]
    offsets = [
        np.frombuffer(chunk.buffers()[1], np.int32, len(chunk) + 1, chunk.offset * 4)
        for chunk in chunks
    ]
    starts = np.cumsum([0, *(int(each[-1]) - int(each[0]) for each in offsets)]).tolist()
    if starts[-1] > _TEXT_BYTES:
        return column

    def rebased() -> Iterator[memoryview]:
        yield np.zeros(1, np.int32).data
        for each, start in zip(offsets, starts, strict=False):
            yield (each[1:] + np.int32(start - int(each[0]))).data

    texts = [
        chunk.buffers()[2].slice(int(each[0]), int(each[-1]) - int(each[0]))
        for chunk, each in zip(chunks, offsets, strict=True)
        if each[-1] > each[0]
    ]
    buffers = [None, _mapped(rebased(), scratch), _mapped(iter(texts), scratch)]
    return pa.chunked_array([pa.Array.from_buffers(column.type, len(column), buffers)])


def _mapped(parts: Iterator[pa.Buffer | memoryview], scratch: Path) -> pa.Buffer:
    """Return parts as one buffer, mapped from a file."""
    with _written(scratch) as (file, path):
        file.writelines(parts)
        if not file.tell():
            return _NONE
        file.flush()
        return pa.py_buffer(MappedFile(path).bytes)


@contextmanager
def _written(scratch: Path) -> Iterator[tuple[IO[bytes], Path]]:
    """Open a file for the block, after which it has no name.

    Raises:
        StoreError: it cannot be written.
    """
    with writing(scratch):
        atomic.make_directories(scratch)
        path = scratch / atomic.temporary_name("columns.arrow")
        try:
            with open(path, "xb") as file:
                yield file, path
        finally:
            path.unlink(missing_ok=True)
