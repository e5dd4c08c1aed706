"""Epoch order: a permutation, seekable, local, as random as it says, and the same for ever."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.order import EpochOrder
from cache.shard_ranges import ShardRange
from eupe.addressed import hashed

GOLDEN = Path(__file__).parent / "golden" / "cache_order.json"

shard_lists = st.lists(st.integers(1, 7), min_size=1, max_size=20).map(
    lambda lengths: [ShardRange(n, 8 * n, 8 * n + length) for n, length in enumerate(lengths)]
)


@settings(max_examples=200)
@given(shards=shard_lists, seed=st.integers(0, 2**40), buffer=st.integers(1, 60), data=st.data())
def test_every_row_once_and_any_stretch_is_found(shards, seed, buffer, data):
    order = EpochOrder.of(shards, seed, buffer)
    whole = order.rows(3, 0, order.num_rows)
    assert sorted(whole) == [row for shard in shards for row in range(shard.start, shard.stop)]
    start = data.draw(st.integers(0, order.num_rows))
    stop = data.draw(st.integers(start, order.num_rows))
    fresh = EpochOrder.of(shards, seed, buffer)
    assert fresh.rows(3, start, stop).tolist() == whole[start:stop].tolist()


@pytest.mark.parametrize("fraction_bits", [20, 50])  # of 50 a place and its time are no one number
@pytest.mark.parametrize("buffer", [16, 21])
def test_rows_come_out_when_they_are_due(fraction_bits, buffer, monkeypatch):
    monkeypatch.setattr("cache.order._FRACTION_BITS", fraction_bits)
    shards = [ShardRange(n, 8 * n, 8 * n + 5 + n % 4) for n in range(40)]
    order = EpochOrder.of(shards, 7, buffer)
    sequence = np.concatenate(
        [np.arange(shards[n].start, shards[n].stop) for n in order.sequence(1).tolist()]
    )
    places = np.arange(len(sequence))
    waits = hashed(places, "cache.order/7/1/rows") % np.uint64(buffer << fraction_bits)
    due = (np.maximum(places, buffer) << fraction_bits) + waits.astype(np.int64)
    expected = sequence[np.argsort(due, kind="stable")]
    np.testing.assert_array_equal(order.rows(1, 0, order.num_rows), expected)


def test_seeds_and_epochs_differ():
    shards = [ShardRange(n, 8 * n, 8 * n + 8) for n in range(16)]
    orders = {
        (seed, epoch): tuple(EpochOrder.of(shards, seed, 32).rows(epoch, 0, 128))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4


def test_shards_are_wanted_one_after_the_other_at_an_even_pace():
    per_shard, num_shards, buffer = 10, 1000, 100
    shards = [ShardRange(n, per_shard * n, per_shard * (n + 1)) for n in range(num_shards)]
    rows = EpochOrder.of(shards, 0, buffer).rows(0, 0, per_shard * num_shards) // per_shard
    first = {int(shard): place for place, shard in reversed(list(enumerate(rows)))}
    last = {int(shard): place for place, shard in enumerate(rows)}
    # A row waits for at most the buffer, one more while the buffer is first filled.
    assert max(last[shard] - first[shard] for shard in first) <= 2 * buffer + per_shard
    arrivals = np.sort(list(first.values()))
    steady = arrivals[(arrivals >= 2 * buffer) & (arrivals < len(rows) - 2 * buffer)]
    quarter = buffer // 4  # 2.5 shards' worth; a window shuffled by itself wants its 10 at once
    for start in range(2 * buffer, len(rows) - 4 * buffer, quarter):
        assert np.count_nonzero((steady >= start) & (steady < start + quarter)) <= 7


def test_memory_is_of_the_shards_not_of_the_rows():
    num_shards, per_shard = 100_000, 17_000
    starts = np.arange(num_shards, dtype=np.int64) * per_shard
    tracemalloc.start()
    order = EpochOrder(starts, np.full(num_shards, per_shard), seed=0)
    assert order.num_rows == 1_700_000_000
    middle = order.rows(0, 850_000_000, 850_000_064)
    assert len(set(middle.tolist())) == 64
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32e6  # 1.7e9 row numbers are 13.6 GB


def test_order_is_the_pinned_one():
    shards = [ShardRange(n, 8 * n, 8 * n + length) for n, length in enumerate([8, 8, 3, 8, 5, 8])]
    order = EpochOrder.of(shards, seed=7, buffer_rows=16)
    got = {f"epoch {epoch}": order.rows(epoch, 0, order.num_rows).tolist() for epoch in (0, 1)}
    assert got == json.loads(GOLDEN.read_text())


def shards_of_a_batch(rows: np.ndarray, per_shard: int, batch: int) -> float:
    """Return how many shards a batch's rows come from, mean over the batches."""
    batches = (rows // per_shard).reshape(-1, batch)
    return float(np.mean([len(np.unique(each)) for each in batches]))


def neighbours(rows: np.ndarray) -> float:
    """Return the share of rows that are followed by the very next one."""
    return float(np.mean(np.diff(rows) == 1))


def test_a_dataset_that_fits_in_the_buffer_is_as_random_as_a_full_shuffle():
    per_shard, num_shards, batch = 64, 64, 64
    num_rows = per_shard * num_shards
    shards = [ShardRange(n, per_shard * n, per_shard * (n + 1)) for n in range(num_shards)]
    rows = EpochOrder.of(shards, 0, buffer_rows=num_rows).rows(0, 0, num_rows)
    full = np.random.default_rng(0).permutation(num_rows)
    ours, theirs = (shards_of_a_batch(each, per_shard, batch) for each in (rows, full))
    # 64 draws of 64 shards hit 40.6 of them; the mean of 64 batches has deviation 0.25.
    assert abs(ours - theirs) < 4 * 0.25 * 2**0.5
    assert neighbours(rows) < 4 / num_rows + 4 * num_rows**-0.5 / 8
    # Places of a dataset's rows are uncorrelated with their numbers, beyond chance.
    assert abs(np.corrcoef(rows, np.arange(num_rows))[0, 1]) < 4 * num_rows**-0.5


def test_a_small_buffer_mixes_the_shards_that_it_holds():
    per_shard, num_shards, batch = 64, 512, 64
    shards = [ShardRange(n, per_shard * n, per_shard * (n + 1)) for n in range(num_shards)]
    order = EpochOrder.of(shards, 0, buffer_rows=32 * per_shard)
    rows = order.rows(0, 0, per_shard * num_shards)
    # 64 draws from 32 shards hit 27.8 of them; a full shuffle of 512 shards would hit 60.2.
    assert 25 < shards_of_a_batch(rows, per_shard, batch) < 33
    assert neighbours(rows) < 0.002  # without a buffer nearly all are
    # The shards are the independent draws: their rank correlation has deviation 512 ** -0.5.
    assert abs(np.corrcoef(rows, np.arange(len(rows)))[0, 1]) < 4 * num_shards**-0.5


def test_bad_positions_are_refused():
    order = EpochOrder.of([ShardRange(0, 0, 5)], 0)
    with pytest.raises(ValueError, match="an epoch has 0 to 5"):
        order.rows(0, 0, 6)
    with pytest.raises(ValueError, match="no rows"):
        EpochOrder.of([], 0)
    with pytest.raises(ValueError, match="buffer_rows = 0"):
        EpochOrder.of([ShardRange(0, 0, 5)], 0, buffer_rows=0)
