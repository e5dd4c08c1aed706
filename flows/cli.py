"""The `eupe` command line: caches, training, evaluation and the whole flow."""

from importlib import metadata
from typing import Annotated

import typer

from flows.commands import caches, doctor, models, plan, recipes, runs, sweeps
from pipelines.machines import interrupt, loopback
from pipelines.machines.errors import one_sentence

app = typer.Typer(
    name="eupe",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Relative paths of recipes are below $EUPE_HOME: the working folder unless set.",
)
app.add_typer(runs.app)
app.add_typer(models.app)
app.add_typer(plan.app)
app.add_typer(doctor.app)
app.add_typer(sweeps.app)
app.add_typer(caches.app, name="cache")
app.add_typer(recipes.app, name="recipes")


def print_version(asked: bool) -> None:
    """Print the version that is installed, and end."""
    if asked:
        print(metadata.version("eupe"))
        raise typer.Exit


@app.callback()
def eupe(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Take the options that come before a command."""


def main() -> None:
    """Run the command line: 0 done, 2 bad input (one sentence), 1 anything else (traceback)."""
    loopback.reach_directly()
    with interrupt.at_once(), one_sentence():
        app()


if __name__ == "__main__":
    main()
