"""Each field of a recipe says what it is: identity or execution, what for, and what it may be."""

from collections.abc import Iterator
from typing import Annotated, Any, get_args

import pytest
from pydantic import BaseModel, Field

from cache.codec.known import OF_PATCHES
from pipelines.recipe import recipes
from pipelines.recipe.config import ExtractionConfig, Recipe, TeacherConfig
from pipelines.recipe.marks import (
    EXECUTION,
    IDENTITY,
    allowed,
    identity,
    leaves,
    mark_of,
    marks,
)
from pipelines.recipe.stage import StageConfig


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield every model that a type is made of, those inside its fields too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models(field.annotation)
    for part in get_args(annotation):
        yield from models(part)


MODELS = sorted(set(models(Recipe)), key=lambda each: each.__name__)
CONFIGURATIONS = [each for each in MODELS if each.__module__.startswith("pipelines.")]


def unmarked(model: type[BaseModel]) -> list[str]:
    """Return the fields that have no mark, and hold no configuration that has them."""
    return [
        name
        for name, field in model.model_fields.items()
        if (mark_of(field) is None) != bool(set(models(field.annotation)) & set(CONFIGURATIONS))
    ]


def test_all_models_are_found():
    assert {"Recipe", "StageConfig", "AugmentedView", "EncoderSpec"} <= {m.__name__ for m in MODELS}


@pytest.mark.parametrize("model", CONFIGURATIONS, ids=lambda model: model.__name__)
def test_every_field_has_one_mark(model):
    assert unmarked(model) == []


def test_a_field_without_a_mark_and_one_with_two_are_noticed():
    class Bare(BaseModel):
        field: int = 0

    class Both(BaseModel):
        field: Annotated[int, IDENTITY, EXECUTION] = 0

    assert unmarked(Bare) == ["field"]
    with pytest.raises(TypeError, match=r"Bare\.field is marked neither way"):
        list(leaves(Bare()))
    with pytest.raises(TypeError, match="identity and execution"):
        unmarked(Both)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_has_a_description(model):
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def plain_paths(node: object, path: str = "") -> Iterator[str]:
    """Yield the paths of plain data's leaves; an empty mapping is one."""
    if isinstance(node, dict) and node:
        for key, item in node.items():
            yield from plain_paths(item, f"{path}.{key}" if path else key)
    else:
        yield path


@pytest.mark.parametrize("name", ["demo", "demo_stage2", "eupe_vitb16"])
def test_the_walk_reaches_every_field(name):
    recipe = recipes.RECIPES[name]()
    found = [path for path, _ in marks(recipe)]
    wanted = list(plain_paths(recipe.model_dump(mode="json")))
    assert found == [path for path in wanted if path != "proxy" or recipe.proxy is not None]


def test_marks_are_those_of_the_declarations():
    found = dict(marks(recipes.RECIPES["eupe_vits16_tiny"]()))
    assert found["stages.stage2.optimizer.lr"] is IDENTITY
    assert found["proxy.encoder.model_arguments.depth"] is IDENTITY
    assert found["views.seed"] is IDENTITY
    assert found["stages.stage2.micro_batch"] is EXECUTION
    assert found["workers.count"] is EXECUTION


def test_identity_is_what_is_left_without_execution():
    stage = recipes.RECIPES["demo"]().stage("stage2")
    kept = identity(stage)
    assert set(plain_paths(kept)) == {path for path, mark in marks(stage) if mark is IDENTITY}
    other = stage.model_copy(update={"log_every": stage.log_every + 1, "compile": True})
    assert identity(other) == kept
    assert identity(stage.model_copy(update={"steps": stage.steps + 1})) != kept


@pytest.mark.parametrize(
    ("model", "field", "words"),
    [
        (ExtractionConfig, "actors", "a whole number, at least 1"),
        (ExtractionConfig, "rows_per_shard", "a whole number | null, at least 1"),
        (StageConfig, "precision", "float32 | bfloat16"),
        (StageConfig, "compile", "true | false | null"),
        (TeacherConfig, "codec", " | ".join(OF_PATCHES)),
        (StageConfig, "student_resolutions", "a list: a whole number, length at least 1"),
    ],
)
def test_allowed_values_are_said_in_words(model, field, words):
    declared = model.model_fields[field]
    assert allowed(declared.annotation, declared.metadata) == words


def test_bounds_are_said_wherever_they_stand():
    class Bounded(BaseModel):
        share: Annotated[float, EXECUTION] = Field(0.5, gt=0, lt=1)

    (leaf,) = leaves(Bounded())
    assert leaf.allowed == "a number, above 0, below 1"
