"""Lanes: equal parts of a dataset's rows, of as few shards as can be."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.lanes import Dealt
from cache.shard_ranges import ShardRange, ShardRanges

shard_lists = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(
    lambda lengths: ShardRanges.of(
        [ShardRange(n, 9 * n, 9 * n + length) for n, length in enumerate(lengths)]
    )
)


@settings(max_examples=200)
@given(shards=shard_lists, data=st.data())
def test_lanes_are_equal_parts_of_the_rows(shards, data):
    count = data.draw(st.integers(1, int(shards.lengths.sum())))
    lanes = Dealt(shards, count, "test")
    rows = [
        np.concatenate(
            [np.arange(n, n + k) for n, k in zip(lane.starts, lane.lengths, strict=True)]
        )
        for lane in lanes
    ]
    every = [row for shard in shards for row in range(shard.start, shard.stop)]
    assert sorted(np.concatenate(rows).tolist()) == every
    assert {len(own) for own in rows} <= {len(every) // count, -(-len(every) // count)}
    for lane, own in zip(lanes, rows, strict=True):
        assert lane.places.tolist() == np.unique(own // 9).tolist()  # rising, none without a row
    # A shard is read by more lanes than one only where a cut goes through it.
    assert sum(len(lane.places) for lane in lanes) <= len(shards) + count - 1


def test_one_lane_has_the_shards_as_they_are():
    shards = ShardRanges.of([ShardRange(n, 9 * n, 9 * n + 9 - n % 3) for n in range(20)])
    (lane,) = Dealt(shards, 1, "test")
    assert lane.places.tolist() == list(range(20))
    assert lane.starts.tolist() == shards.starts.tolist()
    assert lane.lengths.tolist() == shards.lengths.tolist()


def test_neighbours_are_dealt_to_different_lanes():
    """A dataset sorted by class: a lane of neighbours would have few of its classes."""
    shards = ShardRanges.of([ShardRange(n, 9 * n, 9 * n + 9) for n in range(1600)])
    lanes = Dealt(shards, 16, "test")
    for lane in lanes:
        # 100 of 1600 by chance: their mean has deviation 45.
        assert abs(lane.places.mean() - 800) < 5 * 45
    other = Dealt(shards, 16, "another")
    assert [a.places.tolist() for a in lanes] != [b.places.tolist() for b in other]


def test_a_lane_is_found_by_its_number_and_from_the_end():
    shards = ShardRanges.of([ShardRange(n, 9 * n, 9 * n + 9) for n in range(20)])
    lanes = Dealt(shards, 4, "test")
    assert len(lanes) == 4
    assert [lane.places.tolist() for lane in lanes[1:3]] == [
        lanes[n].places.tolist() for n in (1, 2)
    ]
    assert lanes[-1].places.tolist() == lanes[3].places.tolist()
    with pytest.raises(IndexError):
        lanes[4]


def test_more_lanes_than_rows_are_refused():
    with pytest.raises(ValueError, match="3 rows for 4 lanes: wants lanes = 3 or fewer"):
        Dealt(ShardRanges.of([ShardRange(0, 0, 3)]), 4, "test")
