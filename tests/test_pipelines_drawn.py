"""A build computes what the stages draw, and training from that is training from everything."""

from pathlib import Path

import pytest
from support import small_caches, small_run, stage_runs

from cache.errors import NotBuilt
from cache.manifest import Manifest
from pipelines.recipe.override import override
from pipelines.recipe.stores import cache_jobs, open_stores
from pipelines.training import inputs, launch, start

pytestmark = pytest.mark.slow

STEPS, BATCH, VIEWS, PER_SHARD = 3, 2, 3, 4


def recipe(directory, **extraction):
    """Return a run of which only a few of its shards' views are drawn."""
    run = small_run.recipe(directory)
    settings = {"rows_per_shard": PER_SHARD, "moments_samples": 16, "compute_batch": 4}
    stage = run.stage("stage2").model_copy(
        update={
            "steps": STEPS,
            "evaluate_every": None,
            "global_batch": BATCH,
            "micro_batch": BATCH,
            "log_every": 1,
        }
    )
    return run.model_copy(
        update={
            "num_views": VIEWS,
            "stages": {"stage2": stage},
            "extraction": run.extraction.model_copy(update={**settings, **extraction}),
        }
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the run with what is drawn, and with everything, both built."""
    found = []
    for everything in (False, True):
        directory = tmp_path_factory.mktemp("everything" if everything else "drawn")
        found.append(recipe(directory, everything=everything))
        small_run.build(found[-1], directory)
    return found


def training_job(run):
    return next(job for job in cache_jobs(run) if job.views == run.views)


def built(run) -> set[tuple[int, int]]:
    (store,) = open_stores(training_job(run))
    return {(record.view, record.shard) for record in Manifest.open(store.directory).records()}


def read(run) -> set[tuple[int, int]]:
    """Return the view and shard of every row of every step."""
    pairs = set()
    for batch in inputs.from_caches(run, run.stage("stage2")).batches(range(STEPS)):
        (store,) = open_stores(training_job(run))
        shards = store.samples.rows_of(batch.sample_ids) // PER_SHARD
        pairs |= set(zip(batch.view_numbers.tolist(), shards.tolist(), strict=True))
    return pairs


def test_only_drawn_views_of_shards_are_built(runs):
    drawn, everything = runs
    assert built(drawn) == read(drawn) == read(everything)
    assert len(built(drawn)) <= STEPS * BATCH < len(built(everything)) == VIEWS * 32 // PER_SHARD


def test_with_lanes_too_what_is_built_is_what_is_read(tmp_path):
    run = override(recipe(tmp_path), [f"lanes={BATCH}"])
    small_run.build(run, tmp_path)
    assert 0 < len(built(run)) < VIEWS * 32 // PER_SHARD
    assert built(run) == read(run)


def test_training_from_what_is_drawn_is_training_from_everything(runs, tmp_path):
    losses = []
    for number, run in enumerate(runs):
        stage = run.stage("stage2")
        given = inputs.from_caches(run, stage)
        losses.append(stage_runs.losses(run, stage, given, tmp_path / str(number)))
    assert losses[0] == losses[1]


def test_files_of_what_is_drawn_are_those_of_everything(runs):
    drawn, everything = (small_caches.data_files(Path(run.cache_root)) for run in runs)
    ours = [path for path in drawn if "/view-" in path]
    assert 0 < len(ours) < len([path for path in everything if "/view-" in path])
    assert [path for path in ours if drawn[path] != everything[path]] == []


def test_more_steps_want_more_of_the_caches_and_go_on_from_there(tmp_path, runs):
    """A stage at its end that is asked for more reads what was built since, and the rest."""
    run = recipe(tmp_path)
    small_run.build(run, tmp_path)
    first = built(run)
    launch.train(run, run.stage("stage2"))
    longer = run.model_copy(
        update={"stages": {"stage2": run.stage("stage2").model_copy(update={"steps": 40})}}
    )
    with pytest.raises(NotBuilt, match=r"half built, \d+ of \d+ shards are missing"):
        launch.train(longer, longer.stage("stage2"))
    small_caches.build(training_job(longer))
    assert first < built(longer)
    assert launch.train(longer, longer.stage("stage2")).first_step == STEPS


def test_a_train_set_may_have_views_of_its_own(runs, tmp_path):
    run = runs[0]
    (name,) = run.train
    own = override(run, [f"train.{name}.num_views=5"])
    assert training_job(own).num_views == 5
    identities = [start._num_views(each) for each in (run, own, override(own, ["num_views=5"]))]
    assert identities == [VIEWS, {name: 5}, 5]
    with pytest.raises(ValueError, match=r"held_out\.num_views = 2"):
        override(run, ["held_out.num_views=2"])


def test_a_store_that_no_step_reads_has_moments_and_no_shards(runs):
    run = override(runs[0], ["teachers.lite0.resolutions=[64, 96]"])
    job = training_job(run)
    small_caches.build(job)
    stores = {store.spec.resolution: store for store in open_stores(job)}
    assert stores[96].moments() is not None
    assert Manifest.open(stores[96].directory).total().num_shards == 0
