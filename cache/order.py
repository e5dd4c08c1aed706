"""The order of an epoch: a pure function of (seed, epoch), seekable, never held whole.

Shards are shuffled, and their rows pass through a shuffle buffer one shard after the other: the
buffer is filled with `buffer_rows` rows first, and from then on each row waits in it for a random
time of up to as many rows. So shards are wanted one after the other, at an even pace, as a disk or
an object store likes best, and a reader touches the buffer's shards only; any stretch of the epoch
is found without walking to it.

    sequence   0                  B                          num_rows     rows, shard after shard
    due        max(p, B) + u B, u random in [0, 1): row p comes out in the order of `due`

Random draws are addressed by (seed, epoch, position): `eupe.addressed`.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from cache.shard_ranges import Rows, ShardRange, ShardRanges
from eupe.addressed import hashed
from eupe.errors import BadInput

BUFFER_ROWS = 16_384
"""Rows of the shuffle buffer: 24 shards of 680 rows, or 6.4 GB of ViT-B features in flight."""

_FRACTION_BITS = 20
"""Of a row's due time: fractions of a row, so that hardly any two fall together."""


class EpochOrder:
    """The order of every epoch over some shards.

    Memory is that of the shards (48 bytes each at most) and of the buffer, never of the rows.

    Attributes:
        num_rows: rows in an epoch.
    """

    def __init__(
        self,
        starts: Rows,
        lengths: Rows,
        seed: int,
        buffer_rows: int = BUFFER_ROWS,
    ):
        """Prepare the order.

        Args:
            starts: first row of each shard, int64 [shards].
            lengths: its rows, int64 [shards]; they may differ.
            seed: of the run.
            buffer_rows: size of the shuffle buffer; a dataset that fits in it is shuffled fully.

        Raises:
            ValueError: no rows, or a buffer of none.
        """
        if buffer_rows < 1:
            raise ValueError(f"buffer_rows = {buffer_rows}: wants at least 1")
        self._starts, self._lengths = starts, lengths
        self.num_rows = int(self._lengths.sum())
        if not self.num_rows:
            raise BadInput("no rows to order: the shards are empty")
        self._seed, self._buffer = seed, buffer_rows
        self._epoch = lru_cache(maxsize=2)(self._order_shards)
        self._block = lru_cache(maxsize=4)(self._order_block)

    @classmethod
    def of(
        cls, shards: Sequence[ShardRange], seed: int, buffer_rows: int = BUFFER_ROWS
    ) -> "EpochOrder":
        """Prepare the order of shards as `Reader.shards` or `Samples.shards` gives them."""
        ranges = ShardRanges.of(shards)
        return cls(ranges.starts, ranges.lengths, seed, buffer_rows)

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Return the rows at places [start, stop) of an epoch.

        Raises:
            ValueError: places outside the epoch.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise ValueError(f"places {start} to {stop}: an epoch has 0 to {self.num_rows}")
        parts = [np.empty(0, np.int64)]
        while start < stop:
            block, inside = divmod(start, self._buffer)
            part = self._block(epoch, block)[inside : inside + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def _order_block(self, epoch: int, block: int) -> Rows:
        """Return the rows at places [block B, (block + 1) B).

        Take the rows from some position p >= B on, sorted by when they are due. Every row before p
        is due before p + B, and so before any of these that is due at p + B or later: of those the
        place is p + their number. At most B of these are due before p + B, so places p + B and on
        are right. And the row at place r is due by max(r + B, 2 B): its position is no higher.
        """
        first = block * self._buffer
        begin = first - self._buffer if first >= 2 * self._buffer else 0
        end = min(first + 3 * self._buffer, self.num_rows)
        positions = np.arange(begin, end)
        hashes = hashed(positions, f"cache.order/{self._seed}/{epoch}/rows")
        waits = hashes % np.uint64(self._buffer << _FRACTION_BITS)
        entered = np.maximum(positions, self._buffer) << _FRACTION_BITS
        order = np.argsort(entered + waits.astype(np.int64), kind="stable")
        places = order[first - begin : first - begin + self._buffer]
        return self._rows_at(epoch, positions[places])

    def _rows_at(self, epoch: int, positions: Rows) -> Rows:
        """Return the rows at positions of the sequence, shard after shuffled shard."""
        order, ends = self._epoch(epoch)
        number = np.searchsorted(ends, positions, side="right")
        shards = order[number]
        rows: Rows = self._starts[shards] + positions - (ends[number] - self._lengths[shards])
        return rows

    def _order_shards(self, epoch: int) -> tuple[Rows, Rows]:
        """Return the shuffled shards and where each ends in the sequence."""
        address = f"cache.order/{self._seed}/{epoch}/shards"
        hashes = hashed(np.arange(len(self._starts)), address)
        order = np.argsort(hashes, kind="stable")
        return order, np.cumsum(self._lengths[order])
