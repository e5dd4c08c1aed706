"""`eupe recipes`: each recipe with its size and cost; `eupe recipes show`: each field's origin."""

import json
import sys

import pytest
from prefect.utilities.callables import parameter_schema

from flows.cli import main
from flows.teacher_cache import teacher_cache
from pipelines.recipe import catalogue, paper, recipes
from pipelines.recipe.catalogue import Entry

PARAMETERS_MILLIONS = {  # timm's encoders without classifier
    "eupe_vitt16": 5.49,
    "eupe_vits16": 21.60,
    "eupe_vitb16": 85.66,
    "eupe_convnext_tiny": 27.82,
    "eupe_convnext_small": 49.45,
    "eupe_convnext_base": 87.57,
}
GFLOPS_ROUNDING = 1.0  # the paper prints whole GFLOPs, rounded up here and down there


def eupe(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr(sys, "argv", ["eupe", "recipes", *words])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr()
    assert left.value.code == 0, printed.err
    return printed.out


@pytest.fixture(scope="module")
def entries() -> dict[str, Entry]:
    return {each.recipe: each for each in catalogue.entries()}


@pytest.mark.slow
def test_the_list_names_every_recipe_once(entries):
    assert list(entries) == list(recipes.RECIPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS_MILLIONS)
def test_the_six_students_have_timms_parameters_with_the_papers_beside(entries, name):
    found = entries[name]
    assert round(found.parameters / 1e6, 2) == PARAMETERS_MILLIONS[name]
    assert found.published == paper.PUBLISHED[name]
    assert (found.resolution, found.stages) == (256, ("stage1", "stage2", "stage3"))


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS_MILLIONS)
def test_costs_are_the_printed_ones_as_each_kind_is_counted(entries, name):
    found = entries[name]
    times = 1 if found.published.counts_multiply_adds else 2
    ours = times * found.multiply_adds / 1e9
    assert abs(ours - found.published.gflops_256) < GFLOPS_ROUNDING


@pytest.mark.slow
def test_the_proxy_has_its_1_9_billion(entries):
    assert round(entries["proxy_vitg"].parameters / 1e9, 1) == 1.9
    assert entries["proxy_vitg"].stages == ("stage1",)


@pytest.mark.slow
def test_the_table_shows_ours_and_the_papers_in_one_row(entries):
    rows = {row["recipe"]: row for row in catalogue.table(list(entries.values()))}
    shown = rows["eupe_convnext_base"]
    assert (shown["M parameters"], shown["published"]) == ("87.57", "89")
    assert shown["published GFLOPs"] == "20 (multiply-adds)"
    assert rows["eupe_vitb16"]["published GFLOPs"] == "47"
    assert rows["eupe_vitb16_tiny"]["published"] == ""  # a twin's figures are not the paper's


@pytest.mark.slow
def test_the_command_prints_the_list(entries, monkeypatch, capsys):
    kept = {name: recipes.RECIPES[name] for name in ("demo", "proxy_vitg_tiny")}
    monkeypatch.setattr(recipes, "RECIPES", kept)  # counting all of them again takes seconds
    found = json.loads(eupe(monkeypatch, capsys, "--json"))
    wanted = json.loads(json.dumps([catalogue.plain(entries[name]) for name in kept]))
    assert found == wanted
    table = eupe(monkeypatch, capsys)
    assert all(name in table for name in kept)
    assert f"{entries['demo'].parameters / 1e6:.2f}" in table


@pytest.mark.slow
def test_show_marks_each_field_with_its_origin(monkeypatch, capsys):
    words = ["show", "eupe_vitb16", "--set", "stages.stage2.optimizer.lr=1e-4", "--json"]
    found = {each["path"]: each for each in json.loads(eupe(monkeypatch, capsys, *words))}
    assert found["stages.stage2.global_batch"]["origin"] == "paper"
    assert found["student.encoder.architecture"]["origin"] == "paper"
    assert found["stages.stage1.steps"]["origin"] == "assumed"
    assert found["stages.stage1.micro_batch"]["origin"] == "execution"
    changed = found["stages.stage2.optimizer.lr"]
    assert (changed["value"], changed["origin"]) == (1e-4, "paper: 2e-05")


@pytest.mark.parametrize("name", PARAMETERS_MILLIONS)
def test_each_students_architecture_is_the_papers_in_twins_too(name):
    for recipe in (name, f"{name}_tiny"):
        origins = {each.path: each.origin for each in paper.settings(recipes.get(recipe))}
        assert origins["student.encoder.architecture"] == "paper"


def test_show_prints_the_whole_recipe(monkeypatch, capsys):
    table = eupe(monkeypatch, capsys, "show", "demo")
    settings = paper.settings(recipes.get("demo"))
    assert [each.path for each in settings if each.path not in table] == []
    assert len(settings) > 100


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "eupe_vitb"], "did you mean 'eupe_vitb16'"),
        (["show", "demo", "--set", "num_viewz=2"], "did you mean 'num_views'"),
        (["show"], "Missing argument"),
    ],
)
def test_bad_input_is_a_sentence(words, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eupe", "recipes", *words])
    with pytest.raises(SystemExit) as left:
        main()
    printed = capsys.readouterr()
    assert (left.value.code, printed.out) == (2, "")
    assert says in printed.err


def test_prefects_form_names_every_field_of_a_recipe():
    schema = parameter_schema(teacher_cache.fn).model_dump()["properties"]["overrides"]
    shown = schema["items"]["description"]
    for path in ("seed", "stages.NAME.optimizer.lr", "stages.NAME.teacher_resolutions.NAME"):
        assert f"- `{path}`: " in shown
    assert "(float32 | bfloat16)" in shown  # what a field may be
    assert shown.count("\n") + 1 == len(set(shown.splitlines()))
