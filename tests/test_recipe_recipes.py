"""Recipes by name: each is complete and consistent, its paths lie below EUPE_HOME."""

from pathlib import Path

import pytest

from eupe.encoders import Encoder
from eupe.errors import BadInput
from pipelines.recipe import recipes
from pipelines.recipe.config import PROXY
from pipelines.recipe.override import validated

ROOT = Path(__file__).parents[1]


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
    assert recipe.held_out not in recipe.train.values()
    for teacher in recipe.teachers.values():
        encoder = Encoder(teacher.encoder)
        for resolution in teacher.resolutions:
            assert resolution <= canvas
            assert min(encoder.grid(resolution)) > 1
    for stage in recipe.stages.values():
        encoder = Encoder(recipe.trained_by(stage).encoder)
        for resolution in stage.student_resolutions:
            encoder.check_resolution(resolution)
            assert resolution <= canvas
    Encoder(recipe.student.encoder).check_resolution(recipe.evaluation.resolution)


def test_stage_2_only_has_no_proxy_and_reads_the_demos_caches():
    demo, alone = recipes.RECIPES["demo"](), recipes.RECIPES[recipes.STAGE_2_ONLY]()
    assert list(alone.stages) == ["stage2"]
    assert PROXY not in alone.stage("stage2").teachers
    for field in ("train", "held_out", "views", "num_views", "held_out_views", "cache_root"):
        assert getattr(alone, field) == getattr(demo, field), field
    assert alone.teachers == demo.teachers
    assert alone.run_directory != demo.run_directory or demo.stages == alone.stages


def test_every_command_without_arguments_has_its_stage():
    assert set(recipes.get(recipes.DEFAULT).stages) >= {"stage1", "stage3"}
    assert recipes.get(recipes.STAGE_2_ONLY).stage("stage2")


def test_paths_are_below_eupe_home_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    recipe = recipes.get("demo")
    for path in (recipe.run_directory, recipe.cache_root, recipe.train["emoji-train"].source.path):
        assert Path(path).is_relative_to(tmp_path)
    monkeypatch.setenv("EUPE_HOME", "")
    monkeypatch.chdir(tmp_path)
    assert recipes.get("demo") == recipe


def test_weights_in_files_are_below_eupe_home_too(tmp_path, monkeypatch):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    recipe = recipes.get(
        "demo",
        [
            "teachers.efficientnet_lite0.weights=file:weights/lite0.pth",
            "student.weights=checkpoint:runs/other/stage2/checkpoints/step-7",
        ],
    )
    first, second = recipe.teachers.values()
    assert first.weights == f"file:{tmp_path}/weights/lite0.pth"
    assert second.weights.startswith("package:")
    assert recipe.student.weights.startswith(f"checkpoint:{tmp_path}/runs/other")
    assert recipe.proxy.weights is None


def test_an_overridden_path_is_below_eupe_home_too_and_an_absolute_one_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    recipe = recipes.get("demo", ["run_directory=elsewhere", "cache_root=/caches"])
    assert recipe.run_directory == str(tmp_path / "elsewhere")
    assert recipe.cache_root == "/caches"


def test_home_and_variables_in_paths_are_what_a_shell_has(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    recipe = recipes.get("demo", ["cache_root=$SCRATCH/caches", "run_directory=~/runs"])
    assert recipe.cache_root == str(tmp_path / "caches")
    assert recipe.run_directory == "/home/me/runs"
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text(
        "recipe: demo\nset: {cache_root: '${oc.env:SCRATCH}/c', student.weights: 'file:~/w.pth'}\n"
    )
    mine = recipes.get("mine.yaml")
    assert mine.cache_root == str(tmp_path / "c")
    assert mine.student.weights == "file:/home/me/w.pth"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(BadInput, match="the environment has no SCRATCH"):
        recipes.get("demo", ["cache_root=$SCRATCH/caches"])


def test_a_label_that_looks_like_a_number_is_text():
    recipe = recipes.get("demo", ["held_out.source.where={split: 0}"])
    assert recipe.held_out.source.where == {"split": "0"}


def test_remote_roots_are_left_alone():
    assert recipes.get("demo", ["cache_root=s3://bucket/caches"]).cache_root == "s3://bucket/caches"


def test_a_mistyped_name_is_told_its_neighbour():
    with pytest.raises(ValueError, match="did you mean 'demo'"):
        recipes.get("dmo")
    with pytest.raises(ValueError, match=r"there are .*demo"):
        recipes.get("zzzzzz")


def test_a_file_changes_a_recipe_and_gives_it_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    (tmp_path / "longer.yaml").write_text(
        "recipe: demo\nset: {run_directory: runs/longer, stages.stage2.steps: 900}\n"
    )
    recipe = recipes.get("longer.yaml", ["seed=5"])
    assert (recipe.name, recipe.stage("stage2").steps, recipe.seed) == ("longer", 900, 5)
    assert recipe.run_directory == str(tmp_path / "runs" / "longer")
    assert recipe.stage("stage3") == recipes.get("demo").stage("stage3")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_files_that_come_with_the_project_fit(path, monkeypatch):
    monkeypatch.setenv("EUPE_HOME", str(ROOT))
    assert recipes.get(str(path.relative_to(ROOT))).name == path.stem


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no recipe there"),
        ("recipe: [", "is no YAML"),
        (b"recipe: d\xe9mo", "is no YAML"),
        ("recipe: demo", "wants `recipe: NAME` and `set:"),
        ("{recipe: demo, set: [seed=1]}", "wants `recipe: NAME` and `set:"),
        ("recipe: dmo\nset: {}", "did you mean 'demo'"),
        ("recipe: demo\nset: {stages.stage2.stepps: 3}", "did you mean 'steps'"),
        ("recipe: demo\nset: {stages.stage2.steps: few}", "steps"),
    ],
)
def test_a_file_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch, text, sentence):
    monkeypatch.setenv("EUPE_HOME", str(tmp_path))
    if text is not None:
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "mine.yaml").write_bytes(data)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the sentence is matched below)
        recipes.get("mine.yaml")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
