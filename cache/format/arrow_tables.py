"""Arrow IPC files, written as bytes and read without copying: every table of a cache root."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.errors import Corrupt
from cache.files import place
from cache.files.mapped import MappedFile


def from_numpy(values: npt.NDArray[np.generic]) -> pa.Array:
    """Return a numeric array [n] as an Arrow array over the same memory.

    pa.array would do, but where pandas is installed it imports it, to ask whether it was given a
    Series: 0.7 s and 60 MB that a reader need not pay.
    """
    values = np.ascontiguousarray(values)
    arrow_type = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(arrow_type, len(values), [None, pa.py_buffer(values)])


_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def to_numpy(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return a column of numbers without nulls as [n]: a view of it if it is in one piece.

    The opposite of `from_numpy`, and written for the same reason.
    """
    dtype = np.dtype(_NUMPY_NAMES.get(str(column.type), str(column.type)))
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk), chunk.offset * dtype.itemsize)
        for chunk in chunks
        if len(chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def to_bytes(table: pa.Table) -> memoryview:
    """Return a table as an uncompressed Arrow IPC file: equal tables, equal bytes."""
    return memoryview(b"".join(to_pieces(table)))


def to_pieces(table: pa.Table) -> list[memoryview]:
    """Return what `to_bytes` does in pieces: columns are views of the table, and not copied.

    A table in several chunks is combined first, in memory.
    """
    sink = _Pieces()
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return sink.pieces


class _Pieces:
    """A file that keeps the buffers which Arrow writes to it."""

    closed = False

    def __init__(self) -> None:
        self.pieces: list[memoryview] = []
        self._bytes = 0

    def write(self, data: bytes | pa.Buffer) -> int:
        piece = memoryview(data).cast("B")
        self.pieces.append(piece)
        self._bytes += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._bytes

    def flush(self) -> None:
        pass


def map_table(path: Path, num_bytes: int | None = None, sha256: str | None = None) -> pa.Table:
    """Map an Arrow IPC file (of a known size and checksum); columns are views of the file.

    Raises:
        NotBuilt: there is no such file.
        Corrupt: it is no whole Arrow file, or has another size or checksum.
    """
    return parse_table(map_file(path, num_bytes, sha256), str(path))


def map_file(path: Path, num_bytes: int | None = None, sha256: str | None = None) -> pa.Buffer:
    """Map a whole file (of a known size and checksum) for reading.

    Raises:
        NotBuilt: there is no such file.
        Corrupt: it is empty, or has another size or checksum.
    """
    return place.using(path, lambda local: map_local(local, num_bytes, sha256), num_bytes, sha256)


def map_local(path: Path, num_bytes: int | None = None, sha256: str | None = None) -> pa.Buffer:
    """Map a file that lies here, as `map_file`."""
    content = pa.py_buffer(MappedFile(path, num_bytes).bytes)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise Corrupt(f"{path}: contents do not match the recorded sha256")
    return content


def parse_table(buffer: pa.Buffer, where: str) -> pa.Table:
    """Read an Arrow IPC file from memory without copying.

    Raises:
        Corrupt: it is no whole Arrow file.
    """
    try:
        return pa.ipc.open_file(buffer).read_all()
    except (pa.ArrowException, OSError) as error:
        raise Corrupt(f"{where}: no whole Arrow IPC file ({error})") from error
