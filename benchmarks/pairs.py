"""Compare two things by interleaved pairs: the ratio of their times, with a bootstrap interval.

On a shared machine absolute times wander by half; two measurements side by side wander together,
so their ratio does not. Each pair swaps who goes first.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class Timed(NamedTuple):
    """One side of a comparison: what is timed, given the number of the pair, and what is not."""

    call: Callable[[int], object]
    prepare: Callable[[], object] = lambda: None


class Ratio(NamedTuple):
    """Median of the pairs' ratios and the bootstrap interval of that median."""

    median: float
    low: float
    high: float


class Pairs(NamedTuple):
    """Seconds of both sides of every pair."""

    reference: list[float]
    subject: list[float]

    def speed_ratio(self) -> Ratio:
        """How much faster the subject is: reference seconds over subject seconds."""
        return bootstrap(np.array(self.reference) / np.array(self.subject))


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Return the median time of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def bootstrap(ratios: Sequence[float] | np.ndarray) -> Ratio:
    """Return the median of some ratios with its percentile bootstrap interval."""
    ratios = np.asarray(ratios)
    rng = np.random.default_rng(0)
    resampled = np.median(rng.choice(ratios, (RESAMPLES, len(ratios))), axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def interleave(reference: Timed, subject: Timed, num_pairs: int, budget_seconds: float) -> Pairs:
    """Time both on the same work, in turns.

    Args:
        reference: one side.
        subject: the other.
        num_pairs: pairs at most.
        budget_seconds: stop after this long, but not before five pairs.
    """
    pairs = Pairs([], [])
    started = time.perf_counter()
    for number in range(num_pairs):
        sides = [(pairs.reference, reference), (pairs.subject, subject)]
        for seconds, side in sides if number % 2 else sides[::-1]:
            side.prepare()
            start = time.perf_counter()
            side.call(number)
            seconds.append(time.perf_counter() - start)
        if number >= 4 and time.perf_counter() - started > budget_seconds:
            break
    return pairs
