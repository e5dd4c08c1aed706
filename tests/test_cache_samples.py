"""The sample table: rows are for ever, growth starts at a shard boundary, ids are unique."""

import hashlib
import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_stores import DATASET, ids, sample_table

from cache.errors import Corrupt, FingerprintMismatch, MissingSamples, NotBuilt, StoreError
from cache.format import arrow_tables
from cache.format import sample_table as samples_as_rows
from cache.format.sample_table import GIVEN, conform, id_hashes, in_full, stored
from cache.samples import Samples, segment_files
from cache.shard_ranges import ShardRange, ShardRanges
from eupe.errors import BadInput

BYTES_A_SAMPLE = 80


def test_growth_starts_at_a_shard_boundary_and_moves_no_row(tmp_path):
    first = Samples.append(tmp_path, DATASET, sample_table(ids(6)), 4)
    before = dict(zip(ids(6), first.rows_of(ids(6)).tolist(), strict=True))
    grown = Samples.append(tmp_path, DATASET, sample_table(ids(6) + ids(3, "b")))
    assert grown.shards() == [
        ShardRange(0, 0, 4),
        ShardRange(1, 4, 6),
        ShardRange(2, 8, 11),
    ]
    assert (len(grown), grown.num_rows) == (9, 11)
    assert {name: row for name, row in before.items()} == dict(
        zip(ids(6), grown.rows_of(ids(6)).tolist(), strict=True)
    )
    assert grown.table["row"].to_list() == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert grown.shard(2)["sample_id"].to_list() == ids(3, "b")


def test_appending_the_same_again_adds_nothing(tmp_path):
    Samples.append(tmp_path, DATASET, sample_table(ids(5)), 4)
    head = (tmp_path / "toy/samples/HEAD").read_bytes()
    again = Samples.append(tmp_path, DATASET, sample_table(ids(5)), 4)
    assert len(again) == 5
    assert (tmp_path / "toy/samples/HEAD").read_bytes() == head


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), per_shard=st.integers(1, 5))
def test_ids_and_rows_are_inverse(tmp_path_factory, sizes, per_shard):
    root = tmp_path_factory.mktemp("samples")
    names = [f"{part}/{n}" for part, size in enumerate(sizes) for n in range(size)]
    start = 0
    for size in sizes:
        chunk = names[start : start + size]
        samples = Samples.append(root, DATASET, sample_table(chunk), per_shard)
        start += size
    backwards = names[::-1]
    rows = samples.rows_of(backwards)
    assert samples.sample_ids(rows) == backwards
    assert sorted(rows) == [r for s in samples.shards() for r in range(s.start, s.stop)]
    assert all(s.start % per_shard == 0 and len(s) <= per_shard for s in samples.shards())


def test_labels_may_be_a_struct(tmp_path):
    table = sample_table(ids(1)).with_columns(
        pl.struct(pl.lit("cat").alias("kind")).alias("labels")
    )
    samples = Samples.append(tmp_path, DATASET, table, 4)
    assert samples.table["labels"].to_list() == ['{"kind":"cat"}']


def test_bad_tables_are_refused_and_lose_nothing(tmp_path):
    Samples.append(tmp_path, DATASET, sample_table(ids(3)), 4)
    before = (tmp_path / "toy/samples/HEAD").read_bytes()
    with pytest.raises(ValueError, match="'z/000' is there twice"):
        Samples.append(tmp_path, DATASET, sample_table(ids(1, "z") * 2), 4)
    with pytest.raises(ValueError, match="columns"):
        Samples.append(tmp_path, DATASET, sample_table(ids(1, "z")).drop("digest"), 4)
    with pytest.raises(StoreError, match=r"'a/000' is there with another image: a/000\.png "):
        Samples.append(tmp_path, DATASET, sample_table(ids(1), image="other "), 4)
    with pytest.raises(FingerprintMismatch, match="rows_per_shard: 5 != 4"):
        Samples.append(tmp_path, DATASET, sample_table(ids(3)), 5)
    assert (tmp_path / "toy/samples/HEAD").read_bytes() == before


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(NotBuilt, match="'toy' has no samples"):
        Samples.open(tmp_path, "toy")
    with pytest.raises(ValueError, match="at least one image"):
        Samples.append(tmp_path, DATASET, sample_table([]), 4)
    samples = Samples.append(tmp_path, DATASET, sample_table(ids(5)), 4)
    with pytest.raises(MissingSamples, match="'nobody'"):
        samples.rows_of(["a/001", "nobody"])
    with pytest.raises(MissingSamples, match="row 5"):
        samples.sample_ids([0, 5])
    with pytest.raises(MissingSamples, match="shard 2"):
        samples.shard(2)


