"""Outputs of stages: addressed by what made them, shared by runs, old where that has changed."""

import re
import shutil
from pathlib import Path

import pytest
from support import small_run
from support.stage_runs import trained_stages

from pipelines.evaluation import during
from pipelines.recipe.config import Recipe
from pipelines.records import checkpoint, tracking
from pipelines.training import launch, loop, outputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory, emoji) -> Recipe:
    return trained_stages(tmp_path_factory.mktemp("three"), emoji)


@pytest.fixture
def built(tmp_path) -> Recipe:
    """A run whose caches are built, nothing trained."""
    run = small_run.recipe(tmp_path)
    small_run.build(run, tmp_path)
    return run


@pytest.fixture
def idle(monkeypatch) -> None:
    """Let any training fail."""

    def train(*arguments, **named):
        raise AssertionError("a step is trained")

    monkeypatch.setattr(loop._Run, "_step", train)


def changed(run: Recipe, name: str, **fields: object) -> Recipe:
    """Return a run with a stage changed."""
    stage = run.stage(name).model_copy(update=fields)
    return run.model_copy(update={"stages": {**run.stages, name: stage}})


def moved(run: Recipe, directory: Path) -> Recipe:
    """Return a run whose caches, pictures and outputs are copied to another folder."""
    old = run.directory.parent
    shutil.copytree(old, directory, symlinks=True)
    return Recipe.model_validate_json(run.model_dump_json().replace(str(old), str(directory)))


def addresses(run: Recipe) -> list[str]:
    return [each.output.address for each in outputs.standing(run)]


def test_a_runs_folder_links_to_what_its_stages_made(trained):
    for name in trained.stages:
        link = trained.directory / name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()  # the folder of all runs may be moved
        assert link.resolve().parent == trained.outputs.resolve()
        assert link.resolve().name.startswith(f"{name}-")
    assert [each.state for each in outputs.standing(trained)] == ["finished"] * 3


def test_no_place_is_in_an_address(trained, tmp_path, idle):
    there = moved(trained, tmp_path / "elsewhere" / "deeper")
    assert addresses(there) == addresses(trained)
    for stage in there.stages.values():
        done = launch.train(there, stage)
        assert done.checkpoint.directory.is_relative_to(tmp_path)


def test_another_run_of_the_same_stages_trains_nothing(trained, tmp_path, idle):
    other = trained.model_copy(update={"run_directory": str(trained.directory) + "-again"})
    for stage in other.stages.values():
        launch.train(other, stage)
        assert other.stage_directory(stage.name).samefile(trained.stage_directory(stage.name))


def test_stages_that_are_left_out_or_judged_otherwise_move_no_address(trained):
    first, second, third = addresses(trained)
    judged = trained.evaluation.model_copy(update={"k": 1})
    assert addresses(trained.model_copy(update={"evaluation": judged})) == [first, second, third]
    fixed = trained.model_copy(update={"proxy_resolutions": trained.scales_of_proxy})
    without = fixed.model_copy(
        update={"stages": {name: trained.stage(name) for name in ("stage1", "stage2")}}
    )
    assert addresses(without) == [first, second]
    # The normaliser is over all that is cached of the proxy: fewer resolutions are another stage.
    fewer = without.model_copy(update={"proxy_resolutions": None})
    assert addresses(fewer)[0] == first
    assert addresses(fewer)[1] != second


@pytest.mark.parametrize(
    ("name", "fields", "old"),
    [
        ("stage1", {"head_hidden": 7}, ["stage1", "stage2", "stage3"]),
        ("stage2", {"head_hidden": 7}, ["stage2", "stage3"]),
        ("stage3", {"head_hidden": 7}, ["stage3"]),
        ("stage2", {"log_every": 7, "micro_batch": 3, "on_missing": "wait"}, []),
    ],
)
def test_a_change_makes_old_what_follows_from_it(trained, name, fields, old):
    standing = outputs.standing(changed(trained, name, **fields))
    assert [each.output.stage for each in standing if each.state == "to do"] == old
    said = [each.old for each in standing if each.old]
    assert len(said) == len(old)
    assert all(line == "stage.head_hidden is 7, was 32" for line in said[:1])
    for line in said[1:]:
        assert " is " in line
        assert f"{name}-" in line or "stage2-" in line  # the earlier output, by both addresses


