"""A recipe as flows and commands take it: by name, with overrides."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from pipelines.config import Override, Recipe, override

RecipeName = Annotated[str, Field(description="name of a recipe", examples=["demo"])]
Overrides = Annotated[
    list[Override],
    Field(
        description="fields to change, path.to.field=value; stages, teachers and train sets are "
        "addressed by name",
        examples=[["stages.stage2.steps=50", "extraction.actors=2"]],
    ),
]


def chosen(recipe: str, overrides: Sequence[str]) -> Recipe:
    """Return the named recipe with its overrides applied and checked.

    Raises:
        ValueError: no such recipe or field (naming the nearest), or a value that does not fit.
    """
    from pipelines import recipes

    return override(recipes.get(recipe), overrides)
