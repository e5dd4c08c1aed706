"""Nothing that somebody says is dropped: it is used, or refused."""

import ast
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from test_recipe_marks import models

from eupe.errors import BadInput
from pipelines import stages
from pipelines.recipe import recipes
from pipelines.recipe.config import Recipe
from pipelines.sweeps.file import Sweep

ROOT = Path(__file__).parents[1]
ROOMS = ("eupe", "cache", "pipelines", "flows")
MODELS = sorted({*models(Recipe), *models(Sweep)}, key=lambda each: each.__name__)
"""What recipe and sweep files say, field by field."""
EAGER = {"version"}
"""Options that a callback of their own deals with."""


def trees() -> Iterator[ast.Module]:
    for file in chain.from_iterable((ROOT / room).rglob("*.py") for room in ROOMS):
        yield ast.parse(file.read_text())


def read_of(tree: ast.AST) -> set[str]:
    """Return the names of all attributes that some code reads."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def unread(model: type[BaseModel], read: set[str]) -> list[str]:
    """Return the fields that nobody reads, though they may have more than one value."""
    return [
        name
        for name, field in model.model_fields.items()
        if name not in read
        and not (get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1)
    ]


def ignored(function: ast.FunctionDef) -> set[str]:
    """Return the parameters that a function never looks at; `super()` looks at the first."""
    arguments = [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
    body = chain.from_iterable(map(ast.walk, function.body))
    seen = {node.id for node in body if isinstance(node, ast.Name)}
    return set(arguments) - seen - set(arguments[:1] if "super" in seen else [])


@pytest.fixture(scope="module")
def read() -> set[str]:
    return set().union(*map(read_of, trees()))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_read_somewhere(model, read):
    assert unread(model, read) == []


def test_a_field_that_nobody_reads_is_noticed(read):
    class Idle(BaseModel):
        steps: int
        nobody_reads_this: int
        kind: Literal["one"] = "one"

    assert unread(Idle, read) == ["nobody_reads_this"]


def test_no_command_and_no_flow_ignores_what_it_takes():
    functions = {
        (function.name, file.stem): ignored(function) - EAGER
        for file in (*(ROOT / "flows").rglob("*.py"), Path(stages.__file__))
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
    }
    assert {("evaluate", "runs"), ("distill", "distill"), ("train", "stages")} <= {*functions}
    assert {each: names for each, names in functions.items() if names} == {}


def test_a_parameter_that_is_ignored_is_noticed():
    (function,) = ast.parse("def f(a, b, *, c=1): return a + (lambda b: c)(1)").body
    assert ignored(function) == {"b"}


@pytest.mark.parametrize(
    ("recipe", "item", "says"),
    [
        ("demo", "held_out.share=2", "held_out.share = 2: that set fills no part of a batch"),
        ("demo", "held_out.num_views=2", "held_out.num_views = 2: that set has one centre view"),
        (
            "demo_stage2",
            "proxy_codec=rot4",
            "override 'proxy_codec': recipe demo_stage2 has no proxy",
        ),
        ("demo_stage2", "proxy_resolutions=[64]", "'proxy_resolutions': recipe demo_stage2 has no"),
    ],
)
def test_a_field_that_this_recipe_has_no_use_for_is_refused(recipe, item, says):
    with pytest.raises(BadInput, match=says):
        recipes.get(recipe, [item])
