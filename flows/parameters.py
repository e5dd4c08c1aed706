"""The parameters of flows: a recipe by name, and overrides of its fields."""

from typing import Annotated

from pydantic import Field

from pipelines.recipe.override import Override

RecipeName = Annotated[
    str, Field(description="name of a recipe, or a YAML file that changes one", examples=["demo"])
]
Overrides = Annotated[
    list[Override],
    Field(
        description="fields to change, path.to.field=value; stages, teachers and train sets are "
        "addressed by name",
        examples=[["stages.stage2.optimizer.lr=1e-4", "extraction.actors=2"]],
    ),
]
