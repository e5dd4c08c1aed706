"""Draws with lanes: the same batch for every world size, of which a rank reads its own shards."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import bucket_server
from support.toy_stores import ROWS_PER_SHARD, Toy, ids

from cache.files import place
from cache.format import layout
from cache.reader import Reader
from cache.shard_ranges import ShardRange, ShardRanges
from cache.store import open_store
from pipelines.recipe import addresses, recipes
from pipelines.recipe.config import WorkersConfig
from pipelines.recipe.draws import TrainingDraw, lanes_of
from pipelines.recipe.mix import Mix
from pipelines.recipe.override import override
from pipelines.training.batches import Loader

GOLDEN = Path(__file__).parent / "golden" / "lanes.json"
PER_SHARD = 8
SHARDS = {
    name: ShardRanges.of([ShardRange(n, 8 * n, 8 * n + (8 if n % 5 else 3)) for n in range(count)])
    for name, count in (("in1k", 20), ("web", 31), ("photos", 9))
}
VIEWS = {"in1k": 1, "web": 3, "photos": 2}
SHARES, HOMOGENEOUS = {"in1k": 1.0, "web": 3.0, "photos": 1.0}, {"in1k": 0.1}


def mixed(lanes: int, global_batch: int = 24) -> TrainingDraw:
    mix = Mix(SHARES, HOMOGENEOUS, global_batch, 5, lanes)
    return TrainingDraw(mix, SHARDS, VIEWS, 11)


def single(lanes: int, num_shards: int, global_batch: int, seed: int = 0) -> TrainingDraw:
    """Return draws of one dataset of full shards."""
    shards = [ShardRange(n, PER_SHARD * n, PER_SHARD * (n + 1)) for n in range(num_shards)]
    mix = Mix({"a": 1.0}, {}, global_batch, seed, lanes)
    return TrainingDraw(mix, {"a": shards}, {"a": 1}, seed)


@pytest.mark.parametrize("lanes", [1, 4])
def test_draws_are_the_pinned_ones(lanes):
    """Without lanes those of the time before there were any: the first was written by that code."""
    draw = mixed(lanes)
    got = {f"step {n}": [column.tolist() for column in draw(n)] for n in (0, 1, 7, 1500)}
    assert got == json.loads(GOLDEN.read_text())[f"{lanes} lanes"]


@settings(max_examples=60)
@given(
    lanes=st.sampled_from([1, 2, 4, 8]),
    world_size=st.integers(1, 24),
    step=st.integers(0, 3000),
)
def test_ranks_of_any_world_size_share_one_batch_out(lanes, world_size, step):
    whole, draw = mixed(lanes)(step), mixed(lanes)
    parts = []
    for rank in range(world_size):
        start, stop = Loader(WorkersConfig(), rank, world_size).stretch(draw.size(step))
        parts.append(draw(step, start, stop))
    for ours, theirs in zip(zip(*parts, strict=True), whole, strict=True):
        assert np.concatenate(ours).tolist() == theirs.tolist()


@settings(max_examples=60)
@given(
    lanes=st.sampled_from([4, 8]), world_size=st.sampled_from([1, 2, 4]), step=st.integers(0, 3000)
)
def test_a_ranks_rows_are_of_its_own_lanes(lanes, world_size, step):
    draw = mixed(lanes)
    for rank in range(world_size):
        start, stop = Loader(WorkersConfig(), rank, world_size).stretch(draw.size(step))
        drawn = draw(step, start, stop)
        own = slice(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        for number, name in enumerate(draw.names):
            rows = {
                row
                for lane in lanes_of(SHARDS[name], name, lanes)[own]
                for first, length in zip(lane.starts, lane.lengths, strict=True)
                for row in range(first, first + length)
            }
            assert set(drawn.rows[drawn.datasets == number].tolist()) <= rows


@settings(max_examples=40)
@given(lanes=st.sampled_from([2, 4, 8]), num_shards=st.integers(8, 60), epochs=st.integers(1, 4))
def test_every_row_is_shown_as_often_as_any_other_give_or_take_two(lanes, num_shards, epochs):
    """Lanes differ by a row, and are each somewhere in an epoch: by one more picture at most."""
    draw = single(lanes, num_shards, global_batch=2 * lanes)
    num_rows = num_shards * PER_SHARD
    steps = epochs * num_rows // (2 * lanes)
    counts = np.bincount(
        np.concatenate([draw(step).rows for step in range(steps)]), minlength=num_rows
    )
    assert counts.max() - counts.min() <= 2
    assert counts.min() >= epochs - 1


def test_an_epoch_of_full_lanes_shows_every_row_once():
    draw = single(4, num_shards=64, global_batch=32)
    rows = np.concatenate([draw(step).rows for step in range(64 * PER_SHARD // 32)])
    assert sorted(rows.tolist()) == list(range(64 * PER_SHARD))


def test_lanes_are_the_same_for_every_seed_and_their_order_is_not():
    """Copies of shards that a node has serve the next run too."""
    first, second = (single(4, 64, 32, seed) for seed in (0, 1))
    rows = [
        np.concatenate([draw(step, 0, 8).rows for step in range(16)]) for draw in (first, second)
    ]
    assert sorted(rows[0].tolist()) == sorted(rows[1].tolist())
    assert rows[0].tolist() != rows[1].tolist()


def effective_classes(batches: list[np.ndarray], num_classes: int) -> float:
    """Return 2 ** entropy of the labels in a batch, mean over the batches."""
    found = []
    for labels in batches:
        share = np.bincount(labels, minlength=num_classes) / len(labels)
        share = share[share > 0]
        found.append(2 ** -(share * np.log2(share)).sum())
    return float(np.mean(found))


def together(batches: list[np.ndarray], num_shards: int) -> float:
    """Return how often two rows of a batch are of one shard, against rows drawn by chance: 1."""
    found = []
    for shards in batches:
        counts = np.bincount(shards)
        found.append((counts * (counts - 1)).sum() / (len(shards) * (len(shards) - 1)))
    return float(np.mean(found)) * num_shards


def test_lanes_mix_a_dataset_sorted_by_class_better_than_one_buffer_of_as_many_rows():
    """ImageNet-1k in small: 160,000 rows in 1,000 classes, 1,000 shards, a buffer of 24 shards.

    A full shuffle has all it can of either measure, one lane two or three classes a shard in its
    buffer, and lanes as many shards at once as there are lanes at least.
    """
    num_rows, per_shard, classes, batch = 160_000, 160, 1000, 1024
    starts = np.arange(0, num_rows, per_shard)
    shards = ShardRanges(np.arange(len(starts)), starts, starts + per_shard)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.recipe.draws.BUFFER_ROWS", 24 * per_shard)
        for lanes in (1, 256):
            mix = Mix({"a": 1.0}, {}, batch, 0, lanes)
            draw = TrainingDraw(mix, {"a": shards}, {"a": 1}, 0)
            rows = [draw(step).rows for step in range(20, 60)]
            found[lanes] = rows
    full = np.random.default_rng(0).permutation(num_rows)[: 40 * batch].reshape(40, batch)
    found[0] = list(full)
    entropy = {
        lanes: effective_classes([rows * classes // num_rows for rows in each], classes)
        for lanes, each in found.items()
    }
    pairs = {
        lanes: together([rows // per_shard for rows in each], len(shards))
        for lanes, each in found.items()
    }
    assert 540 < entropy[0] < 600
    assert 0.9 < pairs[0] < 1.1
    assert entropy[1] < 60
    assert pairs[1] > 20
    assert entropy[256] > 4 * entropy[1]
    assert pairs[256] < pairs[1] / 4


@pytest.mark.slow
def test_each_byte_is_fetched_by_one_node(s3, tmp_path, monkeypatch):
    """Four nodes of two ranks train an epoch out of a bucket, each through a mirror of its own."""
    toy = Toy(place.root(f"s3://{bucket_server.NAME}/lanes"))
    samples = toy.add_samples(ids(ROWS_PER_SHARD * 30))
    store = toy.store()
    store.commit([toy.write(store, *missing) for missing in store.todo(1)])
    nodes, ranks, batch = 4, 8, 24
    mix = Mix({"toy": 1.0}, {}, batch, 0, lanes=8)
    draw = TrainingDraw(mix, {"toy": samples.shards()}, {"toy": 1}, 0)
    s3.behave()
    seen = []
    for node in range(nodes):
        monkeypatch.setenv("EUPE_MIRROR", str(tmp_path / f"mirror of node {node}"))
        for rank in range(node * ranks // nodes, (node + 1) * ranks // nodes):
            reader = Reader(open_store(toy.root, store.spec))
            for step in range(len(samples) // batch):
                drawn = draw(step, *Loader(WorkersConfig(), rank, ranks).stretch(batch))
                selection = reader.select(drawn.rows, drawn.view_numbers)
                assert selection.patches().shape[0] == batch // ranks
                seen += drawn.rows.tolist()
    assert sorted(seen) == list(range(len(samples)))
    files = [layout.patches_file(store.directory, 0, shard.shard) for shard in samples.shards()]
    data = sum(file.stat().st_size for file in files)
    fetched = sum(s3.sent[f"/{file.key}"] for file in files)
    # Every byte, and the two shards that a cut between nodes goes through once more.
    assert data < fetched <= (1 + 2 / 30) * data < 1.1 * data


def test_one_lane_is_no_part_of_an_address():
    """What was trained before there were lanes keeps its address; other lanes are another run."""
    run = recipes.get("eupe_vitt16_tiny")
    assert addresses.lanes(run) == {}
    assert addresses.lanes(override(run, ["lanes=2"])) == {"lanes": 2}
