"""Lanes: a dataset's shards dealt to equal parts, so that a rank reads its own shards only.

The shards are shuffled once and laid one after the other, and that sequence of rows is cut into
lanes of equal length:

    shuffled   [ shard 7 ][ 2 ][ shard 5 ][ shard 0 ][ 9 ][ shard 4 ]
    lanes      |       0       |        1        |        2        |

Lanes have equally many rows, to within one, so that a picture of one lane is shown as often as one
of another. What that costs: a shard that a cut goes through is read by the lanes on both sides.
Which lane is dealt what depends on the shards and the address alone.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from cache.shard_ranges import Rows, ShardRanges
from eupe.addressed import shuffled
from eupe.errors import BadInput


class Lane(NamedTuple):
    """The rows of a lane, as parts of shards in the order of the dataset.

    Attributes:
        places: of the shards among the dataset's, int64 [n].
        starts: first row of each part, int64 [n].
        lengths: its rows, int64 [n].
    """

    places: Rows
    starts: Rows
    lengths: Rows


class _Cut(NamedTuple):
    """A lane of whole shards, and what of them it lacks.

    Attributes:
        places: of the shards, int32 or int64 [n], rising.
        head: place of the shard that its beginning goes through.
        before: rows of that one which lie before.
        tail: place of the shard that its end goes through.
        after: rows of that one which lie after.
    """

    places: npt.NDArray[np.signedinteger]
    head: int
    before: int
    tail: int
    after: int


class Dealt(Sequence[Lane]):
    """Shards dealt to lanes, of which one at a time is laid out: four bytes a shard.

    Args:
        shards: of a dataset.
        count: lanes; one has every shard.
        address: of the shuffle (`eupe.addressed`).

    Raises:
        BadInput: fewer rows than lanes.
    """

    def __init__(self, shards: ShardRanges, count: int, address: str) -> None:
        num_rows = shards.num_rows
        if num_rows < count:
            raise BadInput(
                f"{num_rows} rows for {count} lanes: wants lanes = {max(1, num_rows)} or fewer"
            )
        order = shuffled(len(shards), address)
        stops = np.cumsum(shards.lengths[order])
        narrow = np.int32 if len(order) < 2**31 else np.int64
        self._shards, self._lanes = shards, list[_Cut]()
        for low, high in pairwise((np.arange(count + 1) * num_rows // count).tolist()):
            first, last = np.searchsorted(stops, low, "right"), np.searchsorted(stops, high)
            head, tail = int(order[first]), int(order[last])
            before = int(low - stops[first] + shards.stops[head] - shards.starts[head])
            places = np.sort(order[first : last + 1].astype(narrow))
            cut = _Cut(places, head, before, tail, int(stops[last]) - high)
            self._lanes.append(cut)

    def __len__(self) -> int:
        return len(self._lanes)

    @overload
    def __getitem__(self, at: int) -> Lane: ...
    @overload
    def __getitem__(self, at: slice) -> list[Lane]: ...
    def __getitem__(self, at: int | slice) -> Lane | list[Lane]:
        if isinstance(at, slice):
            return [self[each] for each in range(len(self))[at]]
        cut = self._lanes[at]
        places = cut.places.astype(np.int64)
        starts = self._shards.starts[places]
        lengths = self._shards.lengths_at(places)
        head, tail = np.searchsorted(places, [cut.head, cut.tail])
        starts[head] += cut.before
        lengths[head] -= cut.before
        lengths[tail] -= cut.after
        return Lane(places, starts, lengths)
