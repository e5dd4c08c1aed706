"""Intervals and paired tests: exact where they claim it, and as wide as the images make them."""

from itertools import product

import numpy as np
import pytest
from scipy import stats

from eupe import paired
from eupe.paired import paired_test

# Of a quantile of RESAMPLES draws, in deviations of what is resampled.
DRAWN = 0.1


def bools(*lengths: int) -> np.ndarray:
    """Return that many of True, then of False, and so on."""
    return np.concatenate([np.full(n, place % 2 == 0) for place, n in enumerate(lengths)])


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 2**5),
        (0, 5, 2 / 2**5),
        (8, 1, 2 * (1 + 9) / 2**9),
        (3, 3, 1.0),
    ],
)
def test_paired_test_is_exact(only_a, only_b, p):
    a = np.array([True] * only_a + [False] * only_b + [True, False])
    b = np.array([False] * only_a + [True] * only_b + [True, False])
    assert paired_test(a, b) == pytest.approx(p)


def test_paired_test_of_many_queries_does_not_overflow():
    a = np.ones(3000, dtype=bool)
    assert 0 <= paired_test(a, ~a) < 1e-300


def test_several_runs_are_flipped_image_by_image():
    """Every way to exchange a and b on whole images, in all runs at once, is as likely."""
    drawn = np.random.default_rng(3)
    a, b = drawn.random((3, 9)) < 0.7, drawn.random((3, 9)) < 0.5
    by_image = (a.astype(int) - b).sum(0)
    flips = [abs(np.dot(signs, by_image)) for signs in product((-1, 1), repeat=9)]
    assert paired_test(a, b) == pytest.approx(np.mean(np.array(flips) >= abs(by_image.sum())))


def test_three_equal_runs_say_no_more_than_one():
    a, b = bools(30, 10), bools(22, 18)
    assert paired_test(np.stack([a] * 3), np.stack([b] * 3)) == pytest.approx(paired_test(a, b))


def test_an_interval_of_a_share_is_the_bootstraps():
    correct = bools(30, 70)
    found = paired.share_interval(correct)
    drawn = np.random.default_rng(0)
    means = correct[drawn.integers(100, size=(20_000, 100))].mean(1)
    assert found.value == 0.3
    wanted = np.quantile(means, (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx(wanted, abs=0.011)  # one image, rounded


def test_an_interval_of_a_mean_is_that_of_normal_values():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    found, error = paired.mean_interval(values), values.std() / 20
    assert found.value == values.mean()
    for end, quantile in ((found.low, 0.025), (found.high, 0.975)):
        assert end == pytest.approx(values.mean() + error * stats.norm.ppf(quantile), abs=0.02)
    assert found == paired.mean_interval(values)  # nothing is drawn twice


def test_runs_that_differ_widen_an_interval_and_more_images_do_not_narrow_that():
    drawn = np.random.default_rng(2)
    noise = drawn.normal(size=(3, 4000))
    alike, apart = noise, noise + np.array([[-1.0], [0.0], [1.0]])
    width = [found.high - found.low for found in map(paired.runs_interval, (alike, apart))]
    assert width[0] < 0.1
    assert width[1] > 1


def test_a_ratio_is_of_the_means_and_is_bounded_by_its_images():
    drawn = np.random.default_rng(4)
    whole = drawn.random((3, 500)) + 0.5
    part = 0.4 * whole + 0.01 * drawn.normal(size=(3, 500))
    found = paired.ratio_interval(part, whole)
    assert found.value == part.mean() / whole.mean()
    assert found.low < 0.4 < found.high
    assert found.high - found.low < 0.01
    assert paired.ratio_interval(part, np.zeros_like(whole)) is None
