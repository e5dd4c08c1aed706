"""Lanes: a dataset's shards dealt to equal parts, so that a rank reads its own shards only.

The shards are shuffled once and laid one after the other, and that sequence of rows is cut into
lanes of equal length:

    shuffled   [ shard 7 ][ 2 ][ shard 5 ][ shard 0 ][ 9 ][ shard 4 ]
    lanes      |       0       |        1        |        2        |

Lanes have equally many rows, to within one, so that a picture of one lane is shown as often as one
of another. What that costs: a shard that a cut goes through is read by the lanes on both sides.
Which lane is dealt what depends on the shards and the address alone.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from cache.shard_ranges import Rows, ShardRanges
from eupe.addressed import hashed
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


def deal(shards: ShardRanges, count: int, address: str) -> list[Lane]:
    """Deal shards to lanes.

    Args:
        shards: of a dataset.
        count: lanes; one has every shard.
        address: of the shuffle (`eupe.addressed`).

    Raises:
        BadInput: fewer rows than lanes.
    """
    hashes = hashed(np.arange(len(shards)), address)
    order = np.argsort(hashes, kind="stable")
    lengths = shards.lengths[order]
    stops = np.cumsum(lengths)
    num_rows = int(lengths.sum())
    if num_rows < count:
        raise BadInput(
            f"{num_rows} rows for {count} lanes: wants lanes = {max(1, num_rows)} or fewer"
        )
    cuts = np.arange(count + 1) * num_rows // count
    dealt = []
    for low, high in pairwise(cuts):
        first, last = np.searchsorted(stops, low, "right"), np.searchsorted(stops, high)
        here = slice(first, last + 1)
        begins = stops[here] - lengths[here]
        starts = shards.starts[order[here]] + np.maximum(low - begins, 0)
        stopped = shards.starts[order[here]] + np.minimum(high - begins, lengths[here])
        by_place = np.argsort(order[here])
        dealt.append(Lane(order[here][by_place], starts[by_place], (stopped - starts)[by_place]))
    return dealt
