"""Stages 1, 2 and 3 in a row: several experts, their proxy as a teacher, a drawn pyramid."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from support.small_caches import build
from support.stage_runs import (
    PYRAMID,
    from_cache,
    live,
    losses,
    trained_stages,
    training_job,
)

from cache.errors import FingerprintMismatch
from pipelines.evaluation import pyramid
from pipelines.evaluation.frozen import FrozenStudent
from pipelines.recipe import resolutions
from pipelines.recipe.config import PROXY, Recipe
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import StageConfig
from pipelines.recipe.stores import (
    cache_jobs,
    job_groups,
    open_stores,
    proxy_jobs,
    proxy_teacher,
    store_specs,
)
from pipelines.training import inputs, launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, emoji) -> Recipe:
    """Every stage of a run, each from its caches."""
    return trained_stages(tmp_path_factory.mktemp("stages"), emoji)


def pairs(run: Recipe, stage: StageConfig, steps: int) -> list[tuple[int, int]]:
    """Return the (teacher, student) scales of a stage's first steps."""
    drawn = [resolutions.draw(stage, run.seed, step) for step in range(steps)]
    return [(each.teachers[PROXY], each.student) for each in drawn]


def every_pair(run: Recipe) -> StageConfig:
    """Return stage 3, as long as it takes to draw each pair of scales."""
    stage = run.stage("stage3")
    nine = set(itertools.product(PYRAMID, PYRAMID))
    steps = next(n for n in itertools.count(9) if set(pairs(run, stage, n)) == nine)
    return stage.model_copy(update={"steps": steps})


def test_stage_3_from_caches_is_stage_3_with_the_live_proxy_at_all_nine_pairs(trained, tmp_path):
    stage = every_pair(trained)
    cached = from_cache(trained, stage, tmp_path / "cached")
    batch = trained.extraction.compute_batch
    assert cached == losses(trained, stage, live(trained, stage, batch), tmp_path / "live")
    assert len(set(cached)) == stage.steps
    # The comparison can tell: a teacher that stays at one scale parts company where it should.
    drawn = [teacher for teacher, _ in pairs(trained, stage, stage.steps)]
    fixed = stage.model_copy(update={"teacher_resolutions": {PROXY: PYRAMID[:1]}})
    other = from_cache(trained, fixed, tmp_path / "fixed")
    first = next(step for step, scale in enumerate(drawn) if scale != PYRAMID[0])
    assert other[:first] == cached[:first]
    assert not np.isclose(other[first], cached[first])


def test_stage_1_joins_experts_of_other_resolutions_and_grids_by_key(trained, tmp_path):
    stage = trained.stage("stage1")
    grids = {spec.grid for spec in store_specs(cache_jobs(trained)[0])}
    assert grids == {(2, 2), (4, 4)}
    cached = from_cache(trained, stage, tmp_path / "cached")
    batch = trained.extraction.compute_batch
    assert cached == losses(trained, stage, live(trained, stage, batch), tmp_path / "live")


def test_the_proxy_is_cached_at_every_scale_and_normalised_over_all(trained):
    stores = [store for job in proxy_jobs(trained) for store in open_stores(job)]
    grids = {(store.spec.resolution, store.spec.grid) for store in stores}
    assert grids == {(scale, (scale // 16, scale // 16)) for scale in PYRAMID}
    assert {store.spec.teacher.name for store in stores} == {PROXY}
    # One normaliser for what stages 2 and 3 learn, whichever scales each draws.
    second, third = (
        inputs.from_caches(trained, trained.stage(name)).normalisers[PROXY]
        for name in ("stage2", "stage3")
    )
    for ours, theirs in zip(second, third, strict=True):
        assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
            k: v.tolist() for k, v in theirs.state_dict().items()
        }


def test_the_proxys_caches_can_be_built_once_stage_1_is_done(trained, tmp_path):
    experts, proxys = job_groups(trained)
    assert (experts, proxys) == (cache_jobs(trained), proxy_jobs(trained))
    untrained = trained.model_copy(update={"run_directory": str(tmp_path)})
    assert job_groups(untrained) == [experts]


def test_no_stage_begins_from_one_that_is_still_on_its_way(trained):
    def longer(name: str) -> Recipe:
        stages = {
            stage.name: stage.model_copy(update={"steps": 100}) if stage.name == name else stage
            for stage in trained.stages.values()
        }
        return trained.model_copy(update={"stages": stages})

    assert len(job_groups(longer("stage1"))) == 1
    with pytest.raises(ValueError, match=r"stage1: trained for \d+ of 100 steps; finish this"):
        proxy_jobs(longer("stage1"))
    with pytest.raises(ValueError, match=r"stage2: trained for \d+ of 100 steps; finish this"):
        launch.train(longer("stage2"), trained.stage("stage3"))


def test_figures_of_a_stage_name_every_scale(trained):
    found = {
        stage.name: pyramid.stage_figures(FrozenStudent(trained, stage))
        for stage in trained.stages.values()
    }
    every = {str(scale) for scale in PYRAMID}
    assert set(found["stage1"].cosine) == {"48"}
    assert set(found["stage2"].cosine) == set(found["stage3"].cosine) == every
    for stage in trained.stages.values():
        figures = found[stage.name]
        assert figures.steps == stage.steps
        assert set(figures.loss) == {"before", "after"}
        for cosine in figures.cosine.values():
            assert all(-1 <= cosine[kind] <= 1 for kind in ("summary", "patches"))


def test_another_proxy_has_other_stores_and_nothing_goes_on_from_it(trained, tmp_path):
    other = changed(trained, tmp_path)
    launch.train(other, other.stage("stage1"))
    assert proxy_teacher(other).encoder == proxy_teacher(trained).encoder  # the weights differ
    ours, theirs = (
        {spec.directory() for job in proxy_jobs(run) for spec in store_specs(job)}
        for run in (trained, other)
    )
    assert ours.isdisjoint(theirs)
    stage = other.stage("stage2")
    with pytest.raises(FingerprintMismatch, match=r"teacher\.weights"):
        inputs.from_caches(other, stage)
    build(training_job(other, stage))
    launch.train(other, stage)
    first, second = (run.stage_directory("stage2").resolve() for run in (trained, other))
    assert first != second
    assert first.parent == second.parent  # one folder has the outputs of both


def changed(run: Recipe, directory: Path) -> Recipe:
    """Return a run beside another one whose proxy is another one, trained two steps less."""
    first, *rest = run.stages.values()
    stages = by_name(first.model_copy(update={"steps": first.steps - 2}), *rest)
    places = {"run_directory": str(directory), "stage_root": str(run.outputs)}
    return run.model_copy(update={"stages": stages, **places})
