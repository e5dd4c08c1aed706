"""The sample table: rows are for ever, growth starts at a shard boundary, ids are unique."""

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_stores import DATASET, ids, sample_table

from cache.errors import FingerprintMismatch, MissingSamples, NotBuilt, StoreError
from cache.samples import Samples, ShardRange


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


@settings(max_examples=30, deadline=None)
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
    with pytest.raises(StoreError, match="'a/000' is there with another image digest"):
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
