"""`eupe ablate`: a sweep of runs from one set of caches."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eupe.errors import BadInput
from flows.commands.printing import print_json, print_table
from pipelines.recipe.words import AsJson, Overrides

if TYPE_CHECKING:
    from pipelines.sweeps.graph import Graph
    from pipelines.sweeps.results import Compared

app = typer.Typer()


@app.command("ablate")
def ablate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A sweep file, YAML.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is there and what would be computed.")
    ] = False,
    only_table: Annotated[
        bool, typer.Option("--table", help="Compute nothing: the figures that are there.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run a base recipe under every setting of some axes, sharing all that is equal.

    Caches, stages and evaluations of all runs are one graph, in which equal ones are there once;
    what is there already is not computed again. The same command may run many times at once, on
    machines that share the folder: they share the work. What fails stops only what is made from
    it. [b]results.parquet[/b] beside the runs has every figure of every run, [b]results.html[/b]
    shows each setting beside raw pixels and the experts.
    """
    from pipelines.sweeps import describe, page, results, work
    from pipelines.sweeps.file import read, runs

    if dry_run and only_table:
        raise BadInput("--dry-run and --table: wants one of them")
    asked = runs(read(file), overrides or [])
    if dry_run:
        graph, found = describe.told(asked)
        if as_json:
            print_json(describe.plain(graph, found))
        else:
            print_table(describe.rows(found))
            print("\n".join(describe.lines(graph, found)))
        return
    if only_table:
        graph = describe.laid_out(asked)
        print_comparison(graph, results.compare(graph), as_json)
        return
    done = work.work(work.prepare(asked))
    print(results.write(done.graph), file=sys.stderr)
    print("\n".join(describe.ended(done)), file=sys.stderr)
    if results.has_base(done.graph):
        compared = results.compare(done.graph)
        print(page.write(done.graph, compared), file=sys.stderr)
        print_comparison(done.graph, compared, as_json)
    if done.failed:
        raise typer.Exit(1)


def print_comparison(graph: "Graph", found: "Sequence[Compared]", as_json: bool) -> None:
    """Print each setting beside the base, after raw pixels and the experts."""
    from dataclasses import asdict

    from pipelines.sweeps import results

    if as_json:
        print_json([asdict(each) for each in found])
    else:
        print_table(results.rows(found, results.rivals(graph)))
