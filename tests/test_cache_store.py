"""Store, writer, manifest and reader together: what is written is read, by any order and reader."""

import numpy as np
import polars as pl
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support.toy_stores import (
    DATASET,
    GRID,
    PATCH_DIM,
    ROWS_PER_SHARD,
    SUMMARY_DIM,
    Toy,
    features,
    files_under,
    ids,
    moments,
    sample_table,
    store_spec,
)

from cache.codec.plain import PlainCodec
from cache.errors import Corrupt, FingerprintMismatch, MissingSamples, NotBuilt, StoreError
from cache.files import mapped
from cache.format import layout
from cache.reader import Reader
from cache.samples import Samples
from cache.store import create_store, find_stores, open_store

PLAIN = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("codec", PLAIN)
def test_three_readers_agree(tmp_path, codec):
    toy = Toy(tmp_path, codec, bad={"a/005": "no image"})
    toy.add_samples(ids(6))
    toy.add_samples(ids(3, "b"))
    store = toy.build(num_views=2)
    reader = Reader(store, range(2))
    rows = store.samples.table["row"].to_numpy()
    for view in (0, 1):
        ours = reader.select(rows, view).patches()
        directory = layout.view_directory(store.directory, view)
        by_zarr = zarr.open_array(str(directory), mode="r")[:]
        by_tensorstore = (
            tensorstore.open(
                {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(directory)}}
            )
            .result()
            .read()
            .result()
        )
        np.testing.assert_array_equal(ours, by_zarr[rows])
        np.testing.assert_array_equal(ours, by_tensorstore[rows])
        assert by_zarr.shape == (store.samples.num_rows, 6, PATCH_DIM)
        # Row 5 is invalid, rows 6 and 7 belong to no sample: all read as NaN outside.
        assert np.isnan(store.codec.decode(by_zarr[5:8])).all()
        by_polars = pl.concat(
            [pl.read_ipc(path) for path in sorted(directory.glob("rows-*.arrow"))]
        )
        assert by_polars["sample_id"].to_list() == reader.sample_ids(rows)
        np.testing.assert_array_equal(
            by_polars["summary"].to_numpy(), reader.select(rows, view).summaries
        )


@settings(max_examples=50)
@given(data=st.data())
def test_take_in_any_order_gives_the_rows_asked_for(shared_store, data):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MAX_MAPS", "MAX_OPEN"):  # shards are let go of while a batch uses them
            patch.setattr(mapped, name, data.draw(st.integers(1, 3)))
        check_a_batch(shared_store, data)


def check_a_batch(store, data):
    reader = Reader(
        store,
        range(2),
        access=data.draw(st.sampled_from(["map", "read"])),
        threads=data.draw(st.integers(1, 3)),
    )
    if data.draw(st.booleans()):  # as if nothing were in memory: other code reads it then
        reader._resident = lambda shards, inside: False
    all_rows = store.samples.table["row"].to_list()
    rows = data.draw(st.lists(st.sampled_from(all_rows), max_size=30))
    views = data.draw(st.lists(st.integers(0, 1), min_size=len(rows), max_size=len(rows)))
    out = np.empty((len(rows), 6, PATCH_DIM), np.float16)
    selected = reader.select(rows, views)
    assert selected.patches(out) is out
    summaries, valid, digests = selected.summaries, selected.valid, selected.digests
    for n, (name, view) in enumerate(zip(reader.sample_ids(rows), views, strict=True)):
        patches, summary = features(name, view)
        assert valid[n] == (name != "a/005")
        if valid[n]:
            np.testing.assert_array_equal(out[n], patches.astype(np.float16))
            np.testing.assert_array_equal(summaries[n], summary)
        else:
            assert np.isnan(out[n]).all()
            assert np.isnan(summaries[n]).all()
        assert digests[n] == f"canvas of {name} {view}"


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory):
    toy = Toy(tmp_path_factory.mktemp("store"), bad={"a/005": "no image"})
    toy.add_samples(ids(10))
    toy.add_samples(ids(5, "b"))
    return toy.build(num_views=2)


@pytest.mark.parametrize("rows", [[0, 2, 1, 3], [3, 2, 1, 0], [3, 0, 2, 1], [1, 1, 0, 3]])
def test_rows_of_one_shard_keep_their_places(shared_store, rows):
    reader = Reader(shared_store, range(2))
    got = reader.select(rows, 1).patches()
    for place, name in enumerate(reader.sample_ids(rows)):
        np.testing.assert_array_equal(got[place], features(name, 1)[0].astype(np.float16))


def test_a_mapped_shard_is_read_after_its_file_is_gone(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(6))
    store = toy.build(num_views=1)
    reader = Reader(store)
    before = reader.select(range(6)).patches()
    for path in store.directory.glob("view-0000/c.*.0.0"):
        path.unlink()  # as another process does that makes room in a mirror
    reader._resident = lambda shards, inside: False
    np.testing.assert_array_equal(reader.select(range(6)).patches(), before)


