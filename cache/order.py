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
import numpy.typing as npt

from cache.shard_ranges import Rows, ShardRange, ShardRanges
from eupe.addressed import hashed, shuffled
from eupe.errors import BadInput

BUFFER_ROWS = 16_384
"""Rows of the shuffle buffer: 24 shards of 680 rows, or 6.4 GB of ViT-B features in flight."""

LOOKED_AT_ROWS = 2**17
"""Rows of an epoch whose order is looked at together where shards are asked for: arrays of them
stay in a core's cache."""

LOOKED_AT_BUFFERS = 16
"""And so many buffers at least, since three more are ordered on the way."""

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

    @property
    def num_shards(self) -> int:
        """Shards that are ordered."""
        return len(self._starts)

    def sequence(self, epoch: int) -> Rows:
        """Return the shards of an epoch, by their places, in the order in which they are wanted."""
        return self._epoch(epoch)[0]

    def touched(
        self, epoch: int, bounds: Rows, labels: Rows, num_labels: int
    ) -> npt.NDArray[np.bool_]:
        """Say of each shard under which labels rows of it come out, of an epoch that is cut up.

        In the middle of a long stretch that is known without looking at a row: a row at position
        p >= 2 B of the sequence comes out at a place from p - B to p + B, one before it by 3 B.

        Args:
            epoch: its number.
            bounds: where stretches of places begin, and the end of the last, int64 [k + 1], rising.
            labels: of each stretch, int64 [k], from 0.
            num_labels: labels there are.

        Returns:
            bool [num_labels, shards].
        """
        found = np.zeros((num_labels, len(self._starts)), bool)
        if len(labels) == 1 and bounds.tolist() == [0, self.num_rows]:
            found[labels[0]] = True
            return found
        order, ends = self._epoch(epoch)  # and from here on shards in the order of the sequence
        edge = 3 * self._buffer
        starts, stops = bounds[:-1], bounds[1:]
        long = stops - starts > 2 * edge
        for start, stop, label in np.stack([starts, stops, labels], axis=1)[long].tolist():
            low = max(start, self._buffer) + self._buffer if start else 0
            found[label] |= (ends > low) & (ends - self._lengths[order] < stop - self._buffer)
        firsts = np.concatenate([starts[~long], starts[long], stops[long] - edge])
        by_place = np.argsort(firsts)
        firsts = firsts[by_place]
        lasts = np.concatenate([stops[~long], starts[long] + edge, stops[long]])[by_place]
        labels = np.concatenate([labels[~long], labels[long], labels[long]])[by_place]
        together = max(LOOKED_AT_ROWS, LOOKED_AT_BUFFERS * self._buffer)
        for first in range(int(bounds[0]), int(bounds[-1]), together):
            last = first + together
            here = slice(
                *(int(np.searchsorted(*each)) for each in ((lasts, first + 1), (firsts, last)))
            )
            if here.start < here.stop:
                pairs = np.clip(np.stack([firsts[here], lasts[here]]), first, last)
                self._look(epoch, pairs, labels[here], found)
        shards = np.empty_like(found)
        shards[:, order] = found
        return shards

    def _look(
        self, epoch: int, stretches: Rows, labels: Rows, found: npt.NDArray[np.bool_]
    ) -> None:
        """Mark the shards, as the sequence has them, of the rows in stretches, int64 [2, k]."""
        begin, end = int(stretches[0, 0]), int(stretches[1, -1])
        low, high = self._waiting(begin, end)
        ends = self._epoch(epoch)[1]
        first, last = np.searchsorted(ends, [low, high - 1], side="right")
        here = slice(first, last + 1)
        lengths = np.diff(np.minimum(ends[here], high), prepend=low)
        shards = self._come_out(epoch, low, np.repeat(np.arange(len(lengths)), lengths))
        # Under each label, and last under none: what lies between stretches.
        width = len(found) + 1
        own = np.stack([labels, np.full_like(labels, width - 1)], axis=1).ravel()
        spans = np.diff(stretches.T.ravel(), append=end)
        marked = np.zeros((len(lengths), width), bool)
        pairs = shards[begin - low : end - low]
        pairs *= width
        pairs += np.repeat(own, spans)
        marked.ravel()[pairs] = True
        found[:, here] |= marked[:, :-1].T

    def _order_block(self, epoch: int, block: int) -> Rows:
        """Return the rows at places [block B, (block + 1) B)."""
        first = block * self._buffer
        last = min(first + self._buffer, self.num_rows)
        return self._rows_at(epoch, self._positions(epoch, first, last))

    def _positions(self, epoch: int, first: int, last: int) -> Rows:
        """Return the positions in the sequence of what comes out at places [first, last).

        Take the rows from some position p >= B on, sorted by when they are due. Every row before p
        is due before p + B, and so before any of these that is due at p + B or later: of those the
        place is p + their number. At most B of these are due before p + B, so places p + B and on
        are right. And the row at place r is due by max(r + B, 2 B): its position is no higher.
        """
        begin, end = self._waiting(first, last)
        found = self._come_out(epoch, begin, np.arange(end - begin))[first - begin : last - begin]
        return found + begin

    def _waiting(self, first: int, last: int) -> tuple[int, int]:
        """Return positions of which are all that come out at places [first, last): `_positions`."""
        begin = first - self._buffer if first >= 2 * self._buffer else 0
        return begin, min(last + 2 * self._buffer, self.num_rows)

    def _come_out(self, epoch: int, begin: int, numbers: Rows) -> Rows:
        """Put numbers of the positions from `begin` on in the order in which those are due.

        Args:
            epoch: its number.
            begin: a position.
            numbers: of it and those after it, int64 [n] from 0, none below the one before it.
        """
        positions = np.arange(begin, begin + len(numbers))
        waits = hashed(positions, f"cache.order/{self._seed}/{epoch}/rows")
        longest = self._buffer << _FRACTION_BITS
        if longest & (longest - 1):
            waits %= np.uint64(longest)
        else:  # the same, many times as fast
            waits &= np.uint64(longest - 1)
        due = np.maximum(positions, self._buffer, out=positions)
        due -= max(begin, self._buffer)
        due <<= _FRACTION_BITS
        due += waits.view(np.int64)
        width = int(numbers[-1]).bit_length()
        if (len(numbers) * 2**_FRACTION_BITS + longest).bit_length() + width > 63:
            return numbers[np.argsort(due, kind="stable")]
        due <<= width  # both as one number: sorting those takes a tenth of sorting places
        due |= numbers
        due.sort()
        due &= 2**width - 1
        return due

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
        order = shuffled(len(self._starts), address)
        return order, np.cumsum(self._lengths[order])
