"""What a label or a path says is printed as it is, never read as rich's markup."""

import io
import logging
from uuid import uuid4

import pytest
from prefect.cli.flow_runs_watching import FlowRunFormatter
from prefect.client.schemas.objects import Log
from prefect.logging.handlers import APILogHandler
from prefect.types._datetime import now
from rich.console import Console
from rich.errors import MarkupError

from eupe.errors import BadInput
from flows import artifacts
from flows.commands.printing import print_table
from pipelines.machines import progress

TEXT = "[/x] [red]y [bold"


def watched(message: str) -> str:
    """Return what `prefect deployment run ... --watch` prints of a log's line, by its own code."""
    log = Log(name="n", level=20, message=message, timestamp=now("UTC"), flow_run_id=uuid4())
    console = Console(file=io.StringIO(), highlight=False, width=200)
    console.print(FlowRunFormatter().format(log))
    return console.file.getvalue()


@pytest.mark.parametrize("runs", ["flow_runs", "task_runs"])
def test_brackets_in_a_flows_log_are_no_markup_to_whoever_watches(runs):
    logger = logging.getLogger(f"prefect.{runs}")
    with pytest.raises(MarkupError):  # why this is done; once it passes, it need not be
        watched(TEXT)
    (handler,) = (each for each in logger.handlers if isinstance(each, APILogHandler))
    error = BadInput(f"{TEXT}: no such folder")
    for record in (
        logger.makeRecord(logger.name, logging.INFO, __file__, 1, "%s", (TEXT,), None),
        logger.makeRecord(
            logger.name, logging.ERROR, __file__, 1, "failed: %r", (error,), (BadInput, error, None)
        ),
    ):
        logger.filter(record)
        assert TEXT in watched(handler.format(record))


def test_a_run_is_named_after_its_recipe_and_no_markup(monkeypatch):
    monkeypatch.setattr(artifacts.flow_run, "parameters", {"recipe": TEXT}, raising=False)
    assert TEXT in watched(artifacts.run_name("distill", "recipe")())


def test_brackets_in_what_a_bar_says_are_no_markup(monkeypatch):
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=200, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **named: console)
    with progress.track(2, TEXT) as step:
        step.note(f"{TEXT} noted")
        step.advance(2)
    assert TEXT in drawn.getvalue()
    assert f"{TEXT} noted" in drawn.getvalue()


def test_brackets_in_a_value_are_no_markup(capsys):
    print_table([{"name": "[/x] [red]y", "rows": 3}])
    assert "[/x] [red]y" in capsys.readouterr().out
