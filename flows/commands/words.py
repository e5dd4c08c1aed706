"""The words that commands share: a recipe, its changes, JSON or a table."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

RecipeName = Annotated[
    str,
    typer.Argument(
        help="Name of a recipe, for instance [b]demo[/b], or a YAML file that changes one, for "
        "instance [b]recipes/own_images.yaml[/b]."
    ),
]
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


def print_json(value: object) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2))


def print_table(rows: Sequence[Mapping[str, object]]) -> None:
    """Print plain rows, all with the same columns, as a table on stdout."""
    table = Table()
    for place, (name, value) in enumerate(rows[0].items()):
        table.add_column(
            name,
            justify="right" if isinstance(value, int | float) else "left",
            no_wrap=place == 0,  # what names a row stays whole, however narrow the screen
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
