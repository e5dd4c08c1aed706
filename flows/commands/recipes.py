"""`eupe recipes`: each recipe with its size and cost, or every field of one."""

import json
import sys
from typing import Annotated

import typer

from eupe.errors import BadInput
from flows.commands.printing import print_json, print_table
from pipelines.recipe.words import AsJson, Overrides

app = typer.Typer(
    invoke_without_command=True,
    help="The recipes: their networks, sizes and costs, or one in full ([b]show[/b]).",
)


@app.callback()
def list_recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes: parameters and FLOPs of what each trains, the paper's figures beside."""
    if context.invoked_subcommand is not None:
        return
    from pipelines.recipe import catalogue

    found = catalogue.entries()
    if as_json:
        print_json([catalogue.plain(each) for each in found])
    else:
        print_table(catalogue.table(found))


@app.command("show")
def show(
    recipe: Annotated[
        str, typer.Argument(help="Name of a recipe; [b]eupe recipes[/b] lists them.")
    ],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print every field of a recipe: its value, what it is for, what it may be, where it is from.

    [b]paper[/b]: stated there. [b]paper: X[/b]: stated there as X, and changed here.
    [b]assumed[/b]: ours, since the paper does not say. [b]execution[/b]: where and how fast the
    run works, never what it learns.

    Last come bytes and hours, where it is known how many pictures there are: [b]eupe plan[/b].

    What cannot be built, by whatever machine, is refused; pictures that are not here are said.
    """
    from pipelines.caching import beforehand, planning
    from pipelines.recipe import paper, recipes

    asked = recipes.get(recipe, overrides or [])
    beforehand.check_networks(asked)
    try:
        beforehand.check_sources(asked)
    except BadInput as error:  # of this machine, not of the recipe
        print(error, file=sys.stderr)
    settings = paper.settings(asked)
    if as_json:
        print_json([setting._asdict() for setting in settings])
        return
    print_table(
        [
            {
                "field": each.path,
                "value": json.dumps(each.value),
                "description": each.description,
                "allowed": each.allowed,
                "origin": each.origin,
            }
            for each in settings
        ]
    )
    print(planning.in_short(asked))
