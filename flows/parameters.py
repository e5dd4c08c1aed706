"""The parameters of flows: a recipe by name, and overrides of its fields."""

from typing import Annotated

from pydantic import Field

from pipelines.recipe import paper, recipes
from pipelines.recipe.override import FREE, NAMED, Override


def fields() -> str:
    """Return a line for every field of a recipe: its path, what it is for, what it may be.

    Prefect shows it in its form, where `eupe recipes show` is not at hand.
    """
    lines = dict[str, str]()
    for setting in paper.settings(recipes.get("demo", [])):
        parts = setting.path.split(".")
        chosen = [n > 0 and (parts[:n] in NAMED or parts[n - 1] in FREE) for n in range(len(parts))]
        path = ".".join(
            "NAME" if by_user else part for part, by_user in zip(parts, chosen, strict=True)
        )
        lines.setdefault(path, f"- `{path}`: {setting.description} ({setting.allowed})")
    return "\n".join(lines.values())


RecipeName = Annotated[
    str, Field(description="name of a recipe, or a YAML file that changes one", examples=["demo"])
]
Overrides = Annotated[
    list[Annotated[Override, Field(description=fields())]],
    Field(examples=[["stages.stage2.optimizer.lr=1e-4", "extraction.actors=2"]]),
]
"""Prefect takes a parameter's own description from the flow's docstring."""
