"""One step of every stage of every `_tiny` recipe, from one set of caches of real images."""

import math
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from support.small_caches import build

from pipelines.recipe import family, recipes
from pipelines.recipe.config import Recipe
from pipelines.recipe.stores import cache_jobs, proxy_jobs
from pipelines.records import checkpoint, tracking
from pipelines.training import launch

pytestmark = pytest.mark.slow

TINY = [f"{name}_tiny" for name in (*family.STUDENTS, "proxy_vitg")]
TRAIN, HELD_OUT = 16, 4


@pytest.fixture(scope="module")
def home(tmp_path_factory, emoji) -> Iterator[Path]:
    """Give a home with a few emoji and the proxy trained: all twins share one cache root."""
    home = tmp_path_factory.mktemp("home")
    table = pl.read_parquet(emoji)
    few = [table.filter(split=split).head(n) for split, n in (("train", TRAIN), ("test", HELD_OUT))]
    pl.concat(few).write_parquet(home / "few.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EUPE_HOME", str(home))
        run = short("proxy_vitg_tiny")
        for job in cache_jobs(run):
            build(job)
        launch.train(run, run.stage("stage1"))
        student = short(TINY[0])
        launch.train(student, student.stage("stage1"))
        assert student.stage_directory("stage1").samefile(run.stage_directory("stage1"))
        for job in proxy_jobs(student):
            build(job)
        yield home


def short(name: str) -> Recipe:
    """Return a twin with the few images, one view of each, and one step a stage."""
    run = recipes.get(name)
    return recipes.get(
        name,
        [
            "train.emoji-train.source.path=few.parquet",
            "held_out.source.path=few.parquet",
            "num_views=1",
            "extraction.moments_samples=8",
            "extraction.compute_batch=8",
            *(
                f"stages.{stage.name}.{change}"
                for stage in run.stages.values()
                for change in ("steps=1", "global_batch=4", "warmup_steps=0")
            ),
        ],
    )


def test_every_recipe_of_the_paper_has_its_twin():
    assert len(TINY) == 7
    assert set(TINY) <= set(recipes.RECIPES)


@pytest.mark.parametrize("name", TINY)
def test_a_twin_takes_a_step_of_every_stage(name: str, home: Path) -> None:
    run = short(name)
    for stage in run.stages.values():
        launch.train(run, stage)  # stage 1 is there already: the twins share their proxy
        directory = run.stage_directory(stage.name)
        assert directory.is_relative_to(home)
        assert checkpoint.require(directory).step == 1
        (line,) = tracking.read(directory / tracking.METRICS_FILE)
        assert math.isfinite(line["loss/total"])
        assert line["loss/total"] > 0
