"""The order of an epoch: a pure function of (seed, epoch), seekable, never held whole.

Shards are shuffled; the shuffled shards are cut into windows of about `window_rows` rows; the rows
of a window are shuffled among themselves. So a reader touches one window's shards at a time, and
any stretch of the epoch is found without walking to it.

Random draws are sort keys hashed from (seed, epoch, window, position), not a generator's stream:
the order is the same for every version of numpy and on every machine.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cache.samples import Rows, ShardRange

WINDOW_ROWS = 16_384
"""Rows shuffled together: 24 shards of 680 rows, or 6.4 GB of ViT-B features in flight."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class EpochOrder:
    """The order of every epoch over some shards.

    Memory is that of the shards (24 bytes each), never of the rows.

    Attributes:
        num_rows: rows in an epoch.
    """

    def __init__(
        self,
        shards: Sequence[ShardRange] | tuple[Rows, Rows],
        seed: int,
        window_rows: int = WINDOW_ROWS,
    ):
        """Prepare the order.

        Args:
            shards: as `Reader.shards` or `Samples.shards` gives them; or, for millions of them,
                first rows and lengths, both int64 [shards]. Lengths may differ.
            seed: of the run.
            window_rows: rows shuffled together; a window holds at least one shard.

        Raises:
            ValueError: no rows, or a window of none.
        """
        if window_rows < 1:
            raise ValueError(f"window_rows = {window_rows}: wants at least 1")
        if isinstance(shards, tuple):
            self._starts, self._lengths = shards
        else:
            self._starts = np.array([shard.start for shard in shards], np.int64)
            self._lengths = np.array([len(shard) for shard in shards], np.int64)
        self.num_rows = int(self._lengths.sum())
        if not self.num_rows:
            raise ValueError("no rows to order: the shards are empty")
        self._seed, self._window_rows = seed, window_rows
        self._epoch = lru_cache(maxsize=2)(self._order_shards)
        self._window = lru_cache(maxsize=4)(self._order_window)

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the rows at positions [start, stop) of an epoch.

        Raises:
            ValueError: positions outside the epoch.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"positions {start} to {stop}: an epoch has 0 to {self.num_rows}")
        _, bounds, _ = self._epoch(epoch)
        window = int(np.searchsorted(bounds, start, side="right")) - 1
        parts = [np.empty(0, np.int64)]
        while start < stop:
            base, end = int(bounds[window]), int(bounds[window + 1])
            parts.append(self._window(epoch, window)[start - base : min(stop, end) - base])
            start, window = end, window + 1
        return np.concatenate(parts)

    def _order_shards(self, epoch: int) -> tuple[Rows, Rows, Rows]:
        """Return the shuffled shards, the windows' bounds in positions, and in shards."""
        order = _shuffled(len(self._starts), _key(self._seed, epoch, -1))
        ends = np.cumsum(self._lengths[order])
        # A shard belongs to the window in which it ends; windows that get none vanish.
        _, first = np.unique((ends - 1) // self._window_rows, return_index=True)
        cuts = np.append(first, len(order))
        bounds = np.concatenate(([0], ends))[cuts]
        return order, bounds, cuts

    def _order_window(self, epoch: int, window: int) -> Rows:
        order, _, cuts = self._epoch(epoch)
        shards = order[cuts[window] : cuts[window + 1]]
        rows = np.concatenate(
            [
                np.arange(start, start + length)
                for start, length in zip(
                    self._starts[shards].tolist(), self._lengths[shards].tolist(), strict=True
                )
            ]
        )
        return rows[_shuffled(len(rows), _key(self._seed, epoch, window))]


def _key(seed: int, epoch: int, window: int) -> np.uint64:
    digest = hashlib.sha256(f"cache.order/{seed}/{epoch}/{window}".encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _shuffled(count: int, key: np.uint64) -> Rows:
    """Return a permutation of range(count): positions sorted by their splitmix64 hashes."""
    x: npt.NDArray[np.uint64] = np.arange(1, count + 1, dtype=np.uint64)
    x = x * _GOLDEN + key  # wraps, as meant
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")
