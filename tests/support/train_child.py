"""Trains the small stage, slowly enough to be killed in the middle when run as a process."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pipelines.training.batches import Batch
from pipelines.training.inputs import Inputs
from pipelines.training.loop import StageResult, train_stage
from support import small_stage


def train(directory: Path, pause: float, **stage: object) -> StageResult:
    """Train 30 steps, `pause` seconds apart; fields of the stage may be given."""
    run = small_stage.recipe(
        directory, **{"steps": 30, "log_every": 2, "checkpoint_every": 5, **stage}
    )
    made = small_stage.inputs(run)

    def slowly(steps: range) -> Iterator[Batch]:
        for batch in made.batches(steps):
            time.sleep(pause)
            yield batch

    slowed = Inputs(slowly, made.dims, made.normalisers, made.identity, made.pins)
    return train_stage(run, run.stage("stage2"), slowed, directory / "stage2")


if __name__ == "__main__":
    train(Path(sys.argv[1]), float(sys.argv[2]), **json.loads(sys.argv[3]))
