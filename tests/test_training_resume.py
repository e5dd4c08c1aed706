"""Going on: while the dataset grows, on another machine's libraries, and when nothing is left."""

import shutil

import polars as pl
import pytest
import torch
from support import small_run
from support.small_caches import in_process

from cache.errors import NotBuilt
from cache.samples import Samples
from eupe.errors import BadInput
from eupe.spec import DatasetSpec
from pipelines.caching import indexing, precompute
from pipelines.evaluation import during, report
from pipelines.recipe.stores import cache_jobs
from pipelines.records import checkpoint, tracking
from pipelines.training import inputs, launch, start
from pipelines.training.loop import SCORE, train_stage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A run whose caches are built, nothing trained."""
    directory = tmp_path_factory.mktemp("run")
    made = small_run.recipe(directory)
    small_run.build(made, directory)
    return made


def elsewhere(run, directory, **changes):
    """Return the run in another directory, on a copy of its caches."""
    shutil.copytree(run.cache_root, directory / "cache")
    places = {"run_directory": str(directory / "run"), "cache_root": str(directory / "cache")}
    return run.model_copy(update={**places, **changes})


def stop(recipe, stage, opened):
    """Make an evaluation that ends the process, so to say."""

    def evaluate(model, step):
        raise KeyboardInterrupt

    return evaluate


def losses(run, stage) -> dict[int, float]:
    lines = tracking.read(run.stage_directory(stage.name) / tracking.METRICS_FILE)
    return {line["step"]: line["loss/total"] for line in lines if "loss/total" in line}


def grow(run, name: str) -> None:
    """Index more samples of a dataset, and build none of them."""
    samples = Samples.open(run.cache_root, name)
    more = samples.table.drop("row").with_columns(pl.concat_str(pl.lit("new/"), "sample_id"))
    more = more.with_columns(sample_id=pl.col("literal")).drop("literal")
    Samples.append(run.cache_root, DatasetSpec(name=name), more)


@pytest.mark.parametrize("pixels", [(), (64,)])
def test_a_run_that_has_begun_goes_on_while_its_datasets_grow(tmp_path, pixels):
    built = small_run.recipe(tmp_path).model_copy(update={"pixels": pixels})
    small_run.build(built, tmp_path)
    undisturbed = elsewhere(built, tmp_path / "undisturbed")
    stage = undisturbed.stage("stage2")
    launch.train(undisturbed, stage, make_evaluate=during.hook)
    run = elsewhere(built, tmp_path / "grown")
    with pytest.raises(KeyboardInterrupt):
        launch.train(run, stage, make_evaluate=stop)
    assert checkpoint.require(run.stage_directory(stage.name)).step == 4
    for name in ("train", "held-out"):
        grow(run, name)
    with pytest.raises(NotBuilt, match=r"half built, \d+ of \d+ shards are missing"):
        inputs.from_caches(run, stage)  # a run that begins now wants all of them
    launch.train(run, stage, make_evaluate=during.hook)
    assert losses(run, stage) == losses(undisturbed, stage)


def test_a_run_that_goes_on_keeps_the_normalisers_it_began_with(built, tmp_path, monkeypatch):
    """Where PHI-S's basis is open, another machine's linear algebra gives another one."""
    (stage,) = built.stages.values()
    stage = stage.model_copy(update={"normaliser": "phi-s"})
    runs = [elsewhere(built, tmp_path / name) for name in ("undisturbed", "stopped")]
    launch.train(runs[0], stage)
    with pytest.raises(KeyboardInterrupt):
        launch.train(runs[1], stage, make_evaluate=stop)
    phi_s = inputs.NORMALISERS["phi-s"]

    def otherwise(moments):
        normaliser = phi_s(moments)
        normaliser.rotation.mul_(-1)
        return normaliser

    monkeypatch.setitem(inputs.NORMALISERS, "phi-s", otherwise)
    launch.train(runs[1], stage)
    assert losses(runs[1], stage) == losses(runs[0], stage)


def test_a_run_that_is_on_its_way_has_no_report_yet(built, tmp_path):
    run = elsewhere(built, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        launch.train(run, run.stage("stage2"), make_evaluate=stop)
    with pytest.raises(ValueError, match="trained for 4 of 8 steps; finish this stage first"):
        report.make(run, {})


def test_a_finished_stage_is_looked_at_and_no_network_is_built(built, tmp_path, monkeypatch):
    run = elsewhere(built, tmp_path)
    stage = run.stage("stage2")
    launch.train(run, stage, make_evaluate=during.hook)

    def build(*arguments):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(start, "drawn_model", build)
    done = launch.train(run, stage, make_evaluate=during.hook)
    assert (done.first_step, done.checkpoint.step) == (8, 8)
    hotter = stage.optimizer.model_copy(update={"lr": 1.0})
    other, there = stage.model_copy(update={"optimizer": hotter}), run.stage_directory("stage2")
    with pytest.raises(ValueError, match=r"of another run .*stage\.optimizer\.lr: 1\.0 != 0\.003"):
        start.begins_anew(
            checkpoint.require(there),
            start.identity(run, other, inputs.from_caches(run, other), None),
        )


def rates(run, stage) -> dict[int, float]:
    lines = tracking.read(run.stage_directory(stage.name) / tracking.METRICS_FILE)
    return {line["step"]: line["lr"] for line in lines if "lr" in line}


def test_a_stage_at_its_end_goes_on_with_its_schedule_begun_anew(built, tmp_path, capsys):
    run = elsewhere(built, tmp_path)
    stage = run.stage("stage2").model_copy(update={"warmup_steps": 2, "log_every": 1})
    launch.train(run, stage, make_evaluate=during.hook)
    first = rates(run, stage)
    longer = stage.model_copy(update={"steps": 16})
    with pytest.raises(KeyboardInterrupt):
        launch.train(run, longer, make_evaluate=stop)
    assert "goes on to 16, its learning rate's schedule begun anew" in capsys.readouterr().err
    assert checkpoint.require(run.stage_directory(stage.name)).step == 12
    assert launch.train(run, longer, make_evaluate=during.hook).first_step == 12
    assert "begun anew" not in capsys.readouterr().err  # goes on with what was begun
    both = rates(run, stage)
    assert [both[8 + step] for step in first] == pytest.approx(list(first.values()))
    undisturbed = elsewhere(built, tmp_path / "undisturbed")
    for asked in (stage, longer):
        launch.train(undisturbed, asked, make_evaluate=during.hook)
    assert losses(undisturbed, stage) == losses(run, stage)
    assert max(losses(run, stage)) == 16


@pytest.mark.parametrize(
    ("trained", "changes", "sentence"),
    [
        (4, {"steps": 16}, "of 8 steps, 4 of them done, and 16 are asked for: train those to"),
        (4, {"steps": 6}, "of 8 steps, 4 of them done, and 6 are asked for: train those to"),
        (8, {"steps": 6}, "of 8 steps, 8 of them done, and 6 are asked for: give another run"),
        (8, {"steps": 10, "warmup_steps": 3}, "after step 8, and only 2 steps are left"),
        (8, {"steps": 10, "head_hidden": 7}, r"of another run .*stage\.head_hidden: 7 != "),
    ],
)
def test_a_checkpoint_of_another_length_is_refused(built, tmp_path, trained, changes, sentence):
    run = elsewhere(built, tmp_path)
    stage = run.stage("stage2")
    if trained < stage.steps:
        with pytest.raises(KeyboardInterrupt):
            launch.train(run, stage, make_evaluate=stop)
    else:
        launch.train(run, stage, make_evaluate=during.hook)
    other = stage.model_copy(update=changes)
    with pytest.raises(BadInput, match=sentence):
        train_stage(run, other, inputs.from_caches(run, other), run.stage_directory(stage.name))
    assert checkpoint.require(run.stage_directory(stage.name)).step == trained


def test_a_last_step_that_was_not_judged_is(built, tmp_path):
    run = elsewhere(built, tmp_path)
    stage = run.stage("stage2").model_copy(update={"evaluate_every": None})
    with pytest.raises(KeyboardInterrupt):
        launch.train(run, stage, make_evaluate=stop)
    directory = run.stage_directory(stage.name)
    assert (checkpoint.require(directory).step, checkpoint.require(directory).score) == (8, None)
    launch.train(run, stage, make_evaluate=during.hook)
    judged = [line for line in tracking.read(directory / tracking.METRICS_FILE) if SCORE in line]
    assert [line["step"] for line in judged] == [8]
    assert checkpoint.require(directory).score == judged[0][SCORE]


def test_another_rounding_of_the_first_weights_is_no_other_run(built, tmp_path, monkeypatch):
    """Another version of torch or timm, another processor: the checkpoint's weights count."""
    run = elsewhere(built, tmp_path)
    stage = run.stage("stage2")
    with pytest.raises(KeyboardInterrupt):
        launch.train(run, stage, make_evaluate=stop)
    first = start.drawn_model

    def rounded(*arguments):
        model = first(*arguments)
        for parameter in model.parameters():
            parameter.data.mul_(1 + 2**-20)
        return model

    monkeypatch.setattr(start, "drawn_model", rounded)
    assert launch.train(run, stage).first_step == 4


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"resolution": 60}, "60 px: wants a multiple of its patch, 16"),
        ({"k": 33}, r"evaluation\.k = 33: the bank has 32 images"),
    ],
)
def test_an_evaluation_that_cannot_be_done_is_refused_before_a_step_is(built, changes, sentence):
    asked = built.model_copy(update={"evaluation": built.evaluation.model_copy(update=changes)})
    opened = inputs.from_caches(built, built.stage("stage2"))
    with pytest.raises(ValueError, match=sentence):
        during.hook(asked, asked.stage("stage2"), opened)


def test_who_creates_stores_for_actors_with_gpus_needs_none(tmp_path, monkeypatch):
    run = small_run.recipe(tmp_path)
    small_run.build(run, tmp_path)
    shutil.rmtree(run.cache_root)

    def no_driver(*arguments):
        raise RuntimeError("Found no NVIDIA driver on your system")

    monkeypatch.setattr(torch.cuda, "get_device_name", no_driver)
    job = cache_jobs(run)[0]
    indexing.index_samples(job)
    far = job.model_copy(
        update={"extraction": job.extraction.model_copy(update={"gpus_per_actor": 1})}
    )
    (store,) = precompute.resolve_stores(far, in_process(job))
    assert store.provenance["compute_batch"] == 8
    assert "device" not in store.provenance
