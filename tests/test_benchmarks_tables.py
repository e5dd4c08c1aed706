"""The tables that benchmarks print: a name is read whole, however many columns stand beside it."""

import io

import pytest
from rich.console import Console

from benchmarks import tables

TEACHER, CODEC = "efficientnet_lite2", "grid0.5"
COLUMNS = {"teacher": "", "codec": "", **{f"measured_{number}": ",.1f" for number in range(12)}}
ROW: tables.Row = {"teacher": TEACHER, "codec": CODEC} | {
    name: 1_234_567.8 for name, form in COLUMNS.items() if form
}


def test_in_a_pipe_a_row_is_a_line(capsys):
    tables.show([ROW, ROW], COLUMNS, "title", tables.console(), None)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if TEACHER in line]
    assert len(rows) == 2
    for line in rows:
        assert CODEC in line
        assert line.count("1,234,567.8") == 12
    assert all(name in lines[2] for name in COLUMNS)
    assert not any(line.endswith(" ") for line in lines[1:])  # the table is as wide as it wants


@pytest.mark.parametrize("width", [80, 100, 140])
def test_in_a_narrow_terminal_numbers_are_folded_and_names_are_not(width):
    seen = io.StringIO()
    tables.show([ROW], COLUMNS, "title", Console(width=width, file=seen), None)
    (line,) = [line for line in seen.getvalue().splitlines() if TEACHER in line]
    assert CODEC in line
    assert "1,234,567.8" not in line
    assert len(line) <= width
