"""Format 1, byte for byte: the layout by hand, and a store of an earlier build that still reads."""

import json
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pyarrow as pa
import pytest
from support.toy_stores import Toy, features, files_under, ids, store_spec

from cache.errors import Corrupt
from cache.format import arrow_tables, layout, rows_table, zarr_shard
from cache.reader import Reader
from cache.store import open_store
from cache.verify import verify

GOLDEN = Path(__file__).parent / "golden" / "cache_format_1"
"""A root written by the build that fixed format 1: `python tests/test_cache_format.py` made it."""


def golden_root(root: Path) -> None:
    """Write the golden root: two segments, an invalid row, two views."""
    toy = Toy(root, bad={"a/001": "no image"})
    toy.add_samples(ids(5))
    toy.add_samples(ids(2, "b"))
    toy.build(num_views=2)


def test_shard_bytes_are_rows_then_index_then_checksum():
    rows = np.arange(3 * 2 * 2, dtype=np.float16).reshape(3, 2, 2)
    present = np.array([True, False, True])
    flat = zarr_shard.as_bytes(rows)
    sums = zarr_shard.checksums(flat)
    got = b"".join(bytes(part) for part in zarr_shard.pack(flat, present, sums, rows_per_shard=4))
    absent = 2**64 - 1
    data = b"".join(
        (row + struct.pack("<I", google_crc32c.value(row))).ljust(64, b"\0")
        for row in (struct.pack("<4e", 0, 1, 2, 3), struct.pack("<4e", 8, 9, 10, 11))
    )
    index = struct.pack("<8Q", 0, 12, absent, absent, 64, 12, absent, absent)
    assert got == data + index + struct.pack("<I", google_crc32c.value(index))
    slots = zarr_shard.parse_index(got[-zarr_shard.index_bytes(4) :], 8, len(got), "x")
    assert slots.tolist() == [0, -1, 1, -1]


def test_crc32c_is_castagnoli():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # RFC 3720, B.4's check value


@pytest.mark.parametrize("entry", [(0, 8), (0, 64), (12, 12), (128, 12), (2**63, 12)])
def test_an_index_that_points_elsewhere_is_refused(entry):
    index = struct.pack("<2Q", *entry)
    tail = index + struct.pack("<I", google_crc32c.value(index))
    with pytest.raises(Corrupt, match="points outside"):
        zarr_shard.parse_index(tail, 8, 128 + len(tail), "x")


def test_the_golden_root_still_reads():
    store = open_store(GOLDEN, store_spec())
    assert verify(store).problems == []
    reader = Reader(store, range(2))
    rows = store.samples.table["row"].to_numpy()
    for view in (0, 1):
        selected = reader.select(rows, view)
        got, summaries = selected.patches(), selected.summaries
        for n, name in enumerate(reader.sample_ids(rows)):
            if name == "a/001":
                assert reader.select([rows[n]], view).reasons == ["no image"]
                continue
            patches, summary = features(name, view)
            np.testing.assert_array_equal(got[n], patches.astype(np.float16))
            np.testing.assert_array_equal(summaries[n], summary)


def test_summaries_are_the_memory_of_their_table():
    wanted = np.arange(40_000, dtype=np.float32).reshape(-1, 8)
    names = [str(number) for number in range(len(wanted))]
    none = [None] * len(names)
    made = rows_table.make(names, none, names, names, wanted)
    table = arrow_tables.parse_table(pa.py_buffer(arrow_tables.to_bytes(made)), "here")
    before = pa.total_allocated_bytes()
    summaries = rows_table.summaries(table)
    assert pa.total_allocated_bytes() == before
    np.testing.assert_array_equal(summaries, wanted)
    np.testing.assert_array_equal(rows_table.summaries(table.slice(3, 5)), wanted[3:8])
    halves = pa.concat_tables([table.slice(0, 7), table.slice(7)])
    np.testing.assert_array_equal(rows_table.summaries(halves), wanted)


def test_what_is_written_now_is_the_golden_root(tmp_path):
    golden_root(tmp_path)
    assert files_under(tmp_path) == files_under(GOLDEN)


def test_provenance_is_in_no_data_file(tmp_path):
    golden_root(tmp_path)
    assert not any(b"compute_batch" in content for content in files_under(tmp_path).values())
    store = open_store(tmp_path, store_spec())
    assert store.provenance == {"compute_batch": 8}
    assert next(store.manifest().records()).provenance == '{"device":"cpu"}'
    metadata = json.loads(layout.zarr_file(store.directory, 0).read_text())
    assert metadata["attributes"]["eupe"] == json.loads(
        layout.spec_file(store.directory).read_bytes()
    )


if __name__ == "__main__":
    golden_root(GOLDEN)
