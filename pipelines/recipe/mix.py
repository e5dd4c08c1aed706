"""The mix: which dataset each slot of a global batch comes from, as a pure function of the step.

A global batch is homogeneous from a named dataset with that dataset's probability, else
heterogeneous across the rest in proportion to their shares (EUPE, arXiv:2603.22387: ten
per cent of batches are ImageNet-1k alone). Slots are dealt as positions in a dataset's own endless
sequence of epochs, so that every dataset is walked through completely, epoch after epoch, whatever
the mix; `Mix` says which positions, `cache.order` which rows those are.

Where shards are dealt to lanes (`cache.lanes`), a batch is laid out lane after lane, as many slots
each, and every lane has sequences of its own. The slots of a batch, dataset after dataset, are then
dealt to the lanes in turn, from another lane at every step: lanes are homogeneous together, and
each holds its shares to within one slot.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from eupe.addressed import hashed
from eupe.errors import BadInput

STEPS_PER_BLOCK = 1024
"""Steps whose counts are drawn and summed together."""


def per_lane(global_batch: int, lanes: int) -> int:
    """Return how many slots of a batch each lane has.

    Raises:
        BadInput: lanes do not divide it.
    """
    if global_batch % lanes:
        raise BadInput(
            f"global_batch = {global_batch} takes no equal part of each of {lanes} lanes; it wants "
            f"a multiple of that, or lanes = {math.gcd(global_batch, lanes)}"
        )
    return global_batch // lanes


class Slots(NamedTuple):
    """A global batch's slots.

    Attributes:
        datasets: int64 [B], index into `Mix.names`.
        positions: int64 [B], place in that dataset's endless sequence of epochs, of the slot's
            lane: slots [l B / lanes, (l + 1) B / lanes) are lane l's.
    """

    datasets: np.ndarray
    positions: np.ndarray


class Mix:
    """Draws of a run's global batches; every method is a pure function of the step.

    Args:
        shares: dataset -> its share of heterogeneous batches, any positive scale.
        homogeneous: dataset -> probability that a batch is drawn from it alone.
        global_batch: slots a step.
        seed: of the run.
        lanes: that a batch takes an equal part of each.

    Raises:
        BadInput: a homogeneous dataset that is not there, probabilities that do not fit, no
            dataset left for heterogeneous batches, or a batch that lanes do not divide.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        homogeneous: Mapping[str, float],
        global_batch: int,
        seed: int,
        lanes: int = 1,
    ) -> None:
        self.per_lane = per_lane(global_batch, lanes)
        unknown = set(homogeneous) - set(shares)
        if unknown:
            raise BadInput(
                f"homogeneous names {sorted(unknown)}; the train sets are {sorted(shares)}"
            )
        alone = np.array([homogeneous.get(name, 0.0) for name in shares])
        if alone.min() < 0 or alone.sum() > 1 + 1e-9:
            raise BadInput(
                f"homogeneous = {dict(homogeneous)}: wants probabilities that sum to at most 1"
            )
        rest = np.array([0.0 if name in homogeneous else shares[name] for name in shares])
        if len(shares) == 1:  # nothing to mix: every batch is that dataset's either way
            alone, rest = np.zeros(1), np.ones(1)
        elif alone.sum() < 1 - 1e-9 and rest.sum() == 0:
            raise BadInput(
                f"homogeneous = {dict(homogeneous)} leaves no dataset for the other batches"
            )
        self.names = tuple(shares)
        self.global_batch, self.lanes = global_batch, lanes
        self._kinds = np.append(alone, max(0.0, 1 - alone.sum()))
        self._rest = rest / rest.sum() if rest.sum() else rest
        self._seed = seed
        self._totals = [np.zeros((lanes, len(self.names)), dtype=np.int64)]
        # A run walks forward: old blocks are not asked for again.
        self._block = lru_cache(maxsize=8)(self._draw_block)
        self._lane_block = lru_cache(maxsize=2)(self._deal_block)
        self._bounds = lru_cache(maxsize=1)(self._find_bounds)

    def expected(self) -> np.ndarray:
        """Return the share of all slots that each dataset fills on average, float64 [datasets]."""
        shares: np.ndarray = self._kinds[:-1] + self._kinds[-1] * self._rest
        return shares

    def counts(self, step: int) -> np.ndarray:
        """Return how many slots each dataset fills at a step: int64 [number of datasets]."""
        block, place = divmod(step, STEPS_PER_BLOCK)
        counts: np.ndarray = self._block(block)[place]
        return counts

    def consumed(self, step: int) -> np.ndarray:
        """Return how many positions of each dataset lie before a step: int64 [lanes, datasets]."""
        block, place = divmod(step, STEPS_PER_BLOCK)
        while len(self._totals) <= block:
            self._totals.append(self._totals[-1] + self._lane_block(len(self._totals) - 1)[-1])
        total: np.ndarray = self._totals[block] + self._lane_block(block)[place]
        return total

    def stretches(self, dataset: str, steps: int, lane: int | None = None) -> np.ndarray:
        """Return where each step begins in a dataset's positions, int64 [steps + 1]; its end last.

        Step s takes positions [stretches[s], stretches[s + 1]) of that lane; None: of all lanes, as
        many as those of the lanes together.
        """
        below, above, turns = self._bounds(self.names.index(dataset), steps)
        if lane is not None:
            turned = (lane + turns) % self.lanes
            below, above = (below + turned) // self.lanes, (above + turned) // self.lanes
        return np.concatenate([[0], np.cumsum(above - below)])

    def totals(self, dataset: str, steps: int) -> np.ndarray:
        """Return how many positions of a dataset so many steps take of each lane: int64 [lanes].

        As many as `stretches` ends at, lane after lane, which would walk the steps for each.
        """
        below, above, turns = self._bounds(self.names.index(dataset), steps)
        found = np.zeros(self.lanes, np.int64)
        for slots, sign in ((above, 1), (below, -1)):
            whole, rest = np.divmod(slots, self.lanes)
            # One more for the lanes of the last `rest` turns, which are neighbours in a ring.
            first = (self.lanes - rest - turns) % self.lanes
            last = first + rest
            edges = np.bincount(first, minlength=2 * self.lanes + 1)
            edges = edges - np.bincount(last, minlength=2 * self.lanes + 1)
            more = np.cumsum(edges)[: 2 * self.lanes].reshape(2, self.lanes).sum(axis=0)
            found += sign * (int(whole.sum()) + more)
        return found

    def slots(self, step: int) -> Slots:
        """Return the slots of a step, in an order that deals every rank the same mixture."""
        consumed, after = self.consumed(step), self.consumed(step + 1)
        counts = (after - consumed).ravel()
        datasets = np.repeat(np.tile(np.arange(len(self.names)), self.lanes), counts)
        numbers = np.arange(self.global_batch)
        positions = numbers + np.repeat(after.ravel() - np.cumsum(counts), counts)
        lanes = numbers // self.per_lane
        order = np.lexsort((hashed(numbers, f"mix/{self._seed}/deal/{step}"), lanes))
        return Slots(datasets[order], positions[order])

    def _find_bounds(self, dataset: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return where a dataset begins and ends among the slots of each step, and their turns.

        All int64 [steps].
        """
        blocks = range(-(-steps // STEPS_PER_BLOCK))
        above = np.concatenate([np.cumsum(self._block(each), axis=1) for each in blocks])[:steps]
        turns = np.concatenate([self._turns(each) for each in blocks])[:steps]
        below = above[:, dataset - 1] if dataset else np.zeros(steps, np.int64)
        return below, above[:, dataset], turns

    def _turns(self, block: int) -> np.ndarray:
        """Return which lane's turn it is first at each step of a block, counted backwards."""
        hashes = hashed(np.arange(STEPS_PER_BLOCK), f"mix/{self._seed}/turns/{block}")
        turns: np.ndarray = (hashes % np.uint64(self.lanes)).astype(np.int64)
        return turns

    def _deal_block(self, block: int) -> np.ndarray:
        """Return what lanes consume within a block: int64 [STEPS_PER_BLOCK + 1, lanes, datasets].

        Of n slots that are dealt in turn, the lane whose turn is j places before the last has
        (n + j) // lanes.
        """
        ends = np.cumsum(self._block(block), axis=1)[:, None, :]
        turned = (np.arange(self.lanes) + self._turns(block)[:, None]) % self.lanes
        dealt = np.diff((ends + turned[:, :, None]) // self.lanes, axis=2, prepend=0)
        return np.concatenate([np.zeros_like(dealt[:1]), np.cumsum(dealt, axis=0)])

    def _draw_block(self, block: int) -> np.ndarray:
        """Draw the counts of a block of steps: int64 [STEPS_PER_BLOCK, datasets]."""
        kinds = np.searchsorted(
            np.cumsum(self._kinds)[:-1], self._uniform(f"kinds/{block}"), side="right"
        )
        # Systematic sampling: each batch holds its shares to within one slot.
        edges = np.cumsum(self._rest).round(12) * self.global_batch
        upper = np.floor(edges + self._uniform(f"shares/{block}")[:, None]).astype(np.int64)
        # Rounding must lose or add no slot.
        upper = np.minimum(upper, self.global_batch)
        upper[:, -1] = self.global_batch
        counts = np.diff(upper, axis=1, prepend=0)
        alone = np.eye(len(self.names) + 1, len(self.names), dtype=np.int64)[kinds]
        counts[kinds < len(self.names)] = 0
        drawn: np.ndarray = counts + alone * self.global_batch
        return drawn

    def _uniform(self, what: str) -> np.ndarray:
        """Draw float64 [STEPS_PER_BLOCK] in [0, 1), the same for every version of numpy."""
        hashes = hashed(np.arange(STEPS_PER_BLOCK), f"mix/{self._seed}/{what}")
        return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
