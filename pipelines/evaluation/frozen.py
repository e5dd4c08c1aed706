"""A trained student, frozen, and the images it is judged by: each is opened and built once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from eupe.heads import DistillationModel
from pipelines.features.cached import CachedSource
from pipelines.features.sources import Normalisers, Targets
from pipelines.recipe.config import PROXY, Recipe
from pipelines.recipe.draws import Sweep
from pipelines.recipe.resolutions import Resolutions
from pipelines.recipe.stage import StageConfig
from pipelines.recipe.stores import Opened
from pipelines.records import checkpoint
from pipelines.training import inputs, start
from pipelines.training.batches import Batches, Loader


class CentreViews:
    """The bank's sets and the held-out set, each image in its centre view.

    Attributes:
        recipe: the run.
        normalisers: teacher -> what is done to its tokens.
        feeds: dataset -> how it is read.

    Args:
        recipe: the run.
        stage: whose teachers are read, at the resolutions it learns from.
        normalisers: those the stage trained with.
        opened: stores that are open already; those opened here are added.
        resuming: True when training goes on; shards of samples added since may be missing.

    Raises:
        BadInput: weights that cannot be read, or a proxy that stage 1 has not made yet.
        StoreError: a store is absent, half built or of another spec.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        normalisers: dict[str, Normalisers],
        opened: Opened,
        resuming: bool = False,
    ) -> None:
        self.recipe, self.normalisers = recipe, normalisers
        self.feeds = inputs.centre_feeds(recipe, stage, normalisers, resuming, opened)

    def rows(self, dataset: str, limit: int | None = None) -> np.ndarray:
        """Return rows of a dataset, int64 [n]: all, or at most `limit`, spread evenly."""
        rows = np.concatenate(
            [np.arange(s.start, s.stop) for s in self.feeds[dataset].source.shards()]
        )
        if limit is not None and len(rows) > limit:
            rows = rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]
        return rows

    def batches(
        self, dataset: str, rows: np.ndarray, at: Resolutions, tokens: bool = True
    ) -> Batches:
        """Return batches of a dataset that show each of the rows, int64 [n], at fixed sizes.

        Args:
            dataset: one of `feeds`.
            rows: of it.
            at: resolutions of student and teachers.
            tokens: False for pictures alone, of rows that are valid for those teachers: of a bank
                few rows have more.
        """
        draw = Sweep(dataset, rows, self.recipe.evaluation.batch)
        feed = self.feeds[dataset]
        if not tokens:
            feed = replace(feed, source=self._source(dataset).without_tokens())
        return Batches(
            {dataset: feed.for_rows(len(rows))},
            draw,
            lambda step: at,
            lambda scale, count: count,
            range(draw.num_steps),
            Loader(self.recipe.workers),
        )

    def tokens(
        self,
        dataset: str,
        rows: np.ndarray,
        teachers: Mapping[str, int],
        device: str | torch.device = "cpu",
    ) -> Iterator[dict[str, Targets]]:
        """Yield the cached tokens of the rows, int64 [n], in batches and without their pictures.

        Args:
            dataset: one of `feeds`.
            rows: of it.
            teachers: teacher -> resolution, pixels.
            device: to decode on.
        """
        source = self.feeds[dataset].source.for_rows(len(rows))
        size = self.recipe.evaluation.batch
        for begin in range(0, len(rows), size):
            some = rows[begin : begin + size]
            yield source.fetch(some, np.zeros_like(some), teachers).decode(device)

    def summaries(self, dataset: str, rows: np.ndarray, teacher: str, resolution: int) -> Tensor:
        """Return a teacher's summaries of the rows as its store has them, float32 [n, D]."""
        source = self._source(dataset)
        return torch.from_numpy(source.summaries(rows, np.zeros_like(rows), teacher, resolution))

    def with_tokens(
        self, dataset: str, sample_ids: Sequence[str], teachers: Mapping[str, int]
    ) -> list[str]:
        """Return those of some samples whose patches are kept of each teacher, at a resolution."""
        source = self._source(dataset)
        rows = np.asarray(source.samples.rows_of(sample_ids))
        return source.samples.sample_ids(source.with_tokens(rows, teachers))

    def _source(self, dataset: str) -> CachedSource:
        source = self.feeds[dataset].source
        assert isinstance(source, CachedSource)  # as inputs.centre_feeds opens them
        return source


class FrozenStudent:
    """What a stage's newest checkpoint holds, and all that judging it takes.

    kNN, pyramid, figures and report are handed the same one: its caches are opened once, each of
    its two networks is built once, and its checkpoint is loaded once.

    Attributes:
        recipe: the run.
        stage: the stage that trained it.
        saved: its newest checkpoint.
        device: where it computes.
        opened: the stores it reads.
        images: what it is shown, at every resolution of the pyramid.
        normalisers: teacher -> what its tokens went through in training.

    Args:
        recipe: the run.
        stage: one of its stages.
        device: to compute on.
        opened: stores that are open already, by other stages' students; those opened here are
            added.

    Raises:
        BadInput: no checkpoint, weights that cannot be read, or no proxy where one teaches.
        StoreError: a store is absent, half built or of another spec.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        device: str | torch.device = "cpu",
        opened: Opened | None = None,
    ) -> None:
        self.recipe, self.stage, self.device = recipe, stage, device
        self.opened = opened or Opened()
        self.saved = checkpoint.require(recipe.stage_directory(stage.name))
        self.normalisers = inputs.fixed_normalisers(recipe, stage, self.opened)
        whole = over_pyramid(recipe, stage).model_copy(update={"on_missing": "refuse"})
        self.images = CentreViews(recipe, whole, self.normalisers, self.opened)

    @cached_property
    def initial(self) -> DistillationModel:
        """The student before any stage trained it, in evaluation mode on the device."""
        return self._still(self._untrained())

    @cached_property
    def final(self) -> DistillationModel:
        """The student as the checkpoint has it, in evaluation mode on the device.

        Raises:
            BadInput: the checkpoint does not fit the recipe's network.
        """
        model = self._untrained()
        start.load(model, self.saved)
        return self._still(model)

    def _still(self, model: DistillationModel) -> DistillationModel:
        """Put a network to evaluation; channels last, convolutions are half as fast again."""
        model = model.eval().to(self.device)
        if torch.device(self.device).type == "cpu":
            model.to(memory_format=torch.channels_last)
        return model

    def _untrained(self) -> DistillationModel:
        widths = self.images.feeds[self.recipe.held_out.name].source.dims()
        dims = {teacher: widths[teacher] for teacher in self.stage.teachers}
        return start.untrained_model(self.recipe, self.stage, dims)


def evaluation_resolutions(recipe: Recipe, stage: StageConfig) -> Resolutions:
    """Return the resolutions of an evaluation: the student's own, teachers' largest cached."""
    teachers = {name: max(sides) for name, sides in stage.teacher_resolutions.items()}
    return Resolutions(recipe.evaluation.resolution, teachers)


def over_pyramid(recipe: Recipe, stage: StageConfig) -> StageConfig:
    """Return a stage that learns from the proxy as if it drew from all of the proxy's scales."""
    if PROXY not in stage.teachers:
        return stage
    scales = recipe.scales_of_proxy
    return stage.model_copy(
        update={"teacher_resolutions": {PROXY: scales}, "student_resolutions": scales}
    )


def by_teachers(students: Sequence[FrozenStudent]) -> list[FrozenStudent]:
    """Return the last student of each set of teachers, in the order of their stages."""
    return [*{student.stage.teachers: student for student in students}.values()]
