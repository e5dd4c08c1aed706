"""What a flow shows in Prefect: the progress of its long steps, tables of results, why it failed.

`prefect deployment run ... --watch` shows a run's log as it comes, in which are the lines of its
steps, and of an artifact only that there is one: artifacts are few, and tables are logged too.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from uuid import UUID

from prefect import get_run_logger
from prefect.artifacts import (
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run
from rich.markup import escape

from pipelines.machines import once
from pipelines.machines.errors import bad_input
from pipelines.machines.progress import Reading, set_listener

LONG_SECONDS = 5.0
"""A step that ends before leaves no artifact."""
PERCENT = 10.0
"""Of a step, between two readings of its artifact."""
PAUSE = 10
"""A server that is gone costs at most one part in so many of the work's time."""


@contextmanager
def progress(key: str) -> Iterator[None]:
    """Show every long step that is tracked inside the block as a progress artifact, by tenths.

    Prefect's client asks a server that is gone again for a minute before it gives up, and the work
    waits for it: after a failure nothing is told for PAUSE times as long as that took.

    Args:
        key: of the artifacts; lower-case letters, digits and dashes.
    """
    shown: dict[str, UUID] = {}
    told: dict[str, float] = {}
    silent_until: float | None = None

    def listen(reading: Reading) -> None:
        nonlocal silent_until
        started = time.monotonic()
        if silent_until is not None and started < silent_until:
            return
        try:
            show(reading)
        except Exception as error:  # what is shown must not stop what is done
            if silent_until is None:
                print(f"Prefect does not take the progress of {key}: {error!r}", file=sys.stderr)
            now = time.monotonic()
            silent_until = now + PAUSE * (now - started)

    def show(reading: Reading) -> None:
        if not reading.total:
            return
        name = reading.description
        percent = min(100.0, 100.0 * reading.done / reading.total)
        soon = reading.seconds < LONG_SECONDS or percent - told.get(name, 0.0) < PERCENT
        if soon and not reading.finished:
            return
        if reading.seconds < LONG_SECONDS:
            return
        if reading.description in shown:
            update_progress_artifact(shown[reading.description], percent, description=str(reading))
        else:
            created = create_progress_artifact(percent, key=key, description=str(reading))
            assert isinstance(created, UUID)  # a coroutine in an event loop, which this is not
            shown[reading.description] = created
        told[name] = percent

    set_listener(listen)
    try:
        yield
    finally:
        set_listener(None)


def table(key: str, rows: Sequence[Mapping[str, object]], description: str) -> None:
    """Leave a table of plain rows with the flow's run."""
    create_table_artifact([dict(row) for row in rows], key=key, description=description)
    lines = ["  ".join(str(value) for value in row.values()) for row in rows]
    get_run_logger().info("\n".join([description, "  ".join(rows[0]) if rows else "", *lines]))


def _in_short(record: logging.LogRecord) -> bool:
    """Make what Prefect logs of bad input its sentence; a bug keeps its traceback.

    Returns:
        False for what the run's own state says once more, and for a sentence that was said: a task,
        its flow and the engine around it each log the same error. A process is of one run.
    """
    if record.getMessage().startswith("Finished in state"):
        return False
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if error is not None and (sentence := bad_input(error)) is not None:
        if not once.first(sentence):
            return False
        record.msg, record.args, record.exc_info = sentence, (), None
    return True


class _AsText(logging.Formatter):
    """Says a record so that whoever prints it as rich's markup, as `--watch` does, prints its text.

    A folder's name or a label may look like a tag: an unopened one that closes ends the watching.
    On Prefect's page such a text has a backslash before its bracket.
    """

    def format(self, record: logging.LogRecord) -> str:
        return escape(super().format(record))


def run_name(flow: str, parameter: str) -> Callable[[], str]:
    """Return what names a run of a flow: after a parameter of it, which may look like markup."""
    return lambda: escape(f"{flow} {flow_run.parameters[parameter]}")


for _name in ("prefect.flow_runs", "prefect.task_runs"):
    _logger = logging.getLogger(_name)
    _logger.addFilter(_in_short)
    for _handler in _logger.handlers:
        if isinstance(_handler, APILogHandler):
            _handler.setFormatter(_AsText())