def test_a_mapped_shard_is_read_after_it_was_built_anew_with_other_rows(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(4))
    store = toy.build(num_views=1)
    reader = Reader(store)
    before = reader.select(range(4)).patches()
    toy.bad["a/001"] = "no image"  # so that rows 2 and 3 move up in the file
    store.commit([toy.write(store, 0, store.samples.shard_range(0))])
    reader._resident = lambda shards, inside: False
    np.testing.assert_array_equal(reader.select(range(4)).patches(), before)


def test_reader_counts_and_reasons(shared_store):
    reader = Reader(shared_store, [1])
    assert len(reader) == 15
    assert reader.shards() == shared_store.samples.shards()
    assert reader.select([4, 5], 1).reasons == [None, "no image"]
    assert reader.select([4], 1).parameters == ['{"flip": false}']
    assert find_stores(shared_store.root)[0].num_valid == 2 * 14


def test_what_is_not_committed_does_not_exist(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(10))
    store = toy.store()
    with pytest.raises(NotBuilt, match="view 0 has no shard yet"):
        Reader(store)
    records = [toy.write(store, view, shard) for view, shard in store.todo(1)]
    assert len(store.todo(1)) == 3
    store.commit(records[:1])
    reader = Reader(store)
    assert len(reader) == ROWS_PER_SHARD
    with pytest.raises(MissingSamples, match="row 4 of view 0 is not built"):
        reader.select([0, 4]).patches()
    with pytest.raises(MissingSamples, match="view 1 was not opened"):
        reader.select([0], 1).patches()
    for row in (-1, 10):
        with pytest.raises(MissingSamples, match=f"row {row} holds no sample"):
            reader.select([row]).patches()
    store.commit(records[1:])
    assert not store.todo(1)
    assert len(reader) == ROWS_PER_SHARD  # a reader keeps its version
    assert len(Reader(store)) == 10
    assert len(Reader(store, version=1)) == ROWS_PER_SHARD


def test_a_manifest_outlives_the_merging_of_its_segments(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(4 * ROWS_PER_SHARD))
    store = toy.store()
    records = [toy.write(store, view, shard) for view, shard in store.todo(3)]
    store.commit(records[:1])
    before = store.manifest()  # as one process read HEAD, before another one commits and merges
    for record in records[1:]:
        store.commit([record])
    assert not before.segment_files[0][0].exists()
    assert list(before.records(version=1)) == records[:1]
    assert len(list(before.records())) == len(records)


def test_gap_rows_are_refused(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(2))
    toy.add_samples(ids(2, "b"))
    with pytest.raises(MissingSamples, match="row 3 holds no sample"):
        Reader(toy.build(1)).select([1, 3]).patches()


def test_bad_buffers_are_refused(shared_store):
    reader = Reader(shared_store, range(2))
    for bad in (
        np.empty((1, 6, PATCH_DIM), np.float32),
        np.empty((2, 6, PATCH_DIM), np.float16),
        np.empty((1, PATCH_DIM, 6), np.float16).transpose(0, 2, 1),
    ):
        with pytest.raises(ValueError, match="wants C-contiguous float16"):
            reader.select([0], 0).patches(bad)


def test_growth_only_adds_files(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(6))
    store = toy.build(1)
    before = files_under(tmp_path)
    toy.add_samples(ids(6) + ids(3, "b"))
    grown = toy.build(2)
    after = files_under(tmp_path)
    changed = {name for name in before if after[name] != before[name]}
    relative = store.directory.relative_to(tmp_path)
    assert changed == {"toy/samples/HEAD", str(relative / "view-0000/zarr.json")}
    assert len(Reader(grown, range(2))) == 9
    assert len(Reader(grown, version=2)) == 6  # the version from before growth


def test_a_builder_from_before_growth_shortens_no_array(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(8))
    before = toy.store()
    late = toy.write(before, 0, before.samples.shard_range(1))
    toy.add_samples(ids(4, "b"))
    grown = toy.store()
    grown.commit([toy.write(grown, 0, shard) for _, shard in grown.todo(1)])
    before.commit([late])
    array = zarr.open_array(str(layout.view_directory(grown.directory, 0)), mode="r")
    np.testing.assert_array_equal(array[8], features("b/000", 0)[0].astype(np.float16))


def test_a_grown_store_equals_one_built_at_once(tmp_path):
    for name, steps in (("grown", [1, 2]), ("once", [2])):
        toy = Toy(tmp_path / name)
        toy.add_samples(ids(6))
        for num_views in steps:
            toy.build(num_views)
    assert files_under(tmp_path / "grown") == files_under(tmp_path / "once")


def test_deleted_or_cut_files_are_to_do_again(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(10))
    store = toy.build(1)
    before = files_under(tmp_path)
    layout.patches_file(store.directory, 0, 1).unlink()
    rows = layout.rows_file(store.directory, 0, 2)
    rows.write_bytes(rows.read_bytes()[:-1])
    assert [shard.shard for _, shard in store.todo(1)] == [1, 2]
    with pytest.raises(Corrupt, match="no such file, though the manifest has it"):
        Reader(store).select([4]).patches()
    toy.build(1)
    assert not store.todo(1)
    assert files_under(tmp_path) == before
    assert store.manifest().version == 5
    assert len(list(store.manifest().records())) == 3


