"""Epoch order: a permutation, seekable, local, and the same for ever."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.order import EpochOrder
from cache.samples import ShardRange

GOLDEN = Path(__file__).parent / "golden" / "cache_order.json"

shard_lists = st.lists(st.integers(1, 7), min_size=1, max_size=20).map(
    lambda lengths: [ShardRange(n, 8 * n, 8 * n + length) for n, length in enumerate(lengths)]
)


@settings(max_examples=100, deadline=None)
@given(shards=shard_lists, seed=st.integers(0, 2**40), window=st.integers(1, 60), data=st.data())
def test_every_row_once_and_any_stretch_is_found(shards, seed, window, data):
    order = EpochOrder(shards, seed, window)
    whole = order.rows(3, 0, order.num_rows)
    assert sorted(whole) == [row for shard in shards for row in range(shard.start, shard.stop)]
    start = data.draw(st.integers(0, order.num_rows))
    stop = data.draw(st.integers(start, order.num_rows))
    fresh = EpochOrder(shards, seed, window)
    assert fresh.rows(3, start, stop).tolist() == whole[start:stop].tolist()


def test_seeds_and_epochs_differ():
    shards = [ShardRange(n, 8 * n, 8 * n + 8) for n in range(16)]
    orders = {
        (seed, epoch): tuple(EpochOrder(shards, seed, 32).rows(epoch, 0, 128))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_a_stretch_touches_few_shards():
    shards = [ShardRange(n, 10 * n, 10 * n + 10) for n in range(1000)]
    order = EpochOrder(shards, 0, window_rows=100)
    for start in range(0, 10_000, 1000):
        touched = np.unique(order.rows(0, start, start + 100) // 10)
        assert len(touched) <= 20  # two windows of ten shards


def test_memory_is_of_the_shards_not_of_the_rows():
    starts = np.arange(10, dtype=np.int64) * 2**40
    order = EpochOrder((starts, np.full(10, 2**20)), seed=0)
    assert order.num_rows == 10 * 2**20
    assert len(order.rows(0, 5 * 2**20, 5 * 2**20 + 64)) == 64


def test_order_is_the_pinned_one():
    shards = [ShardRange(n, 8 * n, 8 * n + length) for n, length in enumerate([8, 8, 3, 8, 5, 8])]
    order = EpochOrder(shards, seed=7, window_rows=16)
    got = {f"epoch {epoch}": order.rows(epoch, 0, order.num_rows).tolist() for epoch in (0, 1)}
    assert got == json.loads(GOLDEN.read_text())


def test_position_in_order_is_unrelated_to_row():
    """Against a full shuffle: rank correlation of row and position is that of chance."""
    shards = [ShardRange(n, 64 * n, 64 * n + 64) for n in range(512)]
    rows = EpochOrder(shards, 0, window_rows=2048).rows(0, 0, 64 * 512)
    correlation = np.corrcoef(rows, np.arange(len(rows)))[0, 1]
    # The shards are the independent draws: their rank correlation has deviation 512 ** -0.5.
    assert abs(correlation) < 4 * 512**-0.5


def test_bad_positions_are_refused():
    order = EpochOrder([ShardRange(0, 0, 5)], 0)
    with pytest.raises(ValueError, match="an epoch has 0 to 5"):
        order.rows(0, 0, 6)
    with pytest.raises(ValueError, match="no rows"):
        EpochOrder([], 0)
    with pytest.raises(ValueError, match="window_rows = 0"):
        EpochOrder([ShardRange(0, 0, 5)], 0, window_rows=0)
