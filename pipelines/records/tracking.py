"""Tracking: a run's figures as append-only JSONL and TensorBoard events, behind one interface."""

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from cache.files import atomic
from cache.files.refused import writing
from cache.format import layout
from eupe.errors import BadInput

METRICS_FILE = "metrics.jsonl"
EVENTS_DIRECTORY = "tensorboard"


class Tracker(Protocol):
    """Somewhere that figures go. A tracker of another kind implements these three."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step, named `group/name`.

        Raises:
            StoreError: they cannot be written.
        """
        ...

    def flush(self) -> None:
        """Write out what is still held."""
        ...

    def close(self) -> None:
        """Write out what is still held, and end."""
        ...


class JsonLines:
    """One JSON object a line: `step` and the figures, flushed as they come.

    Args:
        path: of the file, appended to; lines from `first_step` on, which an interrupted run wrote
            after its last checkpoint and will now write again, are dropped.
        first_step: the first step that this run will log.
    """

    def __init__(self, path: Path, first_step: int):
        kept = [line for line in read(path) if line["step"] < first_step]
        content = "".join(_line(line) for line in kept).encode()
        atomic.write(path, [content], layout.scratch_directory(path.parent))
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Append a line; a figure that is not finite becomes null, JSON having no name for it."""
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        with writing(self._path):
            self._file.write(_line({"step": step, **finite}))
            self._file.flush()

    def flush(self) -> None:
        """Do nothing: every line is written out as it comes."""

    def close(self) -> None:
        """Close the file."""
        with writing(self._path):
            self._file.close()


class TensorBoard:
    """TensorBoard event files; events from `first_step` on of an interrupted run are hidden."""

    def __init__(self, directory: Path, first_step: int):
        self._directory = directory
        with writing(directory):
            self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Write one event per figure."""
        with writing(self._directory):  # its thread's errors come with the event after
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write out the events still held."""
        with writing(self._directory):
            self._writer.flush()

    def close(self) -> None:
        """Write out the events still held, and close the file."""
        with writing(self._directory):
            self._writer.close()


class Trackers:
    """Several trackers as one; with none, nowhere (ranks other than 0)."""

    def __init__(self, trackers: Sequence[Tracker] = ()):
        self._trackers = tuple(trackers)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Hand the figures to every tracker."""
        for tracker in self._trackers:
            tracker.log(step, figures)

    def flush(self) -> None:
        """Have every tracker write out what it holds."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Close every tracker, whatever one of them raises."""
        with ExitStack() as closing:
            for tracker in reversed(self._trackers):
                closing.callback(tracker.close)


def open_trackers(directory: Path, first_step: int) -> Trackers:
    """Return the trackers of a stage: JSONL and TensorBoard below its directory."""
    return Trackers(
        [
            JsonLines(directory / METRICS_FILE, first_step),
            TensorBoard(directory / EVENTS_DIRECTORY, first_step),
        ]
    )


def read(path: Path) -> list[dict[str, float]]:
    """Return the lines of a JSONL file, none if there is no file.

    A last line cut off by a kill is left out.

    Raises:
        BadInput: another line is no JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    out = []
    for number, line in enumerate(lines, start=1):
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BadInput(f"{path}, line {number}: is no JSON: {error}") from error
    return out


def _line(value: Mapping[str, object]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"
