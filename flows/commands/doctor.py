"""`eupe doctor`: whether everything is there that a recipe will want."""

from dataclasses import asdict
from typing import Annotated

import typer

from flows.commands.printing import print_json
from pipelines.recipe.words import AsJson, Overrides, RecipeName

app = typer.Typer()


@app.command("doctor")
def doctor(
    recipe: RecipeName = "demo",
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Ask every node of the Ray that RAY_ADDRESS names, too."),
    ] = False,
    gpus: Annotated[
        str | None,
        typer.Option(
            help="NAME:NUMBER of accelerators that the disk has to feed, as of [b]eupe plan[/b]. "
            "Left out: those of this machine.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Look for what would stop or slow a recipe, before it is begun.

    One line a finding: what is wrong, why it matters, what to do. Exit code 1 if there is any.

    Looked at are the recipe itself, room and speed of the disk against the plan, weights with
    their digests and licences, versions and view digests of all nodes, tokens, proxies, shared
    memory, open files, shared folders and data sources. Small files are written for a moment into
    the cache root and the run directory; nothing else is changed.
    """
    from pipelines.recipe import recipes

    asked = recipes.get(recipe, overrides or [])
    from pipelines.doctor import facts, findings

    gathered = facts.gather(asked, cluster, gpus)
    found = findings.judge(gathered)
    if as_json:
        print_json(
            {
                "findings": [each._asdict() for each in found],
                "looked_at": findings.looked_at(gathered),
                "machines": [asdict(node) for node in (gathered.here, *gathered.nodes)],
                "licences": dict(gathered.licences),
            }
        )
    elif found:
        print("\n".join(map(str, found)))
    else:
        print(f"nothing found; looked at {findings.looked_at(gathered)}")
    if found:
        raise typer.Exit(1)