def test_a_sample_takes_at_most_80_bytes(tmp_path):
    """Ids of 25 characters in tars of 1000 images and 1000 classes, as ImageNet-1k has them."""
    count = 50_000
    numbers = range(count)
    table = {
        "sample_id": [f"n{n % 1000:08d}/n01440764_{n:05d}" for n in numbers],
        "uri": [f"train-{n // 1000:04d}.tar" for n in numbers],
        "offset": [512 * n for n in numbers],
        "bytes": [110_000 + n for n in numbers],
        "digest": [n.to_bytes(32, "little") for n in numbers],
        "labels": [json.dumps({"label": f"n{n % 1000:08d}"}) for n in numbers],
    }
    assert {len(name) for name in table["sample_id"]} == {25}
    samples = Samples.append(tmp_path, DATASET, pl.DataFrame(table), 500)
    segment, hashes = [path for path, _ in segment_files(tmp_path, "toy")]
    assert segment.stat().st_size <= BYTES_A_SAMPLE * count
    assert hashes.stat().st_size <= 12.1 * count
    assert samples.take(range(count)).equals(pl.DataFrame(table))


def test_nothing_of_a_segment_is_read_before_it_is_touched(tmp_path):
    for part in "abc":
        Samples.append(tmp_path, DATASET, sample_table(ids(4, part)), 4)
    paths = [path for path, _ in segment_files(tmp_path, "toy")]
    content = bytearray(paths[2].read_bytes())
    content[len(content) // 2] ^= 1
    paths[2].write_bytes(content)
    samples = Samples.open(tmp_path, "toy")
    assert samples.shard(0)["sample_id"].to_list() == ids(4)
    assert samples.rows_of(ids(4)).tolist() == [0, 1, 2, 3]
    with pytest.raises(Corrupt, match="recorded sha256"):
        samples.shard(2)


NOWHERE = Path("/nowhere")
"""Few samples want no file."""
URIS = [
    "a/1.png",
    "a/1",
    "a/2.png",
    "x.tar",
    "{id}.png",
    "{id}",
    "./{id}.x",
    "a/1.png/b",
    "",
    "a/1.",
]


@given(names=st.lists(st.sampled_from(["a/1", "a/2", "x", "", "{id}"]), max_size=6), data=st.data())
def test_what_is_stored_is_what_was_given(names, data):
    column = st.integers(0, 2**40)
    table = pa.table(
        {
            "sample_id": names,
            "uri": [data.draw(st.sampled_from(URIS)) for _ in names],
            "offset": [data.draw(column) for _ in names],
            "bytes": [data.draw(column) for _ in names],
            "digest": [hashlib.sha256(name.encode()).digest() for name in names],
            "labels": [data.draw(st.sampled_from(["", "{}", "ä"])) for _ in names],
        },
        GIVEN,
    )
    back = in_full(stored(table, 0, NOWHERE))
    normal = [str(Path(uri)) for uri in back["uri"].to_pylist()]
    assert normal == [str(Path(uri)) for uri in table["uri"].to_pylist()]
    assert back.drop_columns("uri").equals(table.drop_columns("uri"))


def test_a_folder_of_images_is_one_entry_an_extension():
    table = sample_table(ids(1000)).with_columns(
        uri=pl.col("sample_id")
        + pl.when(pl.int_range(1000) % 2 == 0).then(pl.lit(".JPEG")).otherwise(pl.lit(".png"))
    )
    kept = stored(table.select(GIVEN.names).to_arrow().cast(GIVEN), 0, NOWHERE)
    entries = kept["uri"].combine_chunks().dictionary
    assert entries.to_pylist() == ["{id}.JPEG", "{id}.png"]
    assert in_full(kept)["uri"].to_pylist() == table["uri"].to_list()


def test_a_segment_is_the_same_in_however_many_blocks_it_is_made(monkeypatch, tmp_path):
    table = sample_table(ids(100)).with_columns(
        uri=pl.when(pl.int_range(100) < 60).then(pl.lit("b.tar")).otherwise(pl.col("uri")),
        labels=pl.lit('{"n": ') + (pl.int_range(100) // 7).cast(pl.String) + "}",
    )
    whole = table.select(GIVEN.names).to_arrow().cast(GIVEN)
    pieces = pa.concat_tables([whole.slice(0, 41), whole.slice(41)])
    expected = bytes(arrow_tables.to_bytes(stored(whole, 5, NOWHERE)))
    hashes = id_hashes("toy", whole["sample_id"])
    monkeypatch.setattr(samples_as_rows, "BLOCK_ROWS", 16)
    assert bytes(arrow_tables.to_bytes(stored(pieces, 5, tmp_path))) == expected
    np.testing.assert_array_equal(id_hashes("toy", pieces["sample_id"]), hashes)


@pytest.mark.parametrize("as_arrow", [False, True])
def test_an_id_that_is_there_twice_is_refused(as_arrow):
    table = sample_table([*ids(5), ids(5)[3]]).select(GIVEN.names)
    asked = table.to_arrow().cast(GIVEN) if as_arrow else table
    with pytest.raises(BadInput, match=f"sample_id {ids(5)[3]!r} is there twice"):
        conform(asked)


def test_an_equal_image_elsewhere_is_renewed_and_keeps_its_row(tmp_path):
    table = sample_table(ids(9))
    before = Samples.append(tmp_path, DATASET, table, 4)
    unopened = Samples.open(tmp_path, "toy")
    digests = [before.shard_digest(shard) for shard in range(3)]
    moved = table[3:6].with_columns(uri=pl.lit("x.tar"), offset=512 * pl.int_range(3))
    after = Samples.append(tmp_path, DATASET, pl.concat([moved, sample_table(ids(1, "b"))]))
    assert after.rows_of(ids(9)).tolist() == before.rows_of(ids(9)).tolist()
    assert after.take([3, 4, 5]).select("uri", "offset").rows() == [
        ("x.tar", 0),
        ("x.tar", 512),
        ("x.tar", 1024),
    ]
    assert after.take([2])["uri"].to_list() == ["a/002.png"]
    assert [after.shard_digest(shard) for shard in range(3)] == digests
    assert after.shard(3)["sample_id"].to_list() == ids(1, "b")
    # Whoever has the segment open reads on in it; who has not touched it yet finds the new one.
    assert before.take([3])["uri"].to_list() == ["a/003.png"]
    assert unopened.take([3])["uri"].to_list() == ["x.tar"]
    head = (tmp_path / "toy/samples/HEAD").read_bytes()
    Samples.append(tmp_path, DATASET, moved)
    assert (tmp_path / "toy/samples/HEAD").read_bytes() == head


def test_labels_given_later_join_those_that_are_there(tmp_path):
    Samples.append(tmp_path, DATASET, sample_table(ids(3)), 4)
    table = sample_table(ids(3)).with_columns(labels=pl.lit('{"caption": "ä", "class": "y"}'))
    samples = Samples.append(tmp_path, DATASET, table[:2])
    assert [json.loads(text) for text in samples.take([0, 1, 2])["labels"]] == [
        {"caption": "ä", "class": "y"},
        {"caption": "ä", "class": "y"},
        {"class": "x"},
    ]
    head = (tmp_path / "toy/samples/HEAD").read_bytes()
    less = sample_table(ids(2)).with_columns(labels=pl.lit('{"class": "y"}'))
    Samples.append(tmp_path, DATASET, less)
    assert (tmp_path / "toy/samples/HEAD").read_bytes() == head


def test_ids_of_one_hash_are_told_apart(tmp_path, monkeypatch):
    """64 bits are shared by two of five billion ids; here all ids share them."""

    def same(dataset: str, names: pa.Array) -> np.ndarray:
        return np.full(len(names), 7, np.uint64)

    for user in ("cache.samples", "cache.format.sample_table"):
        monkeypatch.setattr(f"{user}.id_hashes", same)
    Samples.append(tmp_path, DATASET, sample_table(ids(5)), 4)
    samples = Samples.append(tmp_path, DATASET, sample_table(ids(3, "b")))
    names = ids(3, "b") + ids(5)[::-1]
    assert samples.rows_of(names).tolist() == [8, 9, 10, 4, 3, 2, 1, 0]
    with pytest.raises(MissingSamples, match="'nobody'"):
        samples.rows_of(["nobody"])


def test_the_hash_of_an_id_never_changes():
    assert id_hashes("toy", pa.array(["a/000", "ä"])).tolist() == [
        12562591231609608472,
        11812485863080911113,
    ]


def test_shards_are_arrays_that_read_like_a_list():
    told = [ShardRange(0, 0, 4), ShardRange(1, 4, 6), ShardRange(2, 8, 11)]
    shards = ShardRanges.of(told)
    assert list(shards) == told == shards
    assert shards[-1] == told[-1]
    assert shards[1:] == told[1:]
    assert shards.lengths.tolist() == [4, 2, 3]
    grown = ShardRanges.of([*told[1:2], ShardRange(2, 8, 12), ShardRange(3, 12, 16)])
    assert shards != grown
    assert shards.shared(grown) == told[1:2]  # shard 2 holds other rows there
    assert shards.shared(shards[:0]) == []
    assert shards.where(np.array([True, False, True])) == told[::2]
