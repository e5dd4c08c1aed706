"""Shards with the rows that each holds: arrays, of which one shard at a time becomes an object.

A dataset of a billion samples has millions of shards; as objects they would take some 150 bytes
each in every process that orders an epoch or asks what is to build (docs/design.md, law 18).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardRange:
    """A shard and the rows [start, stop) it holds."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, eq=False)
class ShardRanges(Sequence[ShardRange]):
    """Shards of a dataset, rising: 24 bytes each.

    Attributes:
        numbers: int64 [n].
        starts: first row of each, int64 [n].
        stops: one past its last row, int64 [n].
    """

    numbers: Rows
    starts: Rows
    stops: Rows

    @classmethod
    def of(cls, shards: Sequence[ShardRange]) -> "ShardRanges":
        """Return shards that are told one by one as arrays."""
        if isinstance(shards, ShardRanges):
            return shards
        told = [(shard.shard, shard.start, shard.stop) for shard in shards]
        return cls(*np.array(told, np.int64).reshape(-1, 3).T)

    @property
    def lengths(self) -> Rows:
        """Rows of each, int64 [n]."""
        return self.stops - self.starts

    @cached_property
    def num_rows(self) -> int:
        """Rows of all together."""
        return int(self.lengths.sum())

    @cached_property
    def digest(self) -> str:
        """What the rows of all are, as text: equal ones have equal rows."""
        digest = hashlib.sha256(np.ascontiguousarray(self.starts).data)
        digest.update(np.ascontiguousarray(self.stops).data)
        return digest.hexdigest()

    def count(self, mask: npt.NDArray[np.bool_]) -> int:
        """Count the rows of views of shards, each view counted: mask bool [views, shards]."""
        length, others, more = self._usual
        return length * int(np.count_nonzero(mask)) + int(mask[:, others].sum(axis=0) @ more)

    def lengths_at(self, places: Rows) -> Rows:
        """Return the rows of the shards at places, which rise: int64 [n] of int64 [n]."""
        length, others, more = self._usual
        if len(others) >= len(places):
            return self.stops[places] - self.starts[places]
        lengths = np.full(len(places), length)
        at = np.searchsorted(places, others)
        there = np.flatnonzero(places[np.minimum(at, len(places) - 1)] == others)
        lengths[at[there]] += more[there]
        return lengths

    @cached_property
    def _usual(self) -> tuple[int, Rows, Rows]:
        """The length of the first, which of them have another, and how much more those have."""
        if not len(self):
            return 0, np.zeros(0, np.int64), np.zeros(0, np.int64)
        lengths = self.lengths
        others = np.flatnonzero(lengths != lengths[0])
        return int(lengths[0]), others, lengths[others] - lengths[0]

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> ShardRange: ...
    @overload
    def __getitem__(self, at: slice) -> "ShardRanges": ...
    def __getitem__(self, at: int | slice) -> "ShardRange | ShardRanges":
        if isinstance(at, slice):
            return ShardRanges(self.numbers[at], self.starts[at], self.stops[at])
        return ShardRange(int(self.numbers[at]), int(self.starts[at]), int(self.stops[at]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        theirs = ShardRanges.of(other)
        return len(self) == len(theirs) and bool(self._among(theirs).all())

    __hash__ = None  # type: ignore[assignment]

    def where(self, chosen: npt.NDArray[np.bool_]) -> "ShardRanges":
        """Return those that a mask [n] names."""
        return ShardRanges(self.numbers[chosen], self.starts[chosen], self.stops[chosen])

    def shared(self, others: "ShardRanges") -> "ShardRanges":
        """Return those that are among others too, with the same rows."""
        return self.where(self._among(others))

    def _among(self, others: "ShardRanges") -> npt.NDArray[np.bool_]:
        if not len(others):
            return np.zeros(len(self), bool)
        places = np.minimum(np.searchsorted(others.numbers, self.numbers), len(others) - 1)
        pairs = zip(self._arrays, others._arrays, strict=True)
        same: npt.NDArray[np.bool_] = np.logical_and.reduce(
            [own == theirs[places] for own, theirs in pairs]
        )
        return same

    @property
    def _arrays(self) -> tuple[Rows, Rows, Rows]:
        return self.numbers, self.starts, self.stops


@dataclass(frozen=True, eq=False)
class Missing(Sequence[tuple[int, ShardRange]]):
    """What of a store is wanted and not there: (view, shard), in view order.

    Attributes:
        shards: of the dataset.
        missing: True where a view's shard is not there, bool [views, shards].
    """

    shards: ShardRanges
    missing: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.missing.sum())

    def __iter__(self) -> Iterator[tuple[int, ShardRange]]:
        for view, of_view in enumerate(self.missing):
            for at in np.flatnonzero(of_view).tolist():
                yield view, self.shards[at]

    @overload
    def __getitem__(self, at: int) -> tuple[int, ShardRange]: ...
    @overload
    def __getitem__(self, at: slice) -> list[tuple[int, ShardRange]]: ...
    def __getitem__(self, at: int | slice) -> tuple[int, ShardRange] | list[tuple[int, ShardRange]]:
        views, places = np.nonzero(self.missing)
        if isinstance(at, slice):
            pairs = zip(views[at].tolist(), places[at].tolist(), strict=True)
            return [(view, self.shards[place]) for view, place in pairs]
        return int(views[at]), self.shards[int(places[at])]
