"""The paper's recipes: complete, marked, and each with a twin that two cores can run."""

import pytest

from pipelines.recipe import family, paper
from pipelines.recipe.config import Recipe
from pipelines.recipe.override import override, validated

RECIPES = [*(family.full(name) for name in family.STUDENTS), family.proxy()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_stated_number_is_in_the_recipe(recipe: Recipe) -> None:
    origins = {setting.path: setting.origin for setting in paper.settings(recipe)}
    stated = {path for path in paper.STATED if path in origins}
    assert {origins[path] for path in stated} == {"paper"}
    if recipe.name != "proxy_vitg":
        assert stated == set(paper.STATED)


def test_a_changed_number_is_marked_with_the_papers() -> None:
    changed = override(family.full("eupe_vitb16"), ["stages.stage2.optimizer.lr=1e-4"])
    origins = {setting.path: setting.origin for setting in paper.settings(changed)}
    assert origins["stages.stage2.optimizer.lr"] == "paper: 2e-05"
    assert origins["stages.stage2.optimizer.betas"] == "assumed"
    assert origins["extraction.actors"] == "execution"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_twins_are_whole_recipes(recipe: Recipe) -> None:
    twin = family.tiny(recipe)
    assert validated(twin.model_dump(mode="json")) == twin
    assert list(twin.stages) == list(recipe.stages)
    assert twin.name == f"{recipe.name}_tiny"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_features_are_small_and_stages_of_the_smallest_scale_decode_nothing(recipe) -> None:
    """As the figures of the planner have it (docs/log.md): float16 is four times the disk."""
    for each in (recipe, family.tiny(recipe)):
        codecs = {each.proxy_codec, *(teacher.codec for teacher in each.teachers.values())}
        assert codecs == {"rot4"}
        stages = [stage for name, stage in each.stages.items() if name != "stage3"]
        assert {scale for stage in stages for scale in stage.student_resolutions} == {
            *each.pixel_scales
        }


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ("stages.stage2.optimizer.lrr=1", "did you mean 'lr'"),
        ("stages.stage4.steps=1", "did you mean 'stage"),
        ("seed", "path.to.field=value"),
        ("stages.stage2.steps=many", "valid integer"),
        ("seed.low=1", "plain value"),
    ],
)
def test_a_typo_in_an_override_is_one_sentence(item: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        override(family.full("eupe_vitt16"), [item])


def test_values_of_overrides_are_yaml() -> None:
    recipe = override(
        family.full("eupe_vitt16"),
        ["stages.stage2.optimizer.lr=1e-5", "stages.stage2.loss.gamma.proxy=0.5", "num_views=3"],
    )
    stage = recipe.stage("stage2")
    assert (stage.optimizer.lr, stage.loss.gamma, recipe.num_views) == (1e-5, {"proxy": 0.5}, 3)
