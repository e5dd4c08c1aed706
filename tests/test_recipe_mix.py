"""The mix of datasets: its frequencies, its determinism, and that epochs are walked whole."""

import numpy as np
import pytest

from pipelines.recipe.mix import STEPS_PER_BLOCK, Mix

DRAWS = 100_000
# Five standard errors of a frequency over DRAWS: a false alarm once in a million runs, and the
# seed is fixed besides.
TOLERANCE = 5 * 0.5 / np.sqrt(DRAWS)


PINNED_COUNTS = [[0, 6, 2], [0, 6, 2], [8, 0, 0]]
PINNED_POSITIONS = [6, 8, 10, 2, 3, 9, 7, 11]


def paper_mix(global_batch: int = 8, seed: int = 3, lanes: int = 1) -> Mix:
    return Mix({"in1k": 1.0, "web": 3.0, "photos": 1.0}, {"in1k": 0.1}, global_batch, seed, lanes)


def test_frequencies_over_100_000_draws() -> None:
    mix = paper_mix()
    counts = np.stack([mix.counts(step) for step in range(DRAWS)])
    assert (counts.sum(axis=1) == 8).all()
    homogeneous = counts[:, 0] > 0
    assert (counts[homogeneous] == [8, 0, 0]).all(), "a homogeneous batch holds one dataset"
    assert abs(homogeneous.mean() - 0.1) < TOLERANCE
    rest = counts[~homogeneous].sum(axis=0)
    assert abs(rest[1] / rest.sum() - 0.75) < TOLERANCE
    assert abs(rest[2] / rest.sum() - 0.25) < TOLERANCE


def test_shares_that_are_expected_are_those_that_are_drawn() -> None:
    mix = paper_mix(64)
    drawn = mix.consumed(20_000).sum(axis=0) / mix.consumed(20_000).sum()
    np.testing.assert_allclose(mix.expected(), drawn, atol=0.01)
    assert mix.expected().sum() == pytest.approx(1)
    assert Mix({"alone": 3.0}, {}, 8, 0).expected().tolist() == [1.0]


@pytest.mark.slow
def test_a_mixed_batch_holds_its_shares_to_within_one_slot() -> None:
    counts = np.stack([paper_mix(global_batch=30).counts(step) for step in range(2000)])
    mixed = counts[counts[:, 0] == 0]
    assert set(mixed[:, 1].tolist()) == {22, 23}  # three quarters of 30


@pytest.mark.parametrize("lanes", [1, 4, 12])
@pytest.mark.parametrize("steps", [1, 7, STEPS_PER_BLOCK + 3])
def test_what_steps_take_of_each_lane_is_where_its_stretches_end(lanes, steps) -> None:
    mix = paper_mix(global_batch=60, lanes=lanes)
    for name in mix.names:
        ends = [int(mix.stretches(name, steps, lane)[-1]) for lane in range(lanes)]
        assert mix.totals(name, steps).tolist() == ends


def test_draws_are_the_pinned_ones() -> None:
    """A resumed run must draw what the run before it drew, with any version of numpy."""
    mix = paper_mix()
    assert [mix.counts(step).tolist() for step in (0, 1, 5000)] == PINNED_COUNTS
    assert mix.slots(1).positions.tolist() == PINNED_POSITIONS


def test_any_step_can_be_asked_first() -> None:
    walked, resumed = paper_mix(), paper_mix()
    far = 5 * STEPS_PER_BLOCK + 17
    for step in range(0, far, 101):
        walked.slots(step)
    for ours, theirs in zip(walked.slots(far), resumed.slots(far), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(walked.slots(3).positions, paper_mix().slots(3).positions)


@pytest.mark.parametrize("lanes", [1, 4])
def test_every_dataset_is_walked_position_by_position_in_every_lane(lanes) -> None:
    mix = paper_mix(global_batch=32, lanes=lanes)
    steps = range(STEPS_PER_BLOCK - 20, STEPS_PER_BLOCK + 20)
    seen: dict[tuple[int, int], list[int]] = {}
    for step in steps:
        slots = mix.slots(step)
        for lane in range(lanes):
            own = slice(lane * 32 // lanes, (lane + 1) * 32 // lanes)
            for dataset in range(3):
                found = slots.positions[own][slots.datasets[own] == dataset]
                seen.setdefault((lane, dataset), []).extend(sorted(found.tolist()))
    for (lane, dataset), positions in seen.items():
        first = int(mix.consumed(steps[0])[lane, dataset])
        assert positions == list(range(first, first + len(positions)))
        bounds = mix.stretches(mix.names[dataset], steps[-1] + 1, lane)
        assert [first, first + len(positions)] == bounds[[steps[0], -1]].tolist()


def test_lanes_share_a_batch_out_and_leave_it_as_it_is() -> None:
    alone, dealt = paper_mix(global_batch=64), paper_mix(global_batch=64, lanes=16)
    for step in range(200):
        of_lanes = np.diff([dealt.consumed(at) for at in (step, step + 1)], axis=0)[0]
        assert of_lanes.sum(axis=0).tolist() == alone.counts(step).tolist()
        assert (of_lanes.sum(axis=1) == 4).all()
        assert (of_lanes.max(axis=0) - of_lanes.min(axis=0)).max() <= 1
    for name in alone.names:
        whole = sum(dealt.stretches(name, 200, lane) for lane in range(16))
        assert np.array_equal(whole, alone.stretches(name, 200))
        assert np.array_equal(whole, dealt.stretches(name, 200))


def test_no_lane_gets_more_of_a_dataset_than_another_in_the_long_run() -> None:
    """The lane that has one slot more is another at every step, by chance."""
    steps = 40_000
    mix = paper_mix(global_batch=20, lanes=4)  # 3.75 slots of web in a heterogeneous batch
    for name in mix.names:
        counts = [int(mix.stretches(name, steps, lane)[-1]) for lane in range(4)]
        # A step moves a lane from the mean by half a slot's deviation at most.
        assert max(counts) - min(counts) < 2 * 4 * 0.5 * steps**0.5


def test_another_seed_draws_otherwise() -> None:
    ours = [paper_mix(seed=1).counts(step).tolist() for step in range(50)]
    assert ours != [paper_mix(seed=2).counts(step).tolist() for step in range(50)]


def test_one_dataset_is_its_own_mix() -> None:
    mix = Mix({"only": 1.0}, {}, 4, 0)
    assert sorted(mix.slots(2).positions.tolist()) == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("shares", "homogeneous", "says"),
    [
        ({"a": 1.0}, {"b": 0.1}, "train sets are"),
        ({"a": 1.0, "b": 1.0}, {"a": 0.9, "b": 0.2}, "at most 1"),
        ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.4}, "leaves no dataset"),
    ],
)
def test_bad_mixes_are_named(
    shares: dict[str, float], homogeneous: dict[str, float], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Mix(shares, homogeneous, 8, 0)


def test_a_batch_that_lanes_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch = 12 .* 8 lanes; .* or lanes = 4"):
        Mix({"a": 1.0}, {}, 12, 0, lanes=8)
