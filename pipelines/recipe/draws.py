"""What a global batch is made of: a pure function of the step, identical on every rank."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cache.order import EpochOrder
from cache.shard_ranges import ShardRange, ShardRanges
from eupe.addressed import bits, hashed
from pipelines.recipe.mix import Mix


class Drawn(NamedTuple):
    """The samples of one global batch, in order.

    Attributes:
        datasets: int64 [B], index into `Draw.names`.
        rows: int64 [B], row in that dataset's sample table.
        view_numbers: int64 [B].
    """

    datasets: np.ndarray
    rows: np.ndarray
    view_numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


class Draw(Protocol):
    """A pure function of the global step."""

    @property
    def names(self) -> tuple[str, ...]:
        """Datasets that rows are drawn from."""
        ...

    def __call__(self, step: int) -> Drawn:
        """Return the global batch of a step."""
        ...


class TrainingDraw:
    """Endless epochs over a mix of datasets.

    A dataset is walked completely, epoch after epoch, in the order of `cache.order`; a sample's
    view moves on by one from each epoch to the next (see `view_numbers`). The samples of a shard
    show the same view number in an epoch, so that one file a shard is read: what a view number
    looks like is drawn for each sample apart, so their views are as independent as ever.

    Args:
        mix: which dataset fills which slot.
        shards: dataset -> its shards with their rows.
        num_views: dataset -> views cached of each sample.
        seed: of the run.

    Raises:
        ValueError: a dataset of the mix has no shards given, or no rows.
    """

    def __init__(
        self,
        mix: Mix,
        shards: Mapping[str, Sequence[ShardRange]],
        num_views: Mapping[str, int],
        seed: int,
    ) -> None:
        for name in mix.names:
            if name not in shards or name not in num_views:
                raise ValueError(f"the mix draws from {name!r}; shards are of {sorted(shards)}")
        self.names = mix.names
        self._mix, self._seed = mix, seed
        self._orders = [  # every dataset of the mix has an order of its own
            order_of(shards[name], seed, name) for name in mix.names
        ]
        self._shards = [ShardRanges.of(shards[name]).starts for name in mix.names]
        self._num_views = [num_views[name] for name in mix.names]

    def __call__(self, step: int) -> Drawn:
        """Return the global batch of a step."""
        datasets, positions = self._mix.slots(step)
        rows, views = np.empty_like(positions), np.empty_like(positions)
        for number, order in enumerate(self._orders):
            ours = datasets == number
            if not ours.any():
                continue
            epochs, places = np.divmod(positions[ours], order.num_rows)
            own = np.empty(len(places), np.int64)
            for epoch in np.unique(epochs).tolist():
                there = epochs == epoch
                first, last = int(places[there].min()), int(places[there].max())
                own[there] = order.rows(epoch, first, last + 1)[places[there] - first]
            rows[ours] = own
            shards = np.searchsorted(self._shards[number], own, side="right") - 1
            starts = self._shards[number][shards]
            views[ours] = view_numbers(self._seed, epochs, starts, self._num_views[number])
        return Drawn(datasets, rows, views)


class Sweep:
    """Every given row once, in the given order: evaluation, moments of predictions.

    Args:
        name: the dataset.
        rows: int64 [n].
        batch: rows a step; the last step may have fewer.
        view: view number of all.
    """

    def __init__(self, name: str, rows: np.ndarray, batch: int, view: int = 0) -> None:
        self.names = (name,)
        self._rows, self._batch, self._view = np.asarray(rows, np.int64), batch, view

    @property
    def num_steps(self) -> int:
        """Steps until every row was there."""
        return -(-len(self._rows) // self._batch)

    def __call__(self, step: int) -> Drawn:
        """Return the rows of a step."""
        rows = self._rows[step * self._batch : (step + 1) * self._batch]
        return Drawn(np.zeros_like(rows), rows, np.full_like(rows, self._view))


def order_of(shards: Sequence[ShardRange], seed: int, dataset: str) -> EpochOrder:
    """Return the order in which a run of that seed walks over a dataset's shards."""
    return EpochOrder.of(shards, bits(f"pipelines.draws/order/{seed}/{dataset}"))


def view_numbers(seed: int, epochs: np.ndarray, shards: np.ndarray, num_views: int) -> np.ndarray:
    """Return the view that each sample shows in its epoch, int64 [n].

    A shard starts at a view hashed from (seed, its first row) and goes one further each epoch, so
    that any num_views epochs in a row show all views of its samples once.

    Args:
        seed: of the run.
        epochs: int64 [n].
        shards: first row of each sample's shard, int64 [n].
        num_views: views there are.
    """
    start = hashed(shards, f"pipelines.draws/view/{seed}") % np.uint64(num_views)
    views: np.ndarray = (start.astype(np.int64) + epochs) % num_views
    return views
