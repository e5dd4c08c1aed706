"""Progress of long steps: a rich bar on a terminal, plain lines elsewhere, and one listener.

A process that another one waits for writes how far it is to its job's folder instead
(pipelines.machines.job_folder); `followed` shows it there as if the steps ran there.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from pipelines.machines import job_folder

LINE_EVERY_SECONDS = 10.0
LISTEN_EVERY_SECONDS = 1.0
LOOK_EVERY_SECONDS = 0.5


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


@contextmanager
def followed(folder: Path) -> Iterator[None]:
    """Show here, until the block ends, the steps of a process that was given a folder.

    A step that the other process leaves unfinished, because it was killed, ends with the block.

    Args:
        folder: the job's (pipelines.machines.job_folder).
    """
    steps, ended = _Followed(_listener.get()), threading.Event()

    def follow() -> None:
        over = False
        while not over:
            over = ended.wait(LOOK_EVERY_SECONDS)
            steps.show(job_folder.read(folder, job_folder.PROGRESS) or [])

    # In the caller's context: what a listener calls may ask it whose run this is.
    thread = threading.Thread(target=copy_context().run, args=(follow,), name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        steps.close()


class _Followed:
    """The steps of another process, as they are shown here."""

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self._last: dict[str, Reading] = {}
        self._open: dict[str, tuple[ExitStack, Listener]] = {}

    def show(self, steps: Sequence[Mapping[str, Any]]) -> None:
        """Show what is new in the readings of all steps."""
        for step in steps:
            reading = Reading(**step)
            if self._last.get(reading.description) != reading:
                self._last[reading.description] = reading
                self._show(reading)

    def close(self) -> None:
        """End the steps that the other process did not end."""
        for stack, _ in self._open.values():
            stack.close()

    def _show(self, reading: Reading) -> None:
        if reading.description not in self._open:
            stack = ExitStack()
            shown = stack.enter_context(_shown(reading.total, reading.description, reading.unit))
            self._open[reading.description] = (stack, shown)
        stack, shown = self._open[reading.description]
        shown(reading)
        if self._listener is not None:
            self._listener(reading)
        if reading.finished:
            stack.close()
            del self._open[reading.description]


@contextmanager
def _shown(total: int | None, description: str, unit: str) -> Iterator[Listener]:
    """Yield what shows readings in the way that fits where our output goes."""
    console = Console(stderr=True)
    if job_folder.silent():
        show = _nothing
    elif job_folder.ours() is not None:
        show = _told
    else:
        show = _bar if console.is_terminal else _lines
    with show(console, total, description, unit) as shown:
        yield shown


_steps: dict[str, dict[str, Any]] = {}
_steps_lock = threading.Lock()


@contextmanager
def _told(console: Console, total: int | None, description: str, unit: str) -> Iterator[Listener]:
    """Write the readings of this process's steps, by description, to its job's folder."""
    folder, written = job_folder.ours(), -LISTEN_EVERY_SECONDS
    assert folder is not None

    def shown(reading: Reading) -> None:
        nonlocal written
        if reading.finished or reading.seconds - written >= LISTEN_EVERY_SECONDS:
            written = reading.seconds
            with _steps_lock:
                _steps[description] = asdict(reading)
                job_folder.write(folder, job_folder.PROGRESS, list(_steps.values()))

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
    with RichProgress(*_columns(unit), console=console, expand=True) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda reading: bar.update(task, completed=reading.done, note=reading.note)


def _columns(unit: str) -> tuple[ProgressColumn, ...]:
    """Return what a bar shows: count, rate and time left whole, from 60 columns on; others cut."""
    whole = partial(Column, no_wrap=True)
    cut = partial(Column, no_wrap=True, overflow="ellipsis")
    return (
        TextColumn("{task.description}", markup=False, table_column=cut(ratio=2)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        MofNCompleteColumn(table_column=whole()),
        _RateColumn(unit, table_column=whole()),
        TimeRemainingColumn(table_column=whole()),
        TextColumn("{task.fields[note]}", markup=False, table_column=cut(ratio=1)),
    )


class _RateColumn(ProgressColumn):
    """Units a second, as rich measures it over its last samples."""

    def __init__(self, unit: str, table_column: Column) -> None:
        super().__init__(table_column)
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")