def test_features_of_other_images_are_refused(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(4))
    store = toy.build(1)
    directory = tmp_path / "toy/samples"
    for path in directory.glob("*"):
        if path.is_file():
            path.unlink()
    Samples.append(tmp_path, DATASET, sample_table(ids(4)[::-1]), ROWS_PER_SHARD)
    reader = Reader(open_store(tmp_path, store.spec))
    with pytest.raises(StoreError, match="made of other samples"):
        reader.select([0]).patches()
    with pytest.raises(StoreError, match="made of other samples"):
        len(reader.select([0]).summaries)


def test_writer_refuses_what_does_not_fit(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(4))
    store = toy.store()
    shard = store.samples.shards()[0]
    good = toy.write(store, 0, shard)
    assert good.num_valid == 4
    patches = np.zeros((4, 6, PATCH_DIM), np.float16)
    table = pl.read_ipc(layout.rows_file(store.directory, 0, 0)).drop("crc32c")
    from cache.writer import write_shard

    for bad_patches, bad_rows, message in (
        (patches[:3], table, "patches are float16\\[3, 6, 8\\]"),
        (patches.astype(np.float32), table, "patches are float32"),
        (patches, table.reverse(), "not those of the dataset's rows"),
        (patches, table.drop("valid"), "rows have columns"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shard(store, 0, shard, bad_patches, bad_rows, {})


def test_a_summary_that_is_not_finite_makes_its_row_invalid(tmp_path):
    from cache.format import rows_table
    from cache.writer import write_shard

    toy = Toy(tmp_path)
    toy.add_samples(ids(2))
    store = toy.store()
    summary = np.zeros((2, SUMMARY_DIM), np.float32)
    summary[1, 2] = np.inf
    rows = rows_table.make(ids(2), [None, None], ["x", "y"], ["{}", "{}"], summary)
    shard = store.samples.shards()[0]
    patches = np.zeros((2, 6, PATCH_DIM), np.float16)
    store.commit([write_shard(store, 0, shard, patches, rows, {})])
    reader = Reader(store)
    assert reader.select([0, 1]).valid.tolist() == [True, False]
    assert reader.select([1]).reasons == ["summary is not finite"]


def test_create_is_idempotent_and_keeps_the_first_moments(tmp_path):
    toy = Toy(tmp_path)
    toy.add_samples(ids(4))
    first = toy.store()
    other = {"summary": (7, *moments(SUMMARY_DIM)[1:]), "patches": moments(PATCH_DIM)}
    again = create_store(tmp_path, first.spec, other, {"compute_batch": 99})
    assert again.moments()["summary"][0] == 100
    assert again.provenance == {"compute_batch": 8}
    np.testing.assert_array_equal(again.moments()["patches"][2], moments(PATCH_DIM)[2])


def test_another_store_is_refused_field_by_field(tmp_path):
    toy = Toy(tmp_path)
    with pytest.raises(NotBuilt, match="has no samples"):
        toy.store()
    toy.add_samples(ids(4))
    store = toy.store()
    other = store_spec(teacher=store.spec.teacher.model_copy(update={"weights": "1" * 64}))
    with pytest.raises(FingerprintMismatch) as caught:
        open_store(tmp_path, other)
    assert "not built, build it with `eupe cache build`" in str(caught.value)
    assert caught.value.lines == [f"teacher.weights: {'1' * 64!r} != {'0' * 64!r}"]
    with pytest.raises(FingerprintMismatch, match="grid"):
        open_store(tmp_path, store_spec(grid=(GRID[0] + 1, GRID[1])))
    with pytest.raises(NotBuilt, match="no such store"):
        open_store(tmp_path, store_spec(resolution=64))
    with pytest.raises(ValueError, match="moments of patches"):
        create_store(
            tmp_path,
            store_spec("float32"),
            {"summary": moments(SUMMARY_DIM), "patches": moments(3)},
            {},
        )


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([[[1.0, 1.00390625, 1.01171875, -3.3e38, 1e-40, np.nan]]], np.float32)
    encoded = PlainCodec("bfloat16").encode(values)
    torch_bits = [0x3F80, 0x3F80, 0x3F82, 0xFF78, 0x0001, 0x7FC0]
    assert encoded.data[0, 0].tolist() == torch_bits
    assert encoded.reasons == ["patches are not finite"]


@pytest.mark.parametrize(("codec", "worst"), [("float16", 65504.0), ("bfloat16", 3.39e38)])
def test_overflow_is_invalid_with_its_reason(codec, worst):
    patches = np.full((2, 3, 4), worst, np.float32)
    patches[1, 2, 3] = {"float16": 65520.0, "bfloat16": 3.4e38}[codec]
    encoded = PlainCodec(codec).encode(patches)
    assert encoded.valid.tolist() == [True, False]
    assert f"overflow {codec}" in encoded.reasons[1]
