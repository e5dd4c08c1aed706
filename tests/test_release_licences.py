"""A student's licence follows from its teachers' and its pictures'."""

from pathlib import Path

import pytest

from pipelines.recipe import recipes
from pipelines.release.licences import OTHER, Source, follows, sources


def verdict(*licences: str | None) -> tuple[str, str]:
    found = follows([Source("teacher", f"t{n}", each) for n, each in enumerate(licences)])
    return found.licence, found.words


def test_all_permissive_and_alike_is_that_licence():
    licence, words = verdict("Apache-2.0", "apache-2.0")
    assert licence == "apache-2.0"
    assert "may be used commercially" in words


def test_permissive_ones_of_several_kinds_have_no_one_name():
    licence, words = verdict("Apache-2.0", "MIT")
    assert licence == OTHER
    assert "apache-2.0, mit" in words


@pytest.mark.parametrize(
    "barred",
    [
        "CC-BY-NC-4.0",
        "cc-by-nc-sa-4.0",
        "FAIR Noncommercial Research License",
        "ImageNet terms of access: non-commercial research",
        "research only",
    ],
)
def test_one_that_is_not_commercial_makes_the_student_so(barred: str):
    licence, words = verdict("Apache-2.0", barred)
    assert licence == OTHER
    assert words.startswith(f"Not for commercial use: teacher t1 ({barred})")


@pytest.mark.parametrize("fine", ["MIT", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0", "ISC", "MIT-0"])
def test_a_permissive_one_is_not_taken_for_another(fine: str):
    assert "may be used commercially" in verdict(fine)[1]


def test_one_that_is_not_known_is_said_to_be_so():
    licence, words = verdict("Apache-2.0", None)
    assert licence == OTHER
    assert words.startswith("Not known: the licence of teacher t1")
    assert "commercially" not in words


def test_conditions_are_named():
    licence, words = verdict("MIT", "dinov3-license")
    assert licence == OTHER
    assert words == "Under conditions that are to be read: teacher t1 (dinov3-license)."


def test_all_three_are_said_at_once():
    _, words = verdict("cc-by-nc-4.0", None, "dinov3-license", "MIT")
    assert all(f"t{n}" in words for n in range(3))
    assert "t3" not in words


def test_the_demo_may_be_used_for_anything():
    found = sources(recipes.get("demo").model_dump(mode="json"))
    assert {each.name for each in found} == {
        "efficientnet_lite0",
        "efficientnet_lite2",
        "emoji-train",
    }
    assert follows(found).licence == "apache-2.0"


def test_the_papers_recipe_is_bound_by_its_pictures_and_timms_records():
    found = sources(recipes.get("eupe_vitb16").model_dump(mode="json"))
    licences = {each.name: each.licence for each in found}
    assert licences["dinov3_hplus"] == "dinov3-license"  # of timm's record
    assert licences["pe_core_g"] == "apache-2.0"
    assert licences["lvd1689m"] is None
    words = follows(found).words
    assert "Not for commercial use: pictures imagenet1k" in words
    assert "Not known: the licence of pictures lvd1689m" in words


def test_first_weights_count_and_teachers_that_no_stage_names_do_not(tmp_path: Path):
    recipe = recipes.get("demo").model_dump(mode="json")
    recipe["student"]["weights"] = "file:/home/me/mine.safetensors"
    recipe["stages"]["stage1"]["teachers"] = ["efficientnet_lite0"]
    found = {each.role: each for each in sources(recipe)}
    assert found["first weights of the student"].licence is None
    assert found["first weights of the student"].name == "file:mine.safetensors"
    assert "efficientnet_lite2" not in {each.name for each in sources(recipe)}
