"""Recipes by name: each is complete and consistent, its paths lie below EUPE_HOME."""

from pathlib import Path

import pytest

from eupe.encoders import Encoder
from pipelines import recipes, start
from pipelines.config import PROXY, validated


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_a_recipe_is_valid_as_data_and_is_called_by_its_name(name):
    recipe = recipes.RECIPES[name]()
    assert recipe.name == name
    assert validated(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize("name", ["demo", "demo_stage2"])
def test_grids_of_the_demo_exist_at_every_scale(name):
    recipe = recipes.RECIPES[name]()
    canvas = recipe.views.canvas
    assert recipe.held_out_views.canvas == canvas
    assert recipe.held_out != recipe.train[0]
    for teacher in recipe.teachers:
        encoder = Encoder(teacher.encoder)
        for resolution in teacher.resolutions:
            assert resolution <= canvas
            assert min(encoder.grid(resolution)) > 1
    for stage in recipe.stages:
        encoder = Encoder(start.student_config(recipe, stage).encoder)
        for resolution in stage.student_scales:
            encoder.check_resolution(resolution)
            assert resolution <= canvas
    Encoder(recipe.student.encoder).check_resolution(recipe.evaluation.resolution)


def test_stage_2_only_has_no_proxy_and_reads_the_demos_caches():
    demo, alone = recipes.RECIPES["demo"](), recipes.RECIPES[recipes.STAGE_2_ONLY]()
    assert [stage.stage for stage in alone.stages] == ["stage2"]
    assert PROXY not in alone.stages[0].teachers
    for field in ("train", "held_out", "views", "num_views", "held_out_views", "cache_root"):
        assert getattr(alone, field) == getattr(demo, field), field
    assert alone.teachers == demo.teachers
    assert alone.run_directory != demo.run_directory or demo.stages == alone.stages


def test_every_command_without_arguments_has_its_stage():
    assert {stage.stage for stage in recipes.get(recipes.DEFAULT).stages} >= {"stage1", "stage3"}
    assert recipes.get(recipes.STAGE_2_ONLY).stage("stage2")


def test_paths_are_below_eupe_home_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    recipe = recipes.get("demo")
    for path in (recipe.run_directory, recipe.cache_root, recipe.train[0].source.path):
        assert Path(path).is_relative_to(tmp_path)
    monkeypatch.setenv("EUPE_HOME", "")
    monkeypatch.chdir(tmp_path)
    assert recipes.get("demo") == recipe


def test_an_overridden_path_is_below_eupe_home_too_and_an_absolute_one_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    recipe = recipes.get("demo", ["run_directory=elsewhere", "cache_root=/caches"])
    assert recipe.run_directory == str(tmp_path / "elsewhere")
    assert recipe.cache_root == "/caches"


def test_remote_roots_are_left_alone():
    assert recipes.get("demo", ["cache_root=s3://bucket/caches"]).cache_root == "s3://bucket/caches"


def test_a_mistyped_name_is_told_its_neighbour():
    with pytest.raises(ValueError, match="did you mean 'demo'"):
        recipes.get("dmo")
    with pytest.raises(ValueError, match=r"there are .*demo"):
        recipes.get("zzzzzz")
