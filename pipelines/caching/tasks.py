"""What an extraction has to do: shards that stores want and do not have, shared out in calls."""

from collections import defaultdict
from collections.abc import Sequence
from typing import overload

import numpy as np

from cache.shard_ranges import ShardRange
from cache.store import Store

Task = tuple[str, dict[int, list[Store]], ShardRange]
"""Folder of the images, view -> stores that want it, shard: what an actor is called with."""
VIEWS_TOGETHER = 4
"""Views of a shard that one call draws from one decode; it holds the patches of all of them."""


class Tasks(Sequence[Task]):
    """What is to do, told one task at a time.

    Stores of one compute batch share a task, and with it one decode of every image for all views.
    Until then a task is 24 bytes, and what is missing a byte a store, view and shard.
    """

    def __init__(self, stores: Sequence[Store], num_views: int, where: str) -> None:
        """Look at what the stores have; `where` is the folder of the images."""
        self._where = where
        together: dict[str, list[Store]] = defaultdict(list)
        for store in stores:
            together[str(store.provenance["compute_batch"])].append(store)
        self._groups = [together[batch] for batch in sorted(together)]
        todo = [[store.todo(num_views) for store in group] for group in self._groups]
        self._shards = todo[0][0].shards
        self._missing = [[each.missing for each in group] for group in todo]
        found = []
        for group, masks in enumerate(self._missing):
            counts = np.logical_or.reduce(masks).sum(axis=0)
            for first in range(0, num_views, VIEWS_TOGETHER):
                shards = np.flatnonzero(counts > first)
                found.append(np.stack([shards, *np.full((2, len(shards)), [[group], [first]])]))
        listed = np.concatenate(found, axis=1)
        self._tasks = listed[:, np.lexsort(listed[::-1])]

    def __len__(self) -> int:
        return int(self._tasks.shape[1])

    @overload
    def __getitem__(self, number: int) -> Task: ...
    @overload
    def __getitem__(self, number: slice) -> list[Task]: ...
    def __getitem__(self, number: int | slice) -> Task | list[Task]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        at, group, first = self._tasks[:, number].tolist()
        masks = [mask[:, at] for mask in self._missing[group]]
        views = np.flatnonzero(np.logical_or.reduce(masks))[first : first + VIEWS_TOGETHER]
        wanted = {
            view: [
                store for store, mask in zip(self._groups[group], masks, strict=True) if mask[view]
            ]
            for view in views.tolist()
        }
        return self._where, wanted, self._shards[at]

    @property
    def num_images(self) -> int:
        """Images to compute on, each view and compute batch counted."""
        lengths = self._shards.lengths
        counts = (np.logical_or.reduce(masks).sum(axis=0) for masks in self._missing)
        return sum(int((lengths * count).sum()) for count in counts)
