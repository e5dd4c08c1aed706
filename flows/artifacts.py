"""What a flow shows in Prefect: the progress of its long steps, and tables of results."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import (
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from pipelines.machines.progress import Reading, set_listener

PAUSE = 10
"""A server that is gone costs at most one part in so many of the work's time."""


@contextmanager
def progress(key: str) -> Iterator[None]:
    """Show every step that is tracked inside the block as a progress artifact.

    Prefect's client asks a server that is gone again for a minute before it gives up, and the work
    waits for it: after a failure nothing is told for PAUSE times as long as that took.

    Args:
        key: of the artifacts; lower-case letters, digits and dashes.
    """
    shown: dict[str, UUID] = {}
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
        percent = min(100.0, 100.0 * reading.done / reading.total)
        if reading.description in shown:
            update_progress_artifact(shown[reading.description], percent, description=str(reading))
        else:
            created = create_progress_artifact(percent, key=key, description=str(reading))
            assert isinstance(created, UUID)  # a coroutine in an event loop, which this is not
            shown[reading.description] = created

    set_listener(listen)
    try:
        yield
    finally:
        set_listener(None)


def table(key: str, rows: Sequence[Mapping[str, object]], description: str) -> None:
    """Leave a table of plain rows with the flow's run."""
    create_table_artifact([dict(row) for row in rows], key=key, description=description)
