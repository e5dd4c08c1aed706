"""A builder that takes its time, in a process of its own, while a stage trains from its shards."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cache.format.record_table import ShardRecord
from pipelines.caching import precompute
from pipelines.caching.extractor import Extractor
from pipelines.machines.in_process import InProcess
from pipelines.recipe.config import Recipe
from pipelines.recipe.stores import CacheJob, cache_jobs
from support import small_caches, small_run

VIEWS, ROWS_PER_SHARD = 2, 4
SHARDS = 32 // ROWS_PER_SHARD
CODECS = "float32", "int8"


def recipe(directory: Path, codec: str = "float32", **stage: object) -> Recipe:
    """Return a run whose first steps want a few shards and whose last ones want all of them.

    Args:
        directory: of its images and of all it writes.
        codec: of its teacher's features.
        stage: fields of its stage.
    """
    run = small_run.recipe(directory)
    settings: dict[str, object] = {
        "steps": 20,
        "global_batch": 2,
        "micro_batch": 2,
        "log_every": 1,
        "evaluate_every": 10,
        "checkpoint_every": 5,
        "patience_seconds": 600.0,  # a busy machine takes a minute to start a process
    }
    extraction = {"rows_per_shard": ROWS_PER_SHARD, "compute_batch": 4}
    return run.model_copy(
        update={
            "teachers": {"lite0": small_caches.teacher(codec=codec)},
            "num_views": VIEWS,
            "stages": {"stage2": run.stage("stage2").model_copy(update={**settings, **stage})},
            "extraction": run.extraction.model_copy(update=extraction),
        }
    )


class Died(Exception):
    """The builder is no more."""


class SlowExtractor(Extractor):
    """Sleeps before each shard, and dies before one."""

    def __init__(self, job: CacheJob, pause: float, shards: int | None) -> None:
        super().__init__(job.teachers)
        self._pause, self._left = pause, shards

    def extract(self, *arguments: Any) -> list[ShardRecord]:
        """Take its time."""
        time.sleep(self._pause)
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise Died
        return super().extract(*arguments)


def build(run: Recipe, pause: float = 0.0, shards: int | None = None) -> None:
    """Build the caches of a run, its images written already.

    Args:
        run: of `recipe`.
        pause: seconds before each shard.
        shards: after which it dies; None: it does not.

    Raises:
        Died: it did.
    """
    pool = InProcess(SlowExtractor(cache_jobs(run)[0], pause, shards))
    steps = precompute.Steps(
        resolve_stores=lambda job, _: precompute.resolve_stores(job, pool),
        extract_missing=lambda job, stores, _: precompute.extract_missing(job, stores, pool),
    )
    precompute.build([cache_jobs(run)], steps=steps)


def started(directory: Path, pause: float) -> "subprocess.Popen[bytes]":
    """Start a process that builds the caches of the run in a folder; arguments as of `build`."""
    return subprocess.Popen([sys.executable, __file__, str(directory), str(pause)])


if __name__ == "__main__":
    where, slow = sys.argv[1:]
    build(recipe(Path(where)), float(slow))