def test_a_changed_recipe_trains_anew_and_loses_nothing(built):
    launch.train(built, built.last)
    before = built.stage_directory("stage2").resolve()
    hotter = built.last.optimizer.model_copy(update={"lr": 1e-2})
    other = changed(built, "stage2", optimizer=hotter)
    assert outputs.standing(other)[0].old == "stage.optimizer.lr is 0.01, was 0.003"
    assert launch.train(other, other.last).first_step == 0
    after = other.stage_directory("stage2").resolve()
    assert before != after
    assert len(tracking.read(before / tracking.METRICS_FILE)) > 0
    assert checkpoint.require(before).step == checkpoint.require(after).step == 8
    launch.train(built, built.last)  # asked for again it is there, and the run's again
    assert built.stage_directory("stage2").resolve() == before


def test_a_stage_that_goes_on_is_another_output_and_leaves_the_shorter_one(built):
    launch.train(built, built.last, make_evaluate=during.hook)
    short = built.stage_directory("stage2").resolve()
    longer = changed(built, "stage2", steps=12)
    assert launch.train(longer, longer.last, make_evaluate=during.hook).first_step == 8
    long = longer.stage_directory("stage2").resolve()
    assert (checkpoint.require(short).step, checkpoint.require(long).step) == (8, 12)
    # Twelve steps under one schedule are something else than eight and four.
    apart = longer.model_copy(update={"run_directory": str(built.directory) + "-12"})
    assert addresses(apart) != [long.name]
    assert addresses(longer) == [long.name]


class Killed(BaseException):
    """At this instant."""


def test_who_is_killed_while_what_it_goes_on_from_is_copied_does_it_again(built, monkeypatch):
    launch.train(built, built.last)
    longer, copyfile = changed(built, "stage2", steps=9), shutil.copyfile
    begun, num_kills, left = False, 0, 0

    def copy(*arguments, **named):
        nonlocal left
        if not left:
            raise Killed
        left -= 1
        return copyfile(*arguments, **named)

    while not begun:
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "copyfile", copy)
            output, left = outputs.asked(longer, longer.last), num_kills
            assert outputs.GOES_ON_FROM in output.made_of
            assert output.newest().step == 8
            try:
                outputs.begin(longer, output)
                begun = True
            except Killed:
                num_kills += 1
                assert not (output.directory / outputs.MADE_OF_FILE).exists()
    assert num_kills > 5
    done = launch.train(longer, longer.last)
    assert (done.first_step, done.checkpoint.step) == (8, 9)
    assert not list(output.directory.glob("checkpoints/.tmp*"))


def test_what_made_an_output_is_what_its_address_says(built):
    """By one bit another schedule would be told, or gone on with."""
    outputs.begin(built, outputs.asked(built, built.last))
    path = built.stage_directory("stage2") / outputs.MADE_OF_FILE
    content, wanted = path.read_bytes(), outputs.standing(built)
    other = changed(built, "stage2", steps=built.last.steps + 1)
    assert [each.old for each in outputs.standing(other)] == ["stage.steps is 9, was 8"]
    steps = 8 * (content.index(b'"steps": ') + len(b'"steps": '))
    for bit in (0, steps, steps + 3, *range(5, 8 * len(content), 1997)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert outputs.standing(built) == wanted
        with pytest.raises(ValueError, match=re.escape(str(path.resolve()))):
            outputs.standing(other)
    outputs.begin(built, outputs.asked(built, built.last))
    assert path.read_bytes() == content


def test_what_is_in_the_links_way_is_named_and_stays(built):
    (built.directory / "stage2").mkdir(parents=True)
    (built.directory / "stage2" / "mine").touch()
    with pytest.raises(ValueError, match="is a folder, and wants to be a link to"):
        launch.train(built, built.last)
    assert (built.directory / "stage2" / "mine").is_file()
