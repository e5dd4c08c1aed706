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


def paper_mix(global_batch: int = 8, seed: int = 3) -> Mix:
    return Mix({"in1k": 1.0, "web": 3.0, "photos": 1.0}, {"in1k": 0.1}, global_batch, seed)


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
    drawn = mix.consumed(20_000) / mix.consumed(20_000).sum()
    np.testing.assert_allclose(mix.expected(), drawn, atol=0.01)
    assert mix.expected().sum() == pytest.approx(1)
    assert Mix({"alone": 3.0}, {}, 8, 0).expected().tolist() == [1.0]


@pytest.mark.slow
def test_a_mixed_batch_holds_its_shares_to_within_one_slot() -> None:
    counts = np.stack([paper_mix(global_batch=30).counts(step) for step in range(2000)])
    mixed = counts[counts[:, 0] == 0]
    assert set(mixed[:, 1].tolist()) == {22, 23}  # three quarters of 30


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


def test_every_dataset_is_walked_position_by_position() -> None:
    mix = paper_mix()
    seen: list[list[int]] = [[], [], []]
    for step in range(STEPS_PER_BLOCK - 20, STEPS_PER_BLOCK + 20):
        slots = mix.slots(step)
        for dataset in range(3):
            seen[dataset] += sorted(slots.positions[slots.datasets == dataset].tolist())
    for dataset, positions in enumerate(seen):
        first = int(mix.consumed(STEPS_PER_BLOCK - 20)[dataset])
        assert positions == list(range(first, first + len(positions)))


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
