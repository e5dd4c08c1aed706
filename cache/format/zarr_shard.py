"""Bytes of the patches array: a Zarr v3 array, one row per inner chunk, shards written whole.

A shard file (sharding_indexed, index at the end), R rows a shard, each of B bytes:

    row | row | ... (present rows in order, no padding)      present rows x B bytes
    R x (offset u64, nbytes u64), little endian              16 R bytes
    crc32c of those 16 R bytes, u32 little endian            4 bytes

An absent row has offset = nbytes = 2^64 - 1 and takes no space; outside readers give the array's
fill value for it.
"""

import json
from collections.abc import Iterator, Mapping

import google_crc32c
import numpy as np
import numpy.typing as npt

from cache.errors import AGAIN, Corrupt

ABSENT = np.uint64(2**64 - 1)
ENTRY_BYTES = 16
CHECKSUM_BYTES = 4


def array_metadata(
    num_rows: int,
    rows_per_shard: int,
    row_shape: tuple[int, int],
    dtype: np.dtype[np.generic],
    fill_value: int | str,
    attributes: Mapping[str, object],
) -> bytes:
    """Return zarr.json of a patches array of shape [num_rows, *row_shape]."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_rows, *row_shape],
        "data_type": dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [rows_per_shard, *row_shape]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *row_shape],
                    "codecs": [little if dtype.itemsize > 1 else {"name": "bytes"}],
                    "index_codecs": [little, {"name": "crc32c"}],
                    "index_location": "end",
                },
            }
        ],
        "attributes": dict(attributes),
        "dimension_names": ["row", "token", "channel"],
    }
    return json.dumps(metadata, indent=2, sort_keys=True).encode() + b"\n"


def index_bytes(rows_per_shard: int) -> int:
    """Size of a shard's index with its checksum."""
    return rows_per_shard * ENTRY_BYTES + CHECKSUM_BYTES


def pack(
    rows: npt.NDArray[np.generic], present: npt.NDArray[np.bool_], rows_per_shard: int
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of one shard file.

    Args:
        rows: [n, N, D] in storage dtype, n <= rows_per_shard.
        present: [n]; rows that are not present are left out.
        rows_per_shard: number of entries of the index.
    """
    rows = np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder("<"), copy=False))
    index = np.full((rows_per_shard, 2), ABSENT, "<u8")
    row_bytes = rows[:1].nbytes
    places = np.flatnonzero(present)
    index[places, 0] = np.arange(len(places), dtype=np.uint64) * np.uint64(row_bytes)
    index[places, 1] = row_bytes
    flat = rows.reshape(len(rows), -1).view(np.uint8)
    for start, stop in _runs(present):
        yield flat[start:stop].data.cast("B")
    tail = index.tobytes()
    yield tail + checksum(tail)


def checksum(index: bytes) -> bytes:
    """Return an index's crc32c as Zarr's crc32c codec appends it."""
    value: int = google_crc32c.value(index)
    return value.to_bytes(CHECKSUM_BYTES, "little")


def parse_index(
    tail: bytes | memoryview, row_bytes: int, file_bytes: int, where: str
) -> npt.NDArray[np.int64]:
    """Check a shard's index and return each row's slot, its offset in rows; -1 where absent.

    Args:
        tail: the last `index_bytes(rows_per_shard)` bytes of the file.
        row_bytes: size of a row.
        file_bytes: size of the file.
        where: name of the file, for errors.

    Raises:
        Corrupt: the checksum does not match, or an entry does not point at a whole row.
    """
    body = bytes(tail[:-CHECKSUM_BYTES])
    if checksum(body) != bytes(tail[-CHECKSUM_BYTES:]):
        raise Corrupt(f"{where}: the index does not match its crc32c; {AGAIN}")
    index = np.frombuffer(body, "<u8").reshape(-1, 2)
    absent = (index == ABSENT).all(axis=1)
    offsets, sizes = index[~absent, 0], index[~absent, 1]
    data_bytes = file_bytes - len(tail)
    if np.any(sizes != row_bytes) or np.any(offsets % row_bytes) or np.any(offsets >= data_bytes):
        raise Corrupt(f"{where}: the index points outside its {row_bytes}-byte rows; {AGAIN}")
    slots = np.full(len(index), -1, np.int64)
    slots[~absent] = offsets // row_bytes
    return slots


def _runs(present: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of each run of present rows."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], present, [False])).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
