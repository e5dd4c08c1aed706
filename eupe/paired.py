"""Intervals and paired tests over held-out images: what a figure would be on other images."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import signal, stats

from eupe.addressed import MOST_BITS, bits

LEVEL = 0.95
"""Of every interval."""
RESAMPLES = 2_000
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over images and its bootstrap interval, LEVEL.

    Attributes:
        value: the mean.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float


def share_interval(correct: npt.NDArray[np.bool_]) -> Interval:
    """Return the share of images that are right, with its percentile bootstrap interval.

    Resampled shares are binomial, so their quantiles are exact: nothing is drawn.

    Args:
        correct: bool [q].
    """
    count, share = len(correct), float(correct.mean())
    low, high = stats.binom.ppf(_ends(), count, share) / count
    return Interval(share, float(low), float(high))


def mean_interval(values: Values) -> Interval:
    """Return the mean of a figure of each image [q], with its percentile bootstrap interval."""
    means = _resampled(values[None]).mean(0)
    low, high = np.quantile(means, _ends())
    return Interval(float(values.mean()), float(low), float(high))


def runs_interval(values: Values) -> Interval:
    """Return the mean of a figure of each run and image, bootstrapped over both.

    Args:
        values: [runs, q]; every run saw the same images.
    """
    low, high = np.quantile(_means_of_runs(values), _ends())
    return Interval(float(values.mean()), float(low), float(high))


def ratio_interval(numerators: Values, denominators: Values) -> Interval | None:
    """Return the ratio of two means over runs and images, bootstrapped over both.

    Args:
        numerators: [runs, q].
        denominators: [runs, q], of the same runs and images.

    Returns:
        None where the denominators' mean is not above 0, so that there is no way to go a part of.
    """
    if denominators.mean() <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _means_of_runs(numerators) / _means_of_runs(denominators)
    low, high = np.nanquantile(ratios, _ends(), method="inverted_cdf")
    return Interval(float(numerators.mean() / denominators.mean()), float(low), float(high))


def paired_test(correct_a: npt.NDArray[np.bool_], correct_b: npt.NDArray[np.bool_]) -> float:
    """Return the two-sided p-value that a and b are right equally often, exactly.

    With one run this is the exact McNemar test. Only the images on which they differ speak: under
    the null hypothesis each falls to either side with chance one half. With several runs an image
    falls to its side with what it has in all of them, as runs err on the same images.

    Args:
        correct_a: bool [q] or [runs, q], True if a was right.
        correct_b: of the same shape, True if b was right, on the same images.
    """
    ahead = np.atleast_2d(correct_a).astype(np.int64) - np.atleast_2d(correct_b)
    by_image = np.abs(ahead.sum(0))
    chances = np.ones(1)  # of the sum of all images' signed differences, from -total to total
    for weight in range(1, len(ahead) + 1):
        images = int((by_image == weight).sum())
        own = np.zeros(2 * weight * images + 1)
        own[:: 2 * weight] = stats.binom.pmf(np.arange(images + 1), images, 0.5)
        chances = signal.convolve(chances, own)
    sums = np.arange(len(chances)) - len(chances) // 2
    far = chances[np.abs(sums) >= abs(int(ahead.sum()))].sum()
    return float(np.clip(far, 0.0, 1.0))


def _ends() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def _resampled(values: Values) -> Values:
    """Return values [runs, q] of images drawn anew: means of each draw, [runs, RESAMPLES]."""
    drawn = np.random.Generator(np.random.PCG64(bits("eupe.paired/images", MOST_BITS)))
    count = values.shape[1]
    means = [values[:, drawn.integers(count, size=count)].mean(1) for _ in range(RESAMPLES)]
    return np.stack(means, axis=1)


def _means_of_runs(values: Values) -> Values:
    """Return means over runs and images drawn anew [RESAMPLES], alike for equal shapes."""
    drawn = np.random.Generator(np.random.PCG64(bits("eupe.paired/runs", MOST_BITS)))
    runs = drawn.integers(len(values), size=(RESAMPLES, len(values)))
    of_run = _resampled(values)  # [runs, RESAMPLES]
    means: Values = of_run[runs.T, np.arange(RESAMPLES)].mean(0)
    return means
