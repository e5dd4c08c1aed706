"""Run configuration: overrides reach the field that was meant, everything else is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eupe.errors import BadInput
from pipelines.recipe import recipes
from pipelines.recipe.config import Recipe, SourceConfig
from pipelines.recipe.named import by_name
from pipelines.recipe.override import override, validated
from pipelines.recipe.stage import StageConfig


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return recipes.RECIPES["eupe_vitt16_tiny"]()


def test_no_override_changes_nothing(recipe):
    assert override(recipe, []) == recipe


@pytest.mark.parametrize(
    ("item", "value", "read"),
    [
        ("seed=7", 7, lambda r: r.seed),
        ("stages.stage2.steps=11", 11, lambda r: r.stage("stage2").steps),
        ("stages.stage2.optimizer.lr=1e-5", 1e-5, lambda r: r.stage("stage2").optimizer.lr),
        (
            "stages.stage2.optimizer.clip_norm=null",
            None,
            lambda r: r.stage("stage2").optimizer.clip_norm,
        ),
        (
            "stages.stage1.loss.gamma.efficientnet_lite0=2",
            {"efficientnet_lite0": 2.0},
            lambda r: r.stage("stage1").loss.gamma,
        ),
        (
            "teachers.efficientnet_lite2.codec=float32",
            "float32",
            lambda r: r.teachers["efficientnet_lite2"].codec,
        ),
        ("train.emoji-train.share=0.5", 0.5, lambda r: r.train["emoji-train"].share),
        ("views.crop_area=[0.2, 0.4]", (0.2, 0.4), lambda r: r.views.crop_area),
        (
            "student.encoder.model_arguments.depth=1",
            1,
            lambda r: r.student.encoder.model_arguments["depth"],
        ),
        ("run_directory=a=b", "a=b", lambda r: r.run_directory),
    ],
)
def test_an_override_reaches_its_field_and_no_other(recipe, item, value, read):
    changed = override(recipe, [item])
    assert read(changed) == value
    assert changed != recipe
    same = changed.model_dump()
    _restore(same, recipe.model_dump())
    assert validated(same) == recipe


def _restore(changed: object, original: object) -> int:
    """Put differing leaves back; fail if more than one branch differs."""
    count = 0
    pairs = (
        [(key, changed[key], original.get(key)) for key in changed]
        if isinstance(changed, dict) and isinstance(original, dict)
        else list(zip(range(len(changed)), changed, original, strict=True))
        if isinstance(changed, list | tuple) and len(changed) == len(original)
        else []
    )
    for key, ours, theirs in pairs:
        if ours != theirs:
            count += 1
            nested = isinstance(ours, dict) and isinstance(theirs, dict) and key != "gamma"
            if nested or (isinstance(ours, tuple) and ours and isinstance(ours[0], dict)):
                _restore(ours, theirs)
            else:
                changed[key] = theirs
    assert count <= 1
    return count


@pytest.mark.parametrize(
    ("item", "sentence"),
    [
        ("sed=1", "no field 'sed'; did you mean 'seed'?"),
        ("stages.stage2.step=1", "did you mean 'steps'?"),
        ("stages.stage9.steps=1", "no field 'stage9'"),
        ("teachers.efficientnet_lite7.codec=int8", "did you mean 'efficientnet_lite"),
        ("seed.deeper=1", "'seed' is a plain value"),
        ("stages.stage1.loss.gamma.new.deeper=1", "no field 'new'; there are none"),
        ("seed", "wants path.to.field=value"),
        ('seed="', "unexpected end of stream"),
        ("stages.stage2.steps=soon", "steps"),
        ("stages.stage2.steps=0", "greater than or equal to 1"),
        ("stages.stage2.steps=99999999999999999999", "less than or equal to"),
        ("num_views=1000000000", "less than or equal to"),
        ("stages.stage2.optimizer.lr=inf", "should be a finite number"),
        ("stages.stage1.loss.gamma.efficientnet_lite0=nan", "should be a finite number"),
        ("views.crop_area=[0.9, 0.1]", "wants 0 < low <= high"),
        (
            "stages.stage1.teacher_resolutions={efficientnet_lite0: [192]}",
            "every teacher needs its",
        ),
        (
            "stages.stage1.teacher_resolutions.efficientnet_lite0=[7]",
            "'efficientnet_lite0' is not cached at [7]",
        ),
        ("views={kind: centre, canvas: 64}", "a centre view has only view 0"),
        ("stages.stage2.warmup_steps=21", "warmup_steps = 21, steps = 20"),
        ("stages.stage1.loss.gamma.efficientnet_lite9=2", "['efficientnet_lite9']"),
        ("homogeneous.imagenet=0.1", "the train sets are ['emoji-train']"),
        ("homogeneous.emoji-train=1.5", "sum to at most 1"),
        ("evaluation.bank=[]", "evaluation.bank: "),
        ("evaluation.bank=[emoji-test]", "the train sets are ['emoji-train']"),
        ("lanes=3", "stage1: global_batch = 32 takes no equal part of each of 3 lanes"),
        ("held_out.name=emoji-train", "more than one data set of that name"),
    ],
)
def test_a_fault_is_one_sentence_that_names_it(recipe, item, sentence):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the sentence is matched below)
        override(recipe, [item])
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


# a whole recipe is validated each time
@given(st.text(max_size=30))
def test_whatever_is_typed_is_applied_or_refused(text):
    recipe = recipes.RECIPES["demo"]()
    try:
        override(recipe, [text])
    except ValueError:
        return
    assert "=" in text


def test_a_stage_is_found_by_name(recipe):
    assert isinstance(recipe.stage("stage2"), StageConfig)
    alone = recipe.model_copy(update={"stages": by_name(recipe.stages["stage1"])})
    with pytest.raises(ValueError, match="has no stage3; it has stage1"):
        alone.stage("stage3")


def test_every_fault_of_a_tree_is_listed():
    tree = recipes.RECIPES["demo"]().model_dump(mode="json")
    tree["seed"], tree["num_views"] = "x", 0
    with pytest.raises(ValueError, match=r"seed: .*; num_views: "):
        validated(tree)


def test_as_data_a_name_is_its_key_alone(recipe):
    tree = recipe.model_dump(mode="json")
    for field in ("train", "teachers", "stages"):
        assert tree[field], field
        assert all("name" not in item for item in tree[field].values())
        assert all(item.name == name for name, item in getattr(recipe, field).items())
    tree["stages"]["stage2"]["name"] = "stage2"
    with pytest.raises(ValueError, match="leave `name` out"):
        validated(tree)


def test_an_item_may_be_added_by_its_name(recipe):
    source = recipe.train["emoji-train"].source.model_dump(mode="json")
    more = override(recipe, [f"train.more={json.dumps({'source': source, 'share': 0.5})}"])
    assert list(more.train) == ["emoji-train", "more"]
    assert more.shares == {"emoji-train": 1.0, "more": 0.5}


def test_a_mapping_takes_the_place_of_the_one_that_was_there(recipe):
    source = recipe.train["emoji-train"].source.model_dump(mode="json")
    other = override(recipe, [f"train={json.dumps({'other': {'source': source}})}"])
    assert list(other.train) == ["other"]


def test_two_of_one_name_are_refused(recipe):
    stage = recipe.stage("stage2")
    with pytest.raises(ValueError, match=r"\['stage2'\]: more than one"):
        by_name(stage, stage)
    with pytest.raises(ValueError, match="stage3: holds an item named 'stage2'"):
        Recipe.model_validate({**dict(recipe), "stages": {"stage3": stage}})


@pytest.mark.parametrize("initial", ["stage2", "stage3"])
def test_a_stage_starts_from_one_that_is_trained_before_it(recipe, initial):
    assert override(recipe, ["stages.stage3.initial=stage2"]) is not None
    with pytest.raises(BadInput, match=f"stage2: initial names {initial}; .* trained before it"):
        override(recipe, [f"stages.stage2.initial={initial}"])


def test_fewer_steps_alone_keep_the_share_of_the_warm_up():
    whole = recipes.get("eupe_vitb16").stage("stage2")
    fewer = recipes.get("eupe_vitb16", ["stages.stage2.steps=500"]).stage("stage2")
    assert (fewer.steps, fewer.warmup_steps) == (500, 500 * whole.warmup_steps // whole.steps)
    room = recipes.get("eupe_vitb16", ["stages.stage2.steps=5000"]).stage("stage2")
    assert room.warmup_steps == whole.warmup_steps
    with pytest.raises(BadInput, match="warmup_steps = 600, steps = 500"):
        recipes.get("eupe_vitb16", ["stages.stage2.steps=500", "stages.stage2.warmup_steps=600"])


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("folder", "label_columns", ("category",)),
        ("folder", "classes", "tar"),
        ("webdataset", "key_column", "id"),
        ("parquet", "image_member", "jpg"),
    ],
)
def test_a_field_that_a_source_of_that_kind_would_drop_is_refused(kind, field, value):
    with pytest.raises(ValueError, match=f"x: {field} = .* is for .* sources; this one's kind"):
        SourceConfig(kind=kind, path="x", **{field: value})


def test_all_pixels_are_those_that_stages_show_their_students():
    demo = recipes.get("demo", ["stages.stage3.student_resolutions=[64,160]"])
    assert demo.pixel_scales == (48, 64, 96, 160)
    assert recipes.get("demo_stage2").pixel_scales == (96,)
    assert recipes.get("demo", ["pixels=[64]"]).pixel_scales == (64,)
    with pytest.raises(BadInput, match=r"pixels at \[65\]: no stage has a student at that scale"):
        recipes.get("demo", ["pixels=[64,65]"])
