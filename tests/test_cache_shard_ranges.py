"""Shards as arrays: what is counted and compared of them, whatever lengths they have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.shard_ranges import ShardRange, ShardRanges

lengths_of_shards = st.lists(st.integers(1, 9), max_size=30) | st.integers(0, 30).map(
    lambda count: [9] * count
)


def ranges(lengths: list[int]) -> ShardRanges:
    return ShardRanges.of([ShardRange(n, 9 * n, 9 * n + rows) for n, rows in enumerate(lengths)])


@given(lengths=lengths_of_shards, views=st.integers(1, 3), data=st.data())
def test_rows_of_views_are_counted(lengths, views, data):
    shards, size = ranges(lengths), views * len(lengths)
    chosen = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = np.array(chosen, bool).reshape(views, len(lengths))
    assert shards.count(mask) == sum(
        rows * shown
        for of_view in mask.tolist()
        for rows, shown in zip(lengths, of_view, strict=True)
    )
    assert shards.num_rows == sum(lengths)


@given(lengths=lengths_of_shards, data=st.data())
def test_the_lengths_of_some_shards_are_found(lengths, data):
    places = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1)))) if lengths else []
    found = ranges(lengths).lengths_at(np.array(places, np.int64))
    assert found.tolist() == [lengths[place] for place in places]


@pytest.mark.parametrize("other", [[9, 9, 8], [9, 9, 9, 9], [8, 9, 9]])
def test_shards_of_other_rows_have_another_digest(other):
    assert ranges([9, 9, 9]).digest == ranges([9, 9, 9])[:].digest != ranges(other).digest
