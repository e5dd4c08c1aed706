"""Training while caching: the same losses as afterwards, and an end to waiting for a dead builder.

A builder in another process makes the caches, slowly; the stage trains in this one.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from support import slow_builder, small_run

from cache.errors import NotBuilt
from pipelines.evaluation import during
from pipelines.recipe.config import Recipe
from pipelines.recipe.stores import cache_jobs, open_stores
from pipelines.records import checkpoint, tracking
from pipelines.training import arrivals, inputs, launch, outputs
from pipelines.training.batches import Loader

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 300
PACE = {"images_per_second", "data_wait_share", "time"}


def figures(run: Recipe) -> list[dict[str, object]]:
    """Return all that a run's stage wrote down of its steps, but how fast they went."""
    lines = tracking.read(run.stage_directory("stage2") / tracking.METRICS_FILE)
    return [{name: line[name] for name in line if name not in PACE} for line in lines]


def shares_of_waiting(run: Recipe) -> list[float]:
    lines = tracking.read(run.stage_directory("stage2") / tracking.METRICS_FILE)
    return [line["data_wait_share"] for line in lines if "data_wait_share" in line]


def train(run: Recipe, **arguments: object) -> None:
    launch.train(run, run.stage("stage2"), make_evaluate=during.hook, **arguments)


@pytest.fixture(scope="module")
def afterwards(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """Return the figures of training once all caches were there."""
    run = begun(tmp_path_factory.mktemp("afterwards"))
    slow_builder.build(run)
    train(run)
    return figures(run)


def begun(directory: Path, **stage: object) -> Recipe:
    """Return the run in a folder that has its images, and no caches."""
    small_run.write_images(directory)
    return slow_builder.recipe(directory, **stage)


def half_built(directory: Path, shards: int, **stage: object) -> Recipe:
    """Return the run in a folder whose builder died after so many shards."""
    run = begun(directory, **stage)
    with pytest.raises(slow_builder.Died):
        slow_builder.build(run, shards=shards)
    return run


def lacking(run: Recipe) -> int:
    """Count the views of shards that the training store lacks now."""
    job = next(job for job in cache_jobs(run) if job.views == run.views)
    (store,) = open_stores(job, half=True)
    return store.lacks(job.wanted_of(store), store.samples.shards())


def test_waiting_for_a_builder_gives_the_losses_of_training_afterwards(tmp_path, afterwards):
    run, left = begun(tmp_path, on_missing="wait"), {}

    def watched(recipe, stage, pins, loader):
        given = inputs.from_caches(recipe, stage, pins, loader)

        def batches(steps):
            for batch in given.batches(steps):
                left[batch.step] = lacking(run)
                yield batch

        return replace(given, batches=batches)

    builder = slow_builder.started(tmp_path, pause=0.5)
    train(run, make_inputs=watched)
    assert builder.wait(PATIENCE_SECONDS) == 0
    assert left[0] > 0 == left[19]  # it began before its caches were whole
    assert figures(run) == afterwards
    assert max(shares_of_waiting(run)) > 0.5


@pytest.mark.parametrize("shards", [0, slow_builder.SHARDS // 2])
def test_live_teachers_for_what_is_missing_give_the_losses_of_training_afterwards(
    tmp_path, afterwards, shards
):
    """And the held-out figures: of the centre views nothing is there."""
    run = half_built(tmp_path, shards, on_missing="live")
    lacked = lacking(run)
    train(run)
    assert lacking(run) == lacked > 0
    assert figures(run) == afterwards


def test_what_a_live_stage_cannot_do_is_refused_before_its_first_step(tmp_path):
    run = begun(tmp_path, on_missing="live")
    with pytest.raises(NotBuilt, match="no such store; build it with"):
        train(run)


@pytest.mark.parametrize("then", ["wait", "refuse"])
def test_a_builder_that_dies_is_told_and_the_stage_goes_on_from_its_checkpoint(
    tmp_path, afterwards, then
):
    run = half_built(
        tmp_path, slow_builder.SHARDS, on_missing="wait", patience_seconds=2.0
    )  # both views of all shards are there, and nothing that judges
    with pytest.raises(NotBuilt, match=r"waited for what it is judged by: \d+ shards are missing,"):
        train(run)
    saved = checkpoint.require(run.stage_directory("stage2"))
    assert saved.step == 10
    slow_builder.build(run)
    train(slow_builder.recipe(tmp_path, on_missing=then))
    assert figures(run) == afterwards
    assert checkpoint.require(run.stage_directory("stage2")).pins == saved.pins


@pytest.mark.parametrize("then", ["wait", "refuse"])
def test_what_a_stage_waited_for_is_read_by_the_run_that_goes_on(tmp_path, afterwards, then):
    run = half_built(tmp_path, 7, on_missing="wait", patience_seconds=2.0, checkpoint_every=1)
    with pytest.raises(NotBuilt, match=r"waited for step \d+: \d+ shards are missing, .*small_run"):
        train(run)
    saved = checkpoint.require(run.stage_directory("stage2"))
    assert saved.step < 16  # of an epoch
    slow_builder.build(run)
    train(slow_builder.recipe(tmp_path, on_missing=then))
    assert figures(run) == afterwards
    assert checkpoint.require(run.stage_directory("stage2")).pins == saved.pins


def test_stores_that_nobody_makes_are_told_with_what_makes_them(tmp_path, capsys):
    run = begun(tmp_path, on_missing="wait", patience_seconds=1.0)
    with pytest.raises(NotBuilt, match=r"3 stores are missing, .* start `eupe cache build small"):
        train(run)
    assert "waits for its stores: 3 stores are not there yet" in capsys.readouterr().err
    assert not outputs.asked(run, run.stage("stage2")).directory.exists()


def test_a_builder_at_work_elsewhere_keeps_a_stage_waiting(tmp_path, monkeypatch):
    """A commit to another store of the recipe is a sign of life; then there are no more."""
    run = begun(tmp_path, on_missing="wait", patience_seconds=1.0)
    signs = iter(range(8))
    monkeypatch.setattr(arrivals.Arrivals, "_signs", lambda self: [next(signs, 8)])
    with pytest.raises(NotBuilt):
        train(run)
    assert next(signs, None) is None


def test_all_workers_wait_for_the_rows_of_all(tmp_path, monkeypatch):
    """Else one would wait for a builder while the others wait for it, in a collective."""
    run = half_built(tmp_path, 0, on_missing="wait")
    asked = []

    def wait(self, what, unit, num_missing):
        asked.append((what, num_missing()))
        raise TimeoutError

    monkeypatch.setattr(arrivals.Arrivals, "wait", wait)
    for rank in range(2):
        given = inputs.from_caches(run, run.stage("stage2"), None, Loader(run.workers, rank, 2))
        with pytest.raises(TimeoutError):
            next(iter(given.batches(range(20))))
    assert asked == [("step 0", 2)] * 2
