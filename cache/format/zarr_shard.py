"""Bytes of the patches array: a Zarr v3 array, one row per inner chunk, shards written whole.

A shard file (sharding_indexed, index at the end), R rows a shard, each of B bytes:

    row | its crc32c, u32 | zeros | row | ...                present rows x S bytes
    R x (offset u64, nbytes u64), little endian              16 R bytes
    crc32c of those 16 R bytes, u32 little endian            4 bytes

S is B + 4 rounded up to a multiple of 64: copying rows that begin in the middle of a cache line
costs a sixth more (docs/log.md, 2026-11-26). An absent row has offset = nbytes = 2^64 - 1 and takes
no space; outside readers give the array's fill value for it.
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
ALIGNMENT = 64
"""Rows begin at its multiples: a processor's cache line."""


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
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill_value,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [1, *row_shape],
                    "codecs": [
                        little if dtype.itemsize > 1 else {"name": "bytes"},
                        {"name": "crc32c"},
                    ],
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


def as_bytes(rows: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Return rows [n, N, D] in storage dtype as they are stored, uint8 [n, row_bytes]."""
    little = np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder("<"), copy=False))
    return little.reshape(len(little), -1).view(np.uint8)


def checksums(flat: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """Return the crc32c of each row of `as_bytes`, uint32 [n]."""
    return np.fromiter((google_crc32c.value(row) for row in flat), np.uint32, len(flat))


def pack(
    flat: npt.NDArray[np.uint8],
    present: npt.NDArray[np.bool_],
    sums: npt.NDArray[np.uint32],
    rows_per_shard: int,
) -> Iterator[memoryview | bytes]:
    """Yield the bytes of one shard file.

    Args:
        flat: uint8 [n, row_bytes], rows as `as_bytes` gives them, n <= rows_per_shard.
        present: [n]; rows that are not present are left out.
        sums: uint32 [n], their `checksums`.
        rows_per_shard: number of entries of the index.
    """
    index = np.full((rows_per_shard, 2), ABSENT, "<u8")
    stored = stored_bytes(flat.shape[1])
    places = np.flatnonzero(present)
    index[places, 0] = np.arange(len(places), dtype=np.uint64) * np.uint64(stored)
    index[places, 1] = flat.shape[1] + CHECKSUM_BYTES
    rest = bytes(stored - flat.shape[1] - CHECKSUM_BYTES)
    for place in places:
        yield flat[place].data
        yield sums[place].astype("<u4").tobytes() + rest
    tail = index.tobytes()
    yield tail + checksum(tail)


def kept_checksums(
    file: bytes | memoryview | npt.NDArray[np.uint8], row_bytes: int, num_rows: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Return the crc32c that a shard file has beside each of its rows, and that of the rows.

    Args:
        file: the contents.
        row_bytes: size of a row, its crc32c left out.
        num_rows: that are present.
    """
    rows = stored_rows(file, row_bytes, num_rows)
    kept = np.ascontiguousarray(rows[:, row_bytes : row_bytes + CHECKSUM_BYTES]).view("<u4")
    return kept.reshape(-1).astype(np.uint32), checksums(rows[:, :row_bytes])


def stored_rows(
    file: bytes | memoryview | npt.NDArray[np.uint8], row_bytes: int, num_rows: int
) -> npt.NDArray[np.uint8]:
    """Return the rows that a shard file holds, each with what follows it, [num_rows, stored_bytes].

    Args:
        file: the contents.
        row_bytes: size of a row, its crc32c left out.
        num_rows: that are present.
    """
    stored = stored_bytes(row_bytes)
    return np.frombuffer(file, np.uint8, num_rows * stored).reshape(num_rows, stored)


def stored_bytes(row_bytes: int) -> int:
    """Return what a row takes in the file: itself, its crc32c, zeros up to the next row's place."""
    return -(-(row_bytes + CHECKSUM_BYTES) // ALIGNMENT) * ALIGNMENT


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
        row_bytes: size of a row, its crc32c left out.
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
    data_bytes, stored = file_bytes - len(tail), stored_bytes(row_bytes)
    whole = sizes == row_bytes + CHECKSUM_BYTES
    if not whole.all() or np.any(offsets % stored) or np.any(offsets >= data_bytes):
        raise Corrupt(f"{where}: the index points outside its {row_bytes}-byte rows; {AGAIN}")
    slots = np.full(len(index), -1, np.int64)
    slots[~absent] = offsets // stored
    return slots
