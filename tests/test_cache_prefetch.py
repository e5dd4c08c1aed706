"""Prefetched batches are those that would be read one by one; errors arrive with their batch."""

import threading

import numpy as np
import pytest
from cache_stores import Toy, ids

from cache.errors import MissingSamples
from cache.prefetch import prefetch
from cache.reader import Reader


@pytest.fixture(scope="module", params=["float16", "rot2"])
def reader(request, tmp_path_factory):
    toy = Toy(tmp_path_factory.mktemp("store"), request.param, bad={"a/003": "no image"})
    toy.add_samples(ids(10))
    return Reader(toy.build(num_views=2), 2)


def addresses(sizes):
    rng = np.random.default_rng(0)
    return [(rng.integers(0, 10, size), rng.integers(0, 2, size)) for size in sizes]


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_come_in_order_and_whole(reader, depth):
    work = addresses([6] * 9 + [2])
    with prefetch(reader, iter(work), depth) as batches:
        got = 0
        for (rows, views), batch in zip(work, batches, strict=True):
            np.testing.assert_array_equal(batch.rows, rows)
            np.testing.assert_array_equal(batch.patches, reader.take(rows, views))
            np.testing.assert_array_equal(batch.summaries, reader.summaries(rows, views))
            np.testing.assert_array_equal(batch.valid, reader.valid(rows, views))
            wanted = reader.escapes(rows, views)
            for mine, theirs in zip(batch.escapes, wanted, strict=True):
                np.testing.assert_array_equal(mine, theirs)
            got += 1
    assert got == len(work)


def test_an_error_is_raised_with_its_batch_and_the_thread_ends(reader):
    work = addresses([4, 4])
    work.insert(1, (np.array([99]), np.array([0])))
    with prefetch(reader, work, depth=1) as batches:
        assert len(next(batches).rows) == 4
        with pytest.raises(MissingSamples, match="row 99"):
            next(batches)
    assert not any(t.name.startswith("cache-prefetch") for t in threading.enumerate())


def test_leaving_early_leaves_nothing_running(reader):
    with prefetch(reader, iter(addresses([4] * 50)), depth=2) as batches:
        next(batches)
    assert not any(t.name.startswith("cache-prefetch") for t in threading.enumerate())


def test_bad_buffers_are_refused(reader):
    with (
        pytest.raises(ValueError, match=r"depth \+ 1 buffers"),
        prefetch(reader, [], 2, [np.empty(3)]),
    ):
        pass
    with (
        prefetch(reader, addresses([2, 5]), 1) as batches,
        pytest.raises(ValueError, match="batch of 5 rows"),
    ):
        list(batches)
