"""What commands print: one JSON document, or a table."""

import json
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text


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
        # As text: what a value holds in brackets is no markup.
        table.add_row(*(Text(f"{v:,}" if isinstance(v, int) else str(v)) for v in row.values()))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
