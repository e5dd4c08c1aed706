"""Arrivals: a stage's waiting for what a builder has yet to commit, while it has patience.

Nothing is asked of the builder: it may run on any machine, and what it commits is seen in the
stores. That it is alive is known by its commits too, to whichever store of the recipe.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from cache.errors import FingerprintMismatch, NotBuilt
from cache.format import layout
from cache.manifest import Manifest
from cache.samples import num_rows_now
from cache.store import open_store
from eupe.spec import StoreSpec
from pipelines.machines import job_folder
from pipelines.machines.progress import track
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.recipe.stores import job_groups, jobs_of, pixel_jobs, store_specs

POLL_SECONDS = 0.5
SIGNS_EVERY_SECONDS = 10.0
"""Signs of a builder are looked for while nothing arrives: a request for each store."""
SHOWN_AFTER_SECONDS = 5.0
"""Shorter waits have no bar: every step may have one."""


class Arrivals:
    """What a stage waits for.

    Args:
        recipe: whose caches a builder builds.
        stage: of it; `patience_seconds` is how long no sign of a builder is borne.
    """

    def __init__(self, recipe: Recipe, stage: StageConfig) -> None:
        self._recipe, self._stage, self._told = recipe, stage, False

    def stores(self) -> None:
        """Return once every store that the stage reads is there, however little is in it.

        Raises:
            NotBuilt: no sign of a builder for too long.
            BadInput: weights that cannot be read.
        """
        jobs = [*jobs_of(self._recipe, self._stage), *pixel_jobs(self._recipe, self._stage)]

        def num_missing() -> int:  # which ones there are is told by the samples, once indexed
            return sum(not _is_there(job.root, spec) for job in jobs for spec in store_specs(job))

        self.wait("its stores", "stores", num_missing)

    def wait(self, what: str, unit: str, num_missing: Callable[[], int]) -> float:
        """Return once nothing is missing; say how many seconds that took.

        Args:
            what: is waited for.
            unit: of the count, plural.
            num_missing: counts what is not there now.

        Raises:
            NotBuilt: no sign of a builder for too long.
        """
        began = time.monotonic()
        total = left = num_missing()
        if not left:
            return 0.0
        self._tell(what, left, unit)
        look_every = min(SIGNS_EVERY_SECONDS, self._stage.patience_seconds / 4)
        signs, looked, since = self._signs(), began, began
        with ExitStack() as shown:
            progress = None
            while left:
                time.sleep(POLL_SECONDS)
                before, left, now = left, num_missing(), time.monotonic()
                if progress is not None:
                    progress.advance(before - left)
                elif left and now - began > SHOWN_AFTER_SECONDS:
                    title = f"{self._stage.name} waits for {what}"
                    progress = shown.enter_context(track(total, title, unit, total - left))
                if left < before:
                    since = now
                elif now - looked > look_every:
                    last, signs, looked = signs, self._signs(), now
                    if signs != last:
                        since = now
                    elif now - since > self._stage.patience_seconds:
                        raise self._given_up(what, left, unit)
        return time.monotonic() - began

    def _tell(self, what: str, left: int, unit: str) -> None:
        """Say once what is waited for, and what makes it."""
        if not self._told and not job_folder.silent():
            print(
                f"{self._stage.name} waits for {what}: {left} {unit} are not there yet; "
                f"{self._builder} makes them",
                file=sys.stderr,
                flush=True,
            )
        self._told = True

    def _given_up(self, what: str, left: int, unit: str) -> NotBuilt:
        return NotBuilt(
            f"{self._stage.name} waited for {what}: {left} {unit} are missing, and nothing was "
            f"committed to any store of the recipe for {self._stage.patience_seconds:g} s "
            f"(patience_seconds); start {self._builder} again, which computes only what is "
            "missing, and then this command, which goes on from its newest checkpoint"
        )

    @property
    def _builder(self) -> str:
        return f"`eupe cache build {self._recipe.name}`"

    def _signs(self) -> list[int]:
        """Return what rises while a builder gets on: rows of data sets, versions of stores."""
        return [
            *(_num_rows(root, name) for root, name in self._datasets),
            *(_version(directory) for directory in self._directories),
        ]

    @cached_property
    def _datasets(self) -> list[tuple[str, str]]:
        recipe = self._recipe
        return [(recipe.cache_root, name) for name in (*recipe.train, recipe.held_out.name)]

    @cached_property
    def _directories(self) -> list[Path]:
        jobs = [job for group in job_groups(self._recipe) for job in group]
        return [
            layout.store_directory(layout.cache_root(job.root), spec)
            for job in jobs
            for spec in store_specs(job)
        ]


def _is_there(root: str, spec: StoreSpec) -> bool:
    try:
        open_store(root, spec)
    except (NotBuilt, FingerprintMismatch):  # one that resembles it is no obstacle to a builder
        return False
    return True


def _num_rows(root: str, dataset: str) -> int:
    try:
        return num_rows_now(root, dataset)
    except NotBuilt:
        return 0


def _version(directory: Path) -> int:
    try:
        return Manifest.open(directory).version
    except NotBuilt:
        return -1
