"""Arrow IPC files, written as bytes and read without copying: every table of a cache root."""

import mmap
from pathlib import Path

import pyarrow as pa

from cache.errors import Corrupt, NotBuilt


def to_bytes(table: pa.Table) -> memoryview:
    """Return a table as an uncompressed Arrow IPC file: equal tables, equal bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return memoryview(sink.getvalue())


def map_table(path: Path) -> pa.Table:
    """Map an Arrow IPC file; columns are views of the file.

    Raises:
        NotBuilt: there is no such file.
        Corrupt: it is no whole Arrow file.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise NotBuilt(f"{path}: no such file") from error
    except ValueError as error:  # an empty file cannot be mapped
        raise Corrupt(f"{path}: empty, wants an Arrow IPC file") from error
    return parse_table(pa.py_buffer(mapped), str(path))


def parse_table(buffer: pa.Buffer, where: str) -> pa.Table:
    """Read an Arrow IPC file from memory without copying.

    Raises:
        Corrupt: it is no whole Arrow file.
    """
    try:
        return pa.ipc.open_file(buffer).read_all()
    except (pa.ArrowException, OSError) as error:
        raise Corrupt(f"{where}: no whole Arrow IPC file ({error})") from error
