"""Trains a small stage of noise as a command does, slowly enough to get a signal in the middle."""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pipelines.machines import interrupt
from pipelines.machines.errors import one_sentence
from pipelines.recipe.config import Recipe, WorkersConfig
from pipelines.recipe.stage import StageConfig
from pipelines.training import launch
from pipelines.training.batches import Batch, Loader
from pipelines.training.inputs import Inputs
from support import small_stage, two_workers

STEPS = 20


def recipe(directory: Path, workers: int, checkpoint_every: int = STEPS) -> Recipe:
    """Return the run; unless told otherwise its one checkpoint is the last step's."""
    run = small_stage.recipe(
        directory, steps=STEPS, micro_batch=2, log_every=1, checkpoint_every=checkpoint_every
    )
    return run.model_copy(update={"workers": WorkersConfig(count=workers)})


def slow_inputs(
    run: Recipe,
    stage: StageConfig,
    pins: Mapping[str, int] | None,
    loader: Loader,
    pause: float = 0.3,
) -> Inputs:
    """Return inputs of noise, with a pause before each step."""
    made = two_workers.noise_inputs(run, stage, pins, loader)

    def slowly(steps: range) -> Iterator[Batch]:
        for batch in made.batches(steps):
            time.sleep(pause if batch.last else 0)
            yield batch

    return replace(made, batches=slowly)


if __name__ == "__main__":
    asked = recipe(Path(sys.argv[1]), int(sys.argv[2]))
    with interrupt.at_once(), one_sentence():
        launch.train(asked, asked.stage("stage2"), make_inputs=slow_inputs)
