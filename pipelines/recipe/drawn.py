"""What will be drawn: the views of each shard that some stages read, known before any is computed.

Draws are pure functions of the step, so which (view, shard) pairs a stage reads of a store follows
from its steps alone (docs/design.md, law 13). Builds compute these, training wants these to be
there, and plans count these. Whole epochs draw every shard; only where an epoch is walked in part,
or in turns by several resolutions, is its order looked at.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from cache.shard_ranges import Rows, ShardRanges
from eupe.spec import Spec
from pipelines.recipe import resolutions
from pipelines.recipe.draws import lanes_of, order_of, view_numbers
from pipelines.recipe.mix import Mix
from pipelines.recipe.stage import StageConfig

Mask = npt.NDArray[np.bool_]
"""True where a view of a shard is wanted, bool [views, shards]."""

Turns = npt.NDArray[np.float32]
"""When a view of a shard is drawn first, float32 [views, shards]; what is lower comes sooner."""


class Drawing(Spec):
    """What of a recipe decides which views of a dataset's shards are drawn.

    Attributes:
        stages: those that read, of the recipe.
        shares: train set -> its share of heterogeneous batches, in the order of the mix.
        homogeneous: train set -> chance of a batch of its own.
        seed: of the run.
        lanes: that shards are dealt to.
    """

    stages: tuple[StageConfig, ...]
    shares: dict[str, float]
    homogeneous: dict[str, float]
    seed: int
    lanes: int = 1

    def of_teacher(
        self, dataset: str, shards: ShardRanges, num_views: int, teacher: str, resolution: int
    ) -> Mask:
        """Return which views of shards are read of a teacher's store, bool [views, shards].

        Args:
            dataset: one of the train sets.
            shards: all of the dataset's.
            num_views: views a sample has.
            teacher: whose store.
            resolution: of the store, pixels.
        """
        reading = [
            each for each in self.stages if resolution in each.teacher_resolutions.get(teacher, ())
        ]
        return self._of(reading, dataset, shards, num_views, teacher, resolution)

    def of_student(
        self, dataset: str, shards: ShardRanges, num_views: int, resolution: int
    ) -> Mask:
        """Return which views of shards a student is shown at a resolution, bool [views, shards].

        Arguments as of `of_teacher`.
        """
        reading = [each for each in self.stages if resolution in each.student_resolutions]
        return self._of(reading, dataset, shards, num_views, None, resolution)

    def turns(self, dataset: str, shards: ShardRanges, num_views: int) -> Turns:
        """Say when the views of shards are drawn first, in epochs, float32 [views, shards].

        To within the shuffle buffer: what a builder begins with, for a stage that waits for it.

        Args:
            dataset: one of the train sets.
            shards: all of the dataset's.
            num_views: views a sample has.
        """
        turns = np.full((num_views, len(shards)), np.inf, np.float32)
        for number, lane in enumerate(lanes_of(shards, dataset, self.lanes)):
            order = order_of(lane, self.seed, dataset, number, self.lanes)
            for epoch in range(num_views):
                places = lane.places[order.sequence(epoch)]
                epochs = np.full(len(places), epoch)
                views = view_numbers(self.seed, epochs, shards.starts[places], num_views)
                drawn = epoch + np.arange(len(places), dtype=np.float32) / len(places)
                turns[views, places] = np.minimum(turns[views, places], drawn)
        return turns

    def _of(
        self,
        reading: Sequence[StageConfig],
        dataset: str,
        shards: ShardRanges,
        num_views: int,
        teacher: str | None,
        resolution: int,
    ) -> Mask:
        mask = np.zeros((num_views, len(shards)), bool)
        for stage in reading:
            own = self.model_copy(update={"stages": (stage,)})
            asked = _Question.of(own, dataset, shards, num_views, teacher)
            mask |= _answer(asked)[resolution]
        return mask


@dataclass(frozen=True)
class _Question:
    """What one stage reads of one dataset; equal questions have equal answers."""

    digest: str
    drawing: Drawing = field(compare=False)
    dataset: str = field(compare=False)
    shards: ShardRanges = field(compare=False)
    num_views: int = field(compare=False)
    teacher: str | None = field(compare=False)

    @classmethod
    def of(
        cls,
        drawing: Drawing,
        dataset: str,
        shards: ShardRanges,
        num_views: int,
        teacher: str | None,
    ) -> "_Question":
        said = json.dumps([drawing.model_dump_json(), dataset, num_views, teacher])
        digest = hashlib.sha256(said.encode())
        digest.update(shards.starts.tobytes())
        digest.update(shards.stops.tobytes())
        return cls(digest.hexdigest(), drawing, dataset, shards, num_views, teacher)


@lru_cache(maxsize=64)
def _answer(asked: _Question) -> dict[int, Mask]:
    """Return resolution -> what a stage draws at it."""
    drawing, (stage,), seed = asked.drawing, asked.drawing.stages, asked.drawing.seed
    mix = Mix(drawing.shares, drawing.homogeneous, stage.global_batch, seed, drawing.lanes)
    scales, turns = _turns(stage, seed, asked.teacher)
    found = np.zeros((len(scales), asked.num_views, len(asked.shards)), bool)
    dealt = lanes_of(asked.shards, asked.dataset, mix.lanes)
    for number, lane in enumerate(dealt):
        order = order_of(lane, seed, asked.dataset, number, mix.lanes)
        bounds = mix.stretches(asked.dataset, stage.steps, number)
        own = found[:, :, lane.places]
        firsts, every = asked.shards.starts[lane.places], np.arange(len(lane.places))
        for epoch, cuts, labels in _by_epoch(order.num_rows, bounds, turns):
            views = view_numbers(seed, np.full(len(every), epoch), firsts, asked.num_views)
            if not own[:, views, every].all():
                own[:, views, every] |= order.touched(epoch, cuts, labels, len(scales))
                if own.all():
                    break
        found[:, :, lane.places] = own
    found.flags.writeable = False
    return dict(zip(scales, found, strict=True))


def _turns(stage: StageConfig, seed: int, teacher: str | None) -> tuple[list[int], Rows]:
    """Return the resolutions of a teacher (None: the student), and which one each step has.

    Returns:
        pixels, rising; int64 [steps], place among them.
    """
    if teacher is None:
        scales, chosen = sorted(set(stage.student_resolutions)), resolutions.student
    else:
        scales = sorted(set(stage.teacher_resolutions[teacher]))
        chosen = partial(resolutions.teacher, name=teacher)
    if len(scales) == 1:
        return scales, np.zeros(stage.steps, np.int64)
    drawn = np.fromiter((chosen(stage, seed, step) for step in range(stage.steps)), np.int64)
    return scales, np.searchsorted(scales, drawn)


def _by_epoch(length: int, bounds: Rows, labels: Rows) -> Iterator[tuple[int, Rows, Rows]]:
    """Cut stretches of positions into epochs.

    Args:
        length: rows of an epoch.
        bounds: where each stretch begins, and the end of the last, int64 [k + 1]; they rise.
        labels: of the stretches, int64 [k].

    Yields:
        number of an epoch, and the bounds and labels of its places; stretches that meet under one
        label are one.
    """
    some = np.diff(bounds) > 0
    starts, labels, end = bounds[:-1][some], labels[some], int(bounds[-1])
    first = np.flatnonzero(np.diff(labels, prepend=-1))
    starts, labels = starts[first], labels[first]
    for epoch in range(-(-end // length)):
        begin, stop = epoch * length, min((epoch + 1) * length, end)
        at = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, stop))
        cuts = np.append(np.maximum(starts[at:last], begin), stop) - begin
        yield epoch, cuts, labels[at:last]
