"""What a global batch is made of: a pure function of the step, identical on every rank."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from cache.lanes import Dealt, Lane
from cache.order import BUFFER_ROWS, EpochOrder
from cache.shard_ranges import ShardRange, ShardRanges
from eupe.addressed import bits, hashed
from eupe.errors import BadInput
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

    def size(self, step: int) -> int:
        """Return how many rows the global batch of a step has."""
        ...

    def __call__(self, step: int, start: int = 0, stop: int | None = None) -> Drawn:
        """Return rows [start, stop) of the global batch of a step."""
        ...


class TrainingDraw:
    """Endless epochs over a mix of datasets.

    A dataset is walked completely, epoch after epoch, in the order of `cache.order`; a sample's
    view moves on by one from each epoch to the next (see `view_numbers`). The samples of a shard
    show the same view number in an epoch, so that one file a shard is read: what a view number
    looks like is drawn for each sample apart, so their views are as independent as ever.

    With lanes each lane of a dataset is walked so, in epochs of its own, and a global batch is laid
    out lane after lane: a part of a batch between lanes reads the shards of its lanes only.

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
        # Every dataset of the mix has an order of its own, and in it every lane.
        self._orders = []
        for name in mix.names:
            dealt = lanes_of(ShardRanges.of(shards[name]), name, mix.lanes)
            self._orders.append(
                [order_of(lane, seed, name, n, mix.lanes) for n, lane in enumerate(dealt)]
            )
        self._shards = [ShardRanges.of(shards[name]).starts for name in mix.names]
        self._num_views = [num_views[name] for name in mix.names]

    def size(self, step: int) -> int:
        """Return how many rows the global batch of a step has: the same at every one."""
        return self._mix.global_batch

    def __call__(self, step: int, start: int = 0, stop: int | None = None) -> Drawn:
        """Return rows [start, stop) of the global batch of a step."""
        slots, stop = self._mix.slots(step), self.size(step) if stop is None else stop
        datasets, positions = slots.datasets[start:stop], slots.positions[start:stop]
        rows, epochs, views = (np.empty_like(positions) for _ in range(3))
        per_lane = self._mix.per_lane
        for lane in range(start // per_lane, -(-stop // per_lane)):
            own = slice(max(lane * per_lane - start, 0), (lane + 1) * per_lane - start)
            for number in np.unique(datasets[own]).tolist():
                ours = own.start + np.flatnonzero(datasets[own] == number)
                order = self._orders[number][lane]
                epochs[ours], rows[ours] = _walk(order, positions[ours])
        for number in np.unique(datasets).tolist():
            ours = datasets == number
            shards = np.searchsorted(self._shards[number], rows[ours], side="right") - 1
            starts = self._shards[number][shards]
            views[ours] = view_numbers(self._seed, epochs[ours], starts, self._num_views[number])
        return Drawn(datasets, rows, views)


def _walk(order: EpochOrder, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and rows at positions of an endless sequence of epochs, int64 [n] each."""
    epochs, places = np.divmod(positions, order.num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        there = epochs == epoch
        first, last = int(places[there].min()), int(places[there].max())
        rows[there] = order.rows(epoch, first, last + 1)[places[there] - first]
    return epochs, rows


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

    def size(self, step: int) -> int:
        """Return how many rows a step has."""
        return len(self._rows[step * self._batch : (step + 1) * self._batch])

    def __call__(self, step: int, start: int = 0, stop: int | None = None) -> Drawn:
        """Return rows [start, stop) of a step."""
        rows = self._rows[step * self._batch : (step + 1) * self._batch][start:stop]
        return Drawn(np.zeros_like(rows), rows, np.full_like(rows, self._view))


def lanes_of(shards: ShardRanges, dataset: str, count: int) -> Dealt:
    """Return the lanes of a dataset: the same for every seed, so that copies of shards serve all.

    Raises:
        BadInput: the dataset has fewer rows than lanes are asked for.
    """
    try:
        return Dealt(shards, count, f"pipelines.draws/lanes/{dataset}")
    except BadInput as error:
        raise BadInput(f"data set {dataset}: {error}") from error


def order_of(lane: Lane, seed: int, dataset: str, number: int = 0, count: int = 1) -> EpochOrder:
    """Return the order in which a run walks over a lane of a dataset.

    The lanes share the rows of one shuffle buffer: however many there are, as many rows wait.

    Args:
        lane: from `lanes_of`.
        seed: of the run.
        dataset: its name.
        number: of the lane.
        count: of all lanes.
    """
    address = f"pipelines.draws/order/{seed}/{dataset}"
    if count > 1:
        address += f"/lane {number} of {count}"
    buffer_rows = max(1, BUFFER_ROWS // count)
    return EpochOrder(lane.starts, lane.lengths, bits(address), buffer_rows)


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
