"""Tables that are passed on in files without a name: every byte the same, and little memory."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import StoreError
from cache.files import atomic
from cache.format import arrow_tables, on_disk
from cache.format.sample_table import GIVEN, conform, hash_table, id_hashes, stored
from cache.segments import write_segment
from eupe.errors import BadInput

COUNT, BLOCK = 200_000, 20_000
PEAK_BYTES = 8 << 20
"""Of memory that Arrow takes at most while a segment is written: a block of its samples, in full
and narrow. The segment is 15 MB."""
ROW = st.tuples(st.text(max_size=3), st.binary(min_size=2, max_size=2), st.integers(0, 255))
NULLABLE = st.none() | st.text(max_size=3)


def written(table: pa.Table) -> bytes:
    """Return the file that Arrow makes of a table in one piece, in memory."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def no_table_is_small(monkeypatch):
    """Combine every table in files."""
    monkeypatch.setattr(on_disk, "SMALL_BYTES", 0)


@settings(max_examples=30)
@given(
    chunks=st.lists(st.lists(st.tuples(ROW, NULLABLE), max_size=5), min_size=1, max_size=4),
    skip=st.integers(0, 3),
)
def test_every_byte_is_that_of_a_table_combined_in_memory(chunks, skip, tmp_path_factory):
    tables = []
    for rows in chunks:
        text, two, number, maybe = [
            list(c) for c in zip(*((*r, n) for r, n in rows), strict=True)
        ] or [[] for _ in range(4)]
        columns = {
            "text": pa.array(text, pa.string()),
            "two": pa.array(two, pa.binary(2)),
            "number": pa.array(number, pa.uint8()),
            "maybe": pa.array(maybe, pa.string()),
            "entry": pa.array(text, pa.string()).dictionary_encode(),
        }
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables).unify_dictionaries().slice(skip)
    expected = written(table)
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "SMALL_BYTES", 0)
        combined = on_disk.combined(table, scratch)
    assert b"".join(arrow_tables.to_pieces(combined)) == expected
    assert bytes(arrow_tables.to_bytes(table)) == expected
    assert not list(scratch.iterdir())


def blocks(scratch: Path) -> Iterator[pa.Table]:
    """Yield samples of pictures in tars as indexing has them, in files."""
    for first in range(0, COUNT, BLOCK):
        numbers = range(first, first + BLOCK)
        columns = [
            [f"n{n % 1000:08d}/n01440764_{n:05d}" for n in numbers],
            [f"train-{n // 1000:04d}.tar" for n in numbers],
            [512 * n for n in numbers],
            [110_000 + n for n in numbers],
            [n.to_bytes(32, "little") for n in numbers],
            [f'{{"label": "n{n % 1000:08d}"}}' for n in numbers],
        ]
        yield on_disk.kept(pa.table(columns, schema=GIVEN), scratch)


def test_memory_does_not_follow_the_ids_and_digests_of_a_segment(tmp_path, no_table_is_small):
    samples = pa.concat_tables(blocks(tmp_path / "scratch"))
    in_memory = stored(samples, 0, tmp_path / "scratch").combine_chunks()
    expected = written(in_memory), written(hash_table("toy", samples["sample_id"], None))
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        scratch, to = tmp_path / "scratch", tmp_path / "to"
        tables = stored(samples, 0, scratch), hash_table("toy", samples["sample_id"], scratch)
        names = [write_segment(to, 0, table, scratch).name for table in tables]
        del tables
    finally:
        pa.set_memory_pool(before)
    assert tuple((to / name).read_bytes() for name in names) == expected
    assert pool.max_memory() <= PEAK_BYTES
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("on", ["disk", "memory"])
def test_hashes_that_rise_already_and_those_that_do_not_are_one_table(monkeypatch, tmp_path, on):
    monkeypatch.setattr("cache.format.sample_table.BLOCK_ROWS", 16)
    names = pa.array([f"{number}" for number in range(100)])
    hashes = id_hashes("toy", names)
    order = np.argsort(hashes)
    back_and_forth = np.r_[order[:48], order[:47:-1]]  # each block rises, or each block falls
    for given_in in (np.arange(100), order, order[::-1], back_and_forth):
        ids = pa.chunked_array([names.take(pa.array(given_in))])
        table = hash_table("toy", ids, tmp_path if on == "disk" else None)
        found, places = (arrow_tables.to_numpy(table[name]) for name in ("hash", "place"))
        np.testing.assert_array_equal(found, hashes[order])
        np.testing.assert_array_equal(hashes[given_in][places], found)
    assert not list(tmp_path.iterdir())


def test_an_id_that_is_there_twice_is_found_wherever_the_other_one_is(tmp_path, monkeypatch):
    monkeypatch.setattr("cache.format.sample_table.CHECKED_ROWS", COUNT // 9)  # eight times
    samples = pa.concat_tables(blocks(tmp_path))
    conform(samples)
    for where in (0, COUNT // 2, COUNT - 1):
        again = samples.slice(where, 1)
        with pytest.raises(BadInput, match=f"{again['sample_id'][0].as_py()!r} is there twice"):
            conform(pa.concat_tables([samples, again]))


def test_what_a_killed_process_leaves_is_swept(tmp_path, no_table_is_small, monkeypatch):
    """Its files have names until they are mapped, such as `sweep` knows."""
    table, seen = pa.table({"text": pa.chunked_array([["a"], ["b"]])}), []

    def mapped(path: Path) -> None:
        seen.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(on_disk, "MappedFile", mapped)
    with pytest.raises(KeyboardInterrupt):
        on_disk.combined(table, tmp_path)
    assert not list(tmp_path.iterdir())
    (path,) = seen
    path.write_bytes(b"left")
    monkeypatch.setattr(atomic, "_alive", lambda pid: False)
    assert atomic.sweep(tmp_path) == 1


def test_a_disk_without_room_is_a_sentence(tmp_path, no_table_is_small):
    (tmp_path / "file").write_bytes(b"")
    table = pa.table({"text": pa.chunked_array([["a"], ["b"]])})
    for keep in (on_disk.kept, on_disk.combined):
        with pytest.raises(StoreError, match="file: "):
            keep(table, tmp_path / "file" / "scratch")
