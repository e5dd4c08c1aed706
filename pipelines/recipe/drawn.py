"""What will be drawn: the views of each shard that some stages read, known before any is computed.

Draws are pure functions of the step, so which (view, shard) pairs a stage reads of a store follows
from its steps alone (docs/design.md, law 13). Builds compute these, training wants these to be
there, and plans count these. Whole epochs draw every shard; only where an epoch is walked in part,
or in turns by several resolutions, is its order looked at.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cache.lanes import Dealt
from cache.order import EpochOrder
from cache.shard_ranges import Rows, ShardRanges
from eupe.spec import Spec
from pipelines.machines.progress import track
from pipelines.recipe import resolutions
from pipelines.recipe.draws import lanes_of, order_of, view_numbers
from pipelines.recipe.mix import Mix
from pipelines.recipe.stage import StageConfig

SHOWN_FROM = 1_000_000
"""Shards of which the draws take seconds, so that their progress is shown."""

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
            drawers = _drawers(stage, teacher)
            asked = _Question.of(self, stage, drawers, dataset, shards, num_views)
            scales = _scales(stage, teacher)
            at = drawers.index(teacher) if len(scales) > 1 else 0
            mask |= _answer(asked)[at][scales.index(resolution)]
        return mask


def _scales(stage: StageConfig, drawer: str | None) -> list[int]:
    """Return the resolutions that a teacher (None: the student) draws from, pixels, rising."""
    drawn = stage.student_resolutions if drawer is None else stage.teacher_resolutions[drawer]
    return sorted(set(drawn))


def _drawers(stage: StageConfig, drawer: str | None) -> tuple[str | None, ...]:
    """Return whose draws are looked at when one is asked of: none, where it draws from one.

    The student's are looked at together with a teacher's: the rows are the same.
    """
    if len(_scales(stage, drawer)) == 1:
        return ()
    several = [name for name in stage.teachers if len(_scales(stage, name)) > 1]
    teacher = several[:1] if drawer is None else [drawer]
    student = [None] if len(_scales(stage, None)) > 1 else []
    return (*teacher, *student)


@dataclass(frozen=True)
class _Question:
    """What one stage reads of one dataset; equal questions have equal answers.

    Attributes:
        digest: of all that decides the answer.
        drawing: whose mix and seed.
        stage: that reads.
        drawers: whose resolutions, a teacher's name each or None, the student.
        dataset: of the train sets.
        shards: all of the dataset's.
        num_views: views a sample has.
    """

    digest: str
    drawing: Drawing = field(compare=False)
    stage: StageConfig = field(compare=False)
    drawers: tuple[str | None, ...] = field(compare=False)
    dataset: str = field(compare=False)
    shards: ShardRanges = field(compare=False)
    num_views: int = field(compare=False)

    @classmethod
    def of(
        cls,
        drawing: Drawing,
        stage: StageConfig,
        drawers: tuple[str | None, ...],
        dataset: str,
        shards: ShardRanges,
        num_views: int,
    ) -> "_Question":
        turns = [stage.name, [(each, _scales(stage, each)) for each in drawers]] if drawers else []
        said = [drawing.model_dump_json(exclude={"stages"}), stage.steps, stage.global_batch]
        said += [turns, dataset, num_views, shards.digest]
        digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
        return cls(digest, drawing, stage, drawers, dataset, shards, num_views)


@lru_cache(maxsize=64)
def _answer(asked: _Question) -> list[npt.NDArray[np.bool_]]:
    """Return what a stage draws at each resolution of each drawer, bool [scales, views, shards].

    Of no drawer: what it draws at all, as of one with one resolution.
    """
    drawing, stage, seed = asked.drawing, asked.stage, asked.drawing.seed
    mix = Mix(drawing.shares, drawing.homogeneous, stage.global_batch, seed, drawing.lanes)
    scales = [len(_scales(stage, each)) for each in asked.drawers] or [1]
    turns = _turns(asked)
    ends = mix.totals(asked.dataset, stage.steps)
    found = [np.zeros((count, asked.num_views, len(asked.shards)), bool) for count in scales]
    dealt = _dealt(_Deal(asked.dataset, mix.lanes, asked.shards.digest, asked.shards))
    what = f"Draws of {stage.name} from {asked.dataset}"
    long = len(asked.shards) >= SHOWN_FROM
    with track(mix.lanes, what, "lanes") if long else nullcontext() as progress:
        for number, lane in enumerate(dealt):
            bounds = np.array([0, ends[number]])
            if asked.drawers:
                bounds = mix.stretches(asked.dataset, stage.steps, number)
            order = order_of(lane, seed, asked.dataset, number, mix.lanes)
            epochs = _by_epoch(order.num_rows, bounds, turns)
            own = _of_lane(order, asked.num_views, scales, epochs)
            begins = np.zeros_like(lane.places)
            if asked.num_views > 1:
                firsts = asked.shards.starts[lane.places]
                begins = view_numbers(seed, begins, firsts, asked.num_views)
            _put(found, own, lane.places, begins)
            if progress is not None:
                progress.advance()
    for each in found:
        each.flags.writeable = False
    return found


def _of_lane(
    order: EpochOrder,
    num_views: int,
    scales: list[int],
    epochs: Iterator[tuple[int, Rows, Rows]],
) -> list[npt.NDArray[np.bool_]]:
    """Return what is drawn of a lane's parts of shards, a drawer each.

    Its views are those of epochs, bool [scales, views, parts]: where a part begins with view 3, its
    own are 3, 4 and so on, round.
    """
    num_parts = order.num_shards
    found = [np.zeros((count, num_views, num_parts), bool) for count in scales]
    for epoch, cuts, labels in epochs:
        view = epoch % num_views
        if epoch >= num_views:
            if all(own.all() for own in found):
                break
            if all(own[:, view].all() for own in found):
                continue
        touched = order.touched(epoch, cuts, labels, math.prod(scales))
        touched = touched.reshape(*scales, num_parts)
        for drawer, own in enumerate(found):
            others = tuple(each for each in range(len(scales)) if each != drawer)
            own[:, view] |= touched.any(axis=others)
    return found


def _put(
    found: list[npt.NDArray[np.bool_]],
    lane: list[npt.NDArray[np.bool_]],
    places: Rows,
    first_views: Rows,
) -> None:
    """Add what is drawn of a lane to what is drawn of all shards.

    Args:
        found: as `_answer` returns it.
        lane: from `_of_lane`.
        places: of its parts among the shards, int64 [parts].
        first_views: that each begins with, int64 [parts].
    """
    for mask, own in zip(found, lane, strict=True):
        num_scales, num_views, num_shards = mask.shape
        if own.all():
            mask[:, :, places] = True
            continue
        for scale in range(num_scales):
            for view in range(num_views):
                drawn = np.flatnonzero(own[scale, view])
                views = first_views[drawn] + view
                views[views >= num_views] -= num_views
                views *= num_shards
                views += places[drawn]
                mask[scale].ravel()[views] = True


@dataclass(frozen=True)
class _Deal:
    """Shards that are dealt to lanes; equal deals have equal lanes."""

    dataset: str
    lanes: int
    digest: str
    shards: ShardRanges = field(compare=False)


@lru_cache(maxsize=2)
def _dealt(deal: _Deal) -> Dealt:
    """Return the lanes of a dataset, of which every stage asks."""
    return lanes_of(deal.shards, deal.dataset, deal.lanes)


def _turns(asked: _Question) -> Rows:
    """Return the number that stands for the resolutions of all drawers at each step, int64 [steps].

    Of no drawer: 0, once.
    """
    said = asked.stage.model_dump_json()
    found = np.zeros(asked.stage.steps if asked.drawers else 1, np.int64)
    for drawer in asked.drawers:
        scales = _scales(asked.stage, drawer)
        found = found * len(scales) + _chosen(said, asked.drawing.seed, drawer)
    return found


@lru_cache(maxsize=8)
def _chosen(said: str, seed: int, drawer: str | None) -> Rows:
    """Return which of its resolutions, rising, a drawer has at each step of a stage, int64 [steps].

    Args:
        said: the stage, as JSON.
        seed: of the run.
        drawer: a teacher's name; None: the student.
    """
    stage = StageConfig.model_validate_json(said)
    steps = range(stage.steps)
    if drawer is None:
        drawn = [resolutions.student(stage, seed, step) for step in steps]
    else:
        drawn = [resolutions.teacher(stage, seed, step, drawer) for step in steps]
    return np.searchsorted(_scales(stage, drawer), drawn)


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
