"""codec.arrow: fitted values of a codec that has too many for spec.json, as fitted once."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from cache.codec.encoded import Arrays
from cache.errors import Corrupt
from cache.format import arrow_tables


def to_bytes(arrays: Arrays) -> memoryview:
    """Return the file, one record with a list a name: equal arrays, equal bytes."""
    columns = {}
    for name, values in arrays.items():
        flat = arrow_tables.from_numpy(values)
        ends = arrow_tables.from_numpy(np.array([0, len(flat)], np.int32))
        columns[name] = pa.ListArray.from_arrays(ends, flat)
    return arrow_tables.to_bytes(pa.table(columns))


def parse(content: bytes | memoryview | pa.Buffer, path: Path) -> Arrays:
    """Read the file's contents: name -> values, flattened.

    Raises:
        Corrupt: the file is not one of fitted values.
    """
    table = arrow_tables.parse_table(pa.py_buffer(content), str(path))
    if len(table) != 1 or not all(pa.types.is_list(column.type) for column in table.schema):
        raise Corrupt(f"{path}: wants one record of lists, a codec's fitted values")
    return {
        name: np.array(arrow_tables.to_numpy(table[name][0].values)) for name in table.column_names
    }
