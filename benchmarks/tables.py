"""What the command lines of benchmarks share: how they explain themselves, print and write."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

WIDTH = 1000
"""Of a pipe or a file, in signs: wider than any table wants to be."""

Row = dict[str, object]


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.<name>`, which knows --json."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, help="write the rows of the table here")
    return made


def console() -> Console:
    """Return stdout as a console, as wide as any table wants where it is a pipe or a file."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def show(
    rows: Sequence[Row], columns: Mapping[str, str], title: str, out: Console, path: Path | None
) -> None:
    """Print rows and, if a path is given, write them there.

    Where they are wider than the console numbers are folded, and text is not.

    Args:
        rows: each a name -> value.
        columns: name -> format of its values, "" of text; a row that lacks it leaves its cell
            empty.
        title: of the table.
        out: where it is printed.
        path: of a JSON file with all that is in the rows.
    """
    shown = Table(title=title)
    for column, form in columns.items():
        shown.add_column(column, justify="right", overflow="fold", no_wrap=not form)
    for row in rows:
        shown.add_row(*(format(row[c], form) if c in row else "" for c, form in columns.items()))
    out.print(shown)
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n")
