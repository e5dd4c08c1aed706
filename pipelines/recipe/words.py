"""How a command line names a recipe and its changes, said once for all commands."""

from typing import Annotated

import typer

_NAMED = typer.Argument(
    help="Name of a recipe, for instance [b]demo[/b], or a YAML file that changes one, for "
    "instance [b]recipes/own_images.yaml[/b]."
)
RecipeName = Annotated[str, _NAMED]
RecipeNameOrNone = Annotated[str | None, _NAMED]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a field of the recipe; may be given many times. Stages, teachers and data "
        "sets are addressed by name: [b]stages.stage2.optimizer.lr=1e-4[/b], "
        "[b]teachers.efficientnet_lite0.codec=float32[/b].",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
