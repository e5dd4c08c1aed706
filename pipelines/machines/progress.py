"""Progress of long steps: a rich bar on a terminal, plain lines elsewhere, and one listener.

A process whose output somebody relays (a Ray job, say) reports records instead, when EUPE_PROGRESS
is "records"; `Relay` on the other side shows them as if the step ran there. With "none" it shows
nothing: it is one of several that do the same step, and another process shows it for all.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

LINE_EVERY_SECONDS = 10.0
LISTEN_EVERY_SECONDS = 1.0
RECORD = "@progress "
"""Start of a line that is a record: a Reading as JSON follows."""


@dataclass(frozen=True)
class Reading:
    """How far a step has come.

    Attributes:
        description: what is being done.
        unit: what is counted, plural ("images").
        done: units finished.
        total: units wanted; None when not known beforehand.
        seconds: wall time since the start.
        finished: the step has ended, well or not.
        note: what the step last said of itself: losses, say.
        before: units that an earlier start had finished, counted in `done`.
    """

    description: str
    unit: str
    done: int
    total: int | None
    seconds: float
    finished: bool = False
    note: str = ""
    before: int = 0

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return (self.done - self.before) / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the end at the present rate; None when it cannot be told."""
        if self.total is None or self.rate == 0:
            return None
        return max(self.total - self.done, 0) / self.rate

    def __str__(self) -> str:
        total = "" if self.total is None else f"/{self.total}"
        text = f"{self.description}: {self.done}{total} {self.unit}, {self.rate:.1f} {self.unit}/s"
        if self.finished:
            text += f", {self.seconds:.1f} s"
        elif self.eta_seconds is not None:
            text += f", {self.eta_seconds:.0f} s left"
        return f"{text}; {self.note}" if self.note else text


Listener = Callable[[Reading], None]
_listener: ContextVar[Listener | None] = ContextVar("progress_listener", default=None)


def set_listener(listener: Listener | None) -> None:
    """Tell `listener` of every step tracked in this context, at most once a second.

    The setting belongs to the calling context (thread, task), not to the process.
    """
    _listener.set(listener)


class Progress:
    """Counts units; made by `track`."""

    def __init__(
        self, description: str, unit: str, total: int | None, before: int, shown: Listener
    ) -> None:
        self._description, self._unit, self._total = description, unit, total
        self._before = self._done = before
        self._started, self._note = time.monotonic(), ""
        self._shown, self._listener, self._told = shown, _listener.get(), -LISTEN_EVERY_SECONDS

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self._done += count
        self._tell(self.reading())

    def note(self, text: str) -> None:
        """Say something of the step, shown from its next count on."""
        self._note = text

    def reading(self, finished: bool = False) -> Reading:
        """Return how far the step has come."""
        seconds = time.monotonic() - self._started
        return Reading(
            self._description,
            self._unit,
            self._done,
            self._total,
            seconds,
            finished,
            self._note,
            self._before,
        )

    def finish(self) -> None:
        """Tell everyone of the last reading."""
        self._tell(self.reading(finished=True))

    def _tell(self, reading: Reading) -> None:
        self._shown(reading)
        due = reading.seconds - self._told >= LISTEN_EVERY_SECONDS
        if self._listener is not None and (due or reading.finished):
            self._told = reading.seconds
            self._listener(reading)


@contextmanager
def track(
    total: int | None, description: str, unit: str = "images", before: int = 0
) -> Iterator[Progress]:
    """Show the progress of one long step on stderr: a bar, or a line every ten seconds.

    Args:
        total: units the whole step takes; None when not known.
        description: what is being done.
        unit: what is counted, plural.
        before: units of the total that an earlier start has done.

    Yields:
        a `Progress` whose `advance(n)` counts; call it from one thread.
    """
    with _shown(total, description, unit) as shown:
        progress = Progress(description, unit, total, before, shown)
        try:
            yield progress
        finally:
            progress.finish()


class Relay:
    """Shows here what another process prints: its lines as they are, its records as progress.

    Args:
        say: called with each ordinary line, its newline included.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say, self._listener, self._rest = say, _listener.get(), ""
        self._steps: dict[str, tuple[ExitStack, Listener]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._rest:
            self._line(self._rest)
        for stack, _ in self._steps.values():  # the other process ended in the middle of them
            stack.close()

    def feed(self, chunk: str) -> None:
        """Take the next piece of the other process's output, cut anywhere."""
        *lines, self._rest = (self._rest + chunk).split("\n")
        for line in lines:
            self._line(line + "\n")

    def _line(self, line: str) -> None:
        reading = _reading(line)
        if reading is None:
            self._say(line)
        else:
            self._show(reading)

    def _show(self, reading: Reading) -> None:
        if reading.description not in self._steps:
            stack = ExitStack()
            shown = stack.enter_context(_shown(reading.total, reading.description, reading.unit))
            self._steps[reading.description] = (stack, shown)
        stack, shown = self._steps[reading.description]
        shown(reading)
        if self._listener is not None:
            self._listener(reading)
        if reading.finished:
            stack.close()
            del self._steps[reading.description]


def _reading(line: str) -> Reading | None:
    """Parse a record; None for any other line, and a record that somebody else printed into."""
    if not line.startswith(RECORD):
        return None
    try:
        return Reading(**json.loads(line.removeprefix(RECORD)))
    except (ValueError, TypeError):
        return None


@contextmanager
def _shown(total: int | None, description: str, unit: str) -> Iterator[Listener]:
    """Yield what shows readings in the way that fits where our output goes."""
    console = Console(stderr=True)
    ways = {"records": _records, "none": _nothing}
    show = ways.get(os.environ.get("EUPE_PROGRESS", ""), _bar if console.is_terminal else _lines)
    with show(console, total, description, unit) as shown:
        yield shown


@contextmanager
def _records(
    console: Console, total: int | None, description: str, unit: str
) -> Iterator[Listener]:
    printed = -LISTEN_EVERY_SECONDS

    def shown(reading: Reading) -> None:
        nonlocal printed
        if reading.finished or reading.seconds - printed >= LISTEN_EVERY_SECONDS:
            printed = reading.seconds
            print(RECORD + json.dumps(asdict(reading)), file=sys.stderr, flush=True)

    yield shown


@contextmanager
def _nothing(
    console: Console, total: int | None, description: str, unit: str
) -> Iterator[Listener]:
    yield lambda reading: None


@contextmanager
def _lines(console: Console, total: int | None, description: str, unit: str) -> Iterator[Listener]:
    printed = 0.0

    def shown(reading: Reading) -> None:
        nonlocal printed
        if reading.finished or reading.seconds - printed >= LINE_EVERY_SECONDS:
            printed = reading.seconds
            print(reading, file=sys.stderr, flush=True)

    yield shown


@contextmanager
def _bar(console: Console, total: int | None, description: str, unit: str) -> Iterator[Listener]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda reading: bar.update(task, completed=reading.done, note=reading.note)


class _RateColumn(ProgressColumn):
    """Units a second, as rich measures it over its last samples."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")
