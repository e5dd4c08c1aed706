"""Where benchmarks print: the terminal, or a file wide enough for their tables."""

import sys

from rich.console import Console

WIDTH = 140


def console() -> Console:
    """Return stdout as a console that cuts no column when it is a pipe or a file."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)
