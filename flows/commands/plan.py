"""`eupe plan`: what a recipe's caches and stages will take, before they take it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.commands.printing import print_json, print_table
from pipelines.recipe.words import AsJson, Overrides

if TYPE_CHECKING:
    from pipelines.caching.outlook import Outlook

app = typer.Typer()


@app.command("plan")
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a recipe, [b]eupe recipes[/b] lists them; a YAML file that changes one; "
            "or a sweep file, of [b]eupe ablate[/b]."
        ),
    ],
    images: Annotated[
        list[str] | None,
        typer.Option(
            help="Pictures of a set that is not indexed here: NAME=N, or N for the train sets.",
            show_default=False,
        ),
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="Views a sample: num_views.", min=1, show_default=False)
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(help="Codec of all teachers, the proxy too.", show_default=False),
    ] = None,
    gpus: Annotated[
        str, typer.Option(help="NAME:NUMBER of accelerators: a100, h100, h200, b200 or l40s.")
    ] = "h100:8",
    bandwidth: Annotated[
        float | None,
        typer.Option(help="GB a second that a node reads.", min=0.001, show_default=False),
    ] = None,
    disk: Annotated[
        float | None,
        typer.Option(
            help="TB for caches. Left out: what is free at the cache root.",
            min=0,
            show_default=False,
        ),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="YAML file of prices and other rates.", show_default=False),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Time decoding, and a build of some hundred pictures of each set.",
        ),
    ] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw cost against runs, SVG or PNG.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say what will be drawn and built, in bytes, hours and money, cached beside live.

    Of a sweep: of all its runs together, what they share once; a run is then all of its stages.

    Bytes and FLOPs follow from the recipe. Hours and money rest on rates, each with its source
    ([b]--json[/b] lists them), and are marked so.
    """
    from pipelines.caching import planning, rates
    from pipelines.recipe import recipes
    from pipelines.recipe.override import override
    from pipelines.sweeps import file

    said = overrides or []
    assumed = rates.Rates() if prices is None else rates.read(prices)
    if bandwidth is not None:
        assumed = assumed.model_copy(update={"disk_bytes": bandwidth * 1e9})
    machine = rates.machine(gpus)
    path = recipes.home() / recipe
    if file.is_sweep(path):
        from pipelines.sweeps import describe, planned  # all of the evaluation

        sweep = file.read(path)
        asked = file.runs(sweep, said)[0].recipe
        graph = describe.laid_out(file.runs(sweep, [*said, *planning.changes(asked, views, codec)]))
        told = planned.of_graph(graph, assumed, planning.sizes(asked, images or []))
        found = planning.on_machine(told, asked, machine, assumed, disk, measure)
    else:
        asked = recipes.get(recipe, said)
        asked = override(asked, planning.changes(asked, views, codec))
        found = planning.outlook(asked, images or [], machine, assumed, disk, measure)
    if figure is not None:
        found.draw(figure)
    if as_json:
        print_json(found.plain())
        return
    show(found)


def show(found: "Outlook") -> None:
    """Print a plan as tables and sentences."""
    from pipelines.caching import outlook

    print_table(outlook.lines(found.stores()))
    print_table(outlook.lines(found.stages()))
    print_table(
        [{"what": name, "figure": outlook.shown(each)} for name, each in found.totals().items()]
    )
    for sentence in (*found.misfits(), *found.plan.notes, outlook.LEGEND):
        print(sentence)
