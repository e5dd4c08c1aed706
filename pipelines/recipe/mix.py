"""The mix: which dataset each slot of a global batch comes from, as a pure function of the step.

A global batch is homogeneous from a named dataset with that dataset's probability, else
heterogeneous across the rest in proportion to their shares (EUPE, arXiv:2603.22387: ten
per cent of batches are ImageNet-1k alone). Slots are dealt as positions in a dataset's own endless
sequence of epochs, so that every dataset is walked through completely, epoch after epoch, whatever
the mix; `Mix` says which positions, `cache.order` which rows those are.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from eupe.addressed import hashed
from eupe.errors import BadInput

STEPS_PER_BLOCK = 1024
"""Steps whose counts are drawn and summed together."""


class Slots(NamedTuple):
    """A global batch's slots.

    Attributes:
        datasets: int64 [B], index into `Mix.names`.
        positions: int64 [B], place in that dataset's endless sequence of epochs.
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

    Raises:
        BadInput: a homogeneous dataset that is not there, probabilities that do not fit, or no
            dataset left for heterogeneous batches.
    """

    def __init__(
        self,
        shares: Mapping[str, float],
        homogeneous: Mapping[str, float],
        global_batch: int,
        seed: int,
    ) -> None:
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
        self.global_batch = global_batch
        self._kinds = np.append(alone, max(0.0, 1 - alone.sum()))
        self._rest = rest / rest.sum() if rest.sum() else rest
        self._seed = seed
        self._totals = [np.zeros(len(self.names), dtype=np.int64)]
        self._blocks: dict[int, np.ndarray] = {}

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
        """Return how many positions of each dataset lie before a step: int64 [datasets]."""
        block, place = divmod(step, STEPS_PER_BLOCK)
        while len(self._totals) <= block:
            self._totals.append(self._totals[-1] + self._block(len(self._totals) - 1).sum(axis=0))
        total: np.ndarray = self._totals[block] + self._block(block)[:place].sum(axis=0)
        return total

    def stretches(self, dataset: str, steps: int) -> np.ndarray:
        """Return where each step begins in a dataset's positions, int64 [steps + 1]; its end last.

        Step s takes positions [stretches[s], stretches[s + 1]).
        """
        number = self.names.index(dataset)
        blocks = range(-(-steps // STEPS_PER_BLOCK))
        counts = [self._block(block)[:, number] for block in blocks]
        return np.concatenate([[0], *counts]).astype(np.int64).cumsum()[: steps + 1]

    def slots(self, step: int) -> Slots:
        """Return the slots of a step, in an order that deals every rank the same mixture."""
        counts, consumed = self.counts(step), self.consumed(step)
        datasets = np.repeat(np.arange(len(self.names)), counts)
        positions = np.concatenate(
            [np.arange(start, start + n) for start, n in zip(consumed, counts, strict=True)]
        )
        numbers = np.arange(self.global_batch)
        order = np.argsort(hashed(numbers, f"mix/{self._seed}/deal/{step}"), kind="stable")
        return Slots(datasets[order], positions[order])

    def _block(self, block: int) -> np.ndarray:
        """Draw the counts of a block of steps: int64 [STEPS_PER_BLOCK, datasets]."""
        if block not in self._blocks:
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
            if len(self._blocks) > 8:  # a run walks forward: old blocks are not asked for again
                self._blocks.pop(min(self._blocks))
            self._blocks[block] = counts + alone * self.global_batch
        return self._blocks[block]

    def _uniform(self, what: str) -> np.ndarray:
        """Draw float64 [STEPS_PER_BLOCK] in [0, 1), the same for every version of numpy."""
        hashes = hashed(np.arange(STEPS_PER_BLOCK), f"mix/{self._seed}/{what}")
        return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
