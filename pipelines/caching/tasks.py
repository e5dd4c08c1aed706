"""What an extraction has to do: shards that stores want and do not have, shared out in calls."""

from collections import defaultdict
from collections.abc import Sequence
from typing import overload

import numpy as np

from cache.shard_ranges import ShardRange
from cache.store import Store
from pipelines.recipe.drawn import Mask, Turns

Task = tuple[str, dict[int, list[Store]], ShardRange]
"""Folder of the images, view -> stores that want it, shard: what an actor is called with."""
VIEWS_TOGETHER = 4
"""Views of a shard that one call draws from one decode; it holds the patches of all of them."""


class Tasks(Sequence[Task]):
    """What is to do, told one task at a time.

    Stores of one compute batch share a task, and with it one decode of every image for all views.
    Until then a task is 24 bytes, and what is missing a byte a store, view and shard.

    Attributes:
        num_images: images to compute on, each view and compute batch counted.
        all_images: likewise, with those whose features are there.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        wanted: Sequence[Mask],
        where: str,
        turns: Turns | None = None,
    ) -> None:
        """Look at what the stores have.

        Args:
            stores: of one job.
            wanted: views of shards that each shall hold, bool [views, shards].
            where: folder of the images.
            turns: what is lower is told first, [views, shards]; None: shard by shard.
        """
        self._where = where
        together: dict[str, list[tuple[Store, Mask]]] = defaultdict(list)
        for store, mask in zip(stores, wanted, strict=True):
            together[str(store.provenance["compute_batch"])].append((store, mask))
        groups = [together[batch] for batch in sorted(together)]
        self._groups = [[store for store, _ in group] for group in groups]
        todo = [[store.todo(mask) for store, mask in group] for group in groups]
        self._shards = todo[0][0].shards
        self._missing = [[each.missing for each in group] for group in todo]
        self.all_images = self._images([[mask for _, mask in group] for group in groups])
        self.num_images = self._images(self._missing)
        found, when = [], []
        for group, masks in enumerate(self._missing):
            missing = np.logical_or.reduce(masks)
            numbers = np.cumsum(missing, axis=0)  # of the views that a shard lacks, from 1
            for first in range(0, len(wanted[0]), VIEWS_TOGETHER):
                shards = np.flatnonzero(numbers[-1] > first)
                found.append(np.stack([shards, *np.full((2, len(shards)), [[group], [first]])]))
                if turns is not None:
                    own = missing & (numbers > first) & (numbers <= first + VIEWS_TOGETHER)
                    when.append(np.where(own, turns, np.inf).min(axis=0)[shards])
        listed = np.concatenate(found, axis=1)
        before = [np.concatenate(when)] if when else []
        self._tasks = listed[:, np.lexsort([*listed[::-1], *before])]

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

    def _images(self, groups: Sequence[Sequence[Mask]]) -> int:
        """Count the images of views of shards, each compute batch's apart."""
        counts = (np.logical_or.reduce(masks).sum(axis=0) for masks in groups)
        return sum(int(self._shards.lengths @ count) for count in counts)
