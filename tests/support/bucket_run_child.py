"""Trains the small stage of a run in a bucket, slowly enough to be killed in the middle."""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.training import launch
from pipelines.training.batches import Batch, Loader
from pipelines.training.inputs import Inputs
from pipelines.training.loop import StageResult
from support import small_stage

STEPS, PAUSE_SECONDS = 12, 0.5


def recipe(place: str) -> Recipe:
    """Return a run of one stage, that lies in a folder or in a bucket."""
    run = small_stage.recipe(Path("nowhere"), steps=STEPS, log_every=2, checkpoint_every=3)
    return run.model_copy(update={"run_directory": place})


def inputs(
    run: Recipe, stage: StageConfig, pins: Mapping[str, int] | None, loader: Loader
) -> Inputs:
    """Return the small stage's inputs."""
    return small_stage.inputs(run)


def slowed(
    run: Recipe, stage: StageConfig, pins: Mapping[str, int] | None, loader: Loader
) -> Inputs:
    """Return the small stage's inputs, which come slowly."""
    made = small_stage.inputs(run)

    def slowly(steps: range) -> Iterator[Batch]:
        for batch in made.batches(steps):
            time.sleep(PAUSE_SECONDS)
            yield batch

    return Inputs(slowly, made.dims, made.normalisers, made.identity, made.pins)


def train(place: str, slow: bool = False, wait: bool = True) -> StageResult:
    """Train the run that lies there."""
    run = recipe(place)
    made = slowed if slow else inputs
    return launch.train(run, run.stage("stage2"), make_inputs=made, wait=wait)


if __name__ == "__main__":
    done = train(sys.argv[1], slow=True)
    print(f"{done.first_step} {done.checkpoint.step} {done.seconds > 0}", flush=True)
