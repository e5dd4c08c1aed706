"""Rows of a batch, found in their shards once, and everything that a store knows about them."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import repeat
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import Escapes
from cache.files.mapped import Bytes
from cache.format import rows_table
from cache.shard_ranges import Rows
from cache.shard_rows import TableRows
from cache.store import Store

Views = int | Sequence[int] | Rows
"""The view number of each row [n], or one for all."""
ShardKey = tuple[int, int]
"""View and number of a shard."""


class Group(NamedTuple):
    """The rows of a batch that lie in one shard.

    Attributes:
        view: view number.
        shard: shard number.
        places: [k], places of the rows in the batch; they rise.
        inside: [k], numbers of the rows in the shard.
    """

    view: int
    shard: int
    places: list[int]
    inside: list[int]


def located(
    rows: Sequence[int] | Rows, views: Views, rows_per_shard: int
) -> tuple[list[ShardKey], list[int]]:
    """Say where a batch's rows [n] lie: view and shard [n] of each, and its number there [n].

    Raises:
        ValueError: rows of another shape than [n], or views of another length.
    """
    asked = np.asarray(rows, np.int64)
    if asked.ndim != 1:
        raise ValueError(f"rows: shape {asked.shape}, wants one dimension")
    shards = asked // rows_per_shard
    each: Iterable[int] = (
        repeat(views) if isinstance(views, int) else np.broadcast_to(views, len(asked)).tolist()
    )
    keys = list(zip(each, shards.tolist(), strict=False))
    return keys, (asked - shards * rows_per_shard).tolist()


def grouped(keys: Sequence[ShardKey], inside: Sequence[int]) -> list[Group]:
    """Sort a batch's rows by the shard they lie in; takes what `located` gives."""
    groups: dict[ShardKey, Group] = {}
    for place, (key, number) in enumerate(zip(keys, inside, strict=True)):
        group = groups.get(key)
        if group is None:
            group = groups[key] = Group(*key, [], [])
        group.places.append(place)
        group.inside.append(number)
    return list(groups.values())


class Shards(Protocol):
    """What a selection asks of its reader."""

    store: Store
    row_shape: tuple[int, int]
    dtype: np.dtype[np.generic]

    def table(self, view: int, shard: int) -> TableRows:
        """Return the table of a shard's rows."""
        ...

    def copy(self, selection: "Selection", into: Bytes) -> None:
        """Copy the patches of rows into a batch [n * row_bytes]."""
        ...

    def read_ahead(self, selection: "Selection") -> None:
        """Start bringing rows that will be copied soon: a hint."""
        ...


class Selection:
    """Rows of a store, each in one view, as `Reader.select` was asked for them.

    Tables of rows are read when a property is first asked for, patches at each call.

    Attributes:
        keys: view and shard of each row, [n].
        inside: number of each row in its shard, [n].
    """

    def __init__(self, shards: Shards, keys: Sequence[ShardKey], inside: Sequence[int]):
        """Use `Reader.select`."""
        self.keys, self.inside = keys, inside
        self._shards, self._num_rows = shards, len(keys)

    def __len__(self) -> int:
        return self._num_rows

    @cached_property
    def groups(self) -> list[Group]:
        """The rows by shard: tables and slow disks are asked once a shard, maps are not."""
        return grouped(self.keys, self.inside)

    def patches(self, out: npt.NDArray[np.generic] | None = None) -> npt.NDArray[np.generic]:
        """Copy the rows' patches, as stored, into one buffer: one copy, whatever the order.

        Args:
            out: [n, *row_shape] in storage dtype, C-contiguous; made if None.

        Returns:
            `out`. Invalid rows hold the array's fill value (NaN, or 0 for codes).

        Raises:
            ValueError: `out` does not fit.
            Corrupt: a shard is not what its record says.
        """
        shape, dtype = (self._num_rows, *self._shards.row_shape), self._shards.dtype
        if out is None:
            out = np.empty(shape, dtype)
        elif out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out: {out.dtype}{list(out.shape)}, wants C-contiguous {dtype}{list(shape)}"
            )
        if self._num_rows:
            self._shards.copy(self, np.frombuffer(out, np.uint8))
        return out

    def decoded(self) -> npt.NDArray[np.float32]:
        """Return the patches as features, float32 [n, N, D]; NaN for invalid rows."""
        out = self._shards.store.codec.decode(self.patches(), self.escapes)
        out[~self.valid] = np.nan
        return out

    def read_ahead(self) -> None:
        """Start bringing what `patches` will copy soon: a hint.

        From a local disk the kernel is asked for rows that are not in memory; of a bucket the rows'
        shards are mirrored by threads, and this returns at once.
        """
        self._shards.read_ahead(self)

    @cached_property
    def summaries(self) -> npt.NDArray[np.float32]:
        """Summaries, float32 [n, D]; NaN for invalid rows."""
        out = np.empty((self._num_rows, self._shards.store.spec.summary_dim), np.float32)
        for table, group in self._tables:
            out[group.places] = table.summary[group.inside]
        return out

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """True where a row's features are there, bool [n]."""
        out = np.empty(self._num_rows, bool)
        for table, group in self._tables:
            out[group.places] = table.valid[group.inside]
        return out

    @cached_property
    def escapes(self) -> Escapes:
        """Escaped tokens, by place in the batch: what decoding the patches wants."""
        dim = self._shards.store.spec.patch_dim
        parts, places_of = [Escapes.none(dim)], [0]
        if self._shards.store.codec.has_escapes:
            for table, group in self._tables:
                for place, inside in zip(group.places, group.inside, strict=True):
                    if table.num_escapes[inside]:
                        token, values = rows_table.escapes_of(table.table, inside, dim)
                        parts.append(Escapes(np.zeros(len(token), np.int64), token, values))
                        places_of.append(place)
        return Escapes.joined(parts, places_of)

    @property
    def digests(self) -> list[str | None]:
        """Digest of each view's canvas; None where there was no canvas."""
        return self._texts("view_digest")

    @property
    def reasons(self) -> list[str | None]:
        """Why each row is invalid; None where it is valid."""
        return self._texts("reason")

    @property
    def parameters(self) -> list[str | None]:
        """Each view's parameters as JSON text; None where there was no canvas."""
        return self._texts("parameters")

    @cached_property
    def _tables(self) -> list[tuple[TableRows, Group]]:
        return [(self._shards.table(group.view, group.shard), group) for group in self.groups]

    def _texts(self, column: str) -> list[str | None]:
        out: list[str | None] = [None] * self._num_rows
        for table, group in self._tables:
            values = table.table[column]
            for place, inside in zip(group.places, group.inside, strict=True):
                out[place] = values[inside].as_py()
        return out
