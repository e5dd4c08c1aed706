"""A worker's share of a stage: what it is told, whichever process it is in, and the doing of it."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cache.files import copies, trees
from eupe.heads import DistillationModel
from pipelines.machines.interrupt import Terminated
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.training import outputs
from pipelines.training.batches import Loader
from pipelines.training.inputs import Inputs
from pipelines.training.loop import Evaluate, StageResult, train_stage
from pipelines.training.outputs import Output
from pipelines.training.workers import Workers

MakeInputs = Callable[[Recipe, StageConfig, Mapping[str, int] | None, Loader], Inputs]
"""(recipe, stage, pins, loader) -> this worker's inputs; as `inputs.from_caches`."""

MakeEvaluate = Callable[[Recipe, StageConfig, Inputs], Evaluate]
"""(recipe, stage, inputs) -> what judges the model; made on rank 0 only."""


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes:
        recipe: the run.
        stage: one of its stages.
        make_inputs: opens what the stage trains on.
        make_evaluate: of what judges the model; None: nothing does.
        pins: store directory -> manifest version to read; None: the newest.
        resume: go on from a checkpoint.
        output: of the stage.
        folder: in which the workers and the launching process meet; None in that process.
        lock_seconds: as in `train_stage`.
    """

    recipe: Recipe
    stage: StageConfig
    make_inputs: MakeInputs
    make_evaluate: MakeEvaluate | None
    pins: Mapping[str, int] | None
    resume: bool
    output: Output
    folder: Path | None = None
    lock_seconds: float = 0.0

    @property
    def directory(self) -> Path:
        """Where the output lies."""
        return self.output.directory

    def train(
        self, workers: Workers, device: torch.device, ending: Callable[[], bool]
    ) -> StageResult:
        """Do one worker's share; `ending` as in `train_stage`."""
        with trees.taken(self.directory) if workers.rank == 0 else nullcontext():
            if copies.remote(self.directory) is not None:
                workers.barrier()  # what the bucket has of it is here now, and nothing else
            return self._train(workers, device, ending)

    def _train(
        self, workers: Workers, device: torch.device, ending: Callable[[], bool]
    ) -> StageResult:
        loader = Loader(self.recipe.workers, workers.rank, workers.world_size)
        inputs = self.make_inputs(self.recipe, self.stage, self.pins, loader)
        if workers.rank == 0:  # what could be refused was: what the run has is left for this
            outputs.begin(self.recipe, self.output)
        evaluate = None
        if self.make_evaluate is not None:  # all workers pause for it, one does it
            make = self.make_evaluate if workers.rank == 0 else _on_rank_0
            evaluate = make(self.recipe, self.stage, inputs)
        done = train_stage(
            self.recipe,
            self.stage,
            inputs,
            self.directory,
            resume=self.resume,
            workers=workers,
            device=device,
            evaluate=evaluate,
            ending=ending,
            lock_seconds=self.lock_seconds,
        )
        # Of all workers, as the figures are while it runs: shares are equal, but for a row.
        return replace(done, images_per_second=done.images_per_second * workers.world_size)

    def ended(self, done: StageResult, asked: bool) -> StageResult:
        """Write down what was done here, and return it.

        Args:
            done: as rank 0 saw it.
            asked: True if SIGTERM has asked it to end.

        Raises:
            Terminated: it has.
        """
        with trees.taken(self.directory):
            self.output.add_seconds(done.seconds)
        if asked:
            saved = f"saved at step {done.checkpoint.step} of {self.stage.steps}"
            raise Terminated(f"{self.stage.name} is {saved}")
        return done


def _on_rank_0(recipe: Recipe, stage: StageConfig, inputs: Inputs) -> Evaluate:
    def evaluate(model: DistillationModel, step: int) -> Mapping[str, float]:
        raise AssertionError("the model is judged on rank 0")

    return evaluate
