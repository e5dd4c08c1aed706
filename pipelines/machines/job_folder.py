"""A job's folder: what a process leaves there for another one, which started it and waits for it.

    progress.json   how far its steps are (pipelines.machines.progress)
    error.json      why it failed (pipelines.machines.errors)
    end.json        written by the one who waits: true once the job is to end in order

VARIABLE in the job's environment names the folder. If it is set and empty, the process is one of
several that do the same, and another of them tells. The two processes meet in the folder alone: no
line of the job's output means anything, a lost connection or a driver that starts anew loses
nothing, and what cannot be written stops nothing.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cache.errors import StoreError
from cache.files import atomic
from cache.files.refused import writing
from pipelines.machines import interrupt, once

VARIABLE = "EUPE_JOB_FOLDER"
PROGRESS, ERROR, END = "progress.json", "error.json", "end.json"
LOOK_SECONDS = 1.0
"""Between two looks at whether to end."""
ABANDONED_SECONDS = 30 * 24 * 3600.0
"""A folder in which nothing was written for so long was left by a killed process."""


@contextmanager
def made(directory: Path, name: str) -> Iterator[Path]:
    """Make a folder for one job, and remove it when the block ends.

    Folders that killed processes left beside it go too, once they are old.

    Args:
        directory: where; the job must see it too.
        name: of the job.

    Raises:
        StoreError: it cannot be made.
    """
    folder = directory.absolute() / f".job-{name}-{secrets.token_hex(4)}"
    with writing(folder):
        atomic.make_directories(folder)
    _sweep(directory)

    def remove(seconds: float = 0.0) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    try:
        with interrupt.calling(remove):
            yield folder
    finally:
        remove()  # a worker that dies slowly may still write


def _sweep(directory: Path) -> None:
    for folder in directory.glob(".job-*"):
        with suppress(OSError):  # another process sweeps too
            if time.time() - folder.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def ours() -> Path | None:
    """Return this process's folder, None if nobody waits for it or another one tells."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None


def silent() -> bool:
    """Return True if another process tells for this one."""
    return os.environ.get(VARIABLE) == ""


def write(folder: Path, name: str, value: object) -> bool:
    """Write plain data; return False, and say why on stderr once, if it cannot be written.

    Args:
        folder: of this process; one that is gone is not made again: nobody waits any more.
        name: of the file.
        value: JSON can say.
    """
    try:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder}: no such folder")
        atomic.write(folder / name, [json.dumps(value).encode()], folder)
    except (StoreError, OSError) as error:
        once.say(f"whoever waits for this job is not told: {error}")
        return False
    return True


def read(folder: Path, name: str) -> Any | None:
    """Return the plain data of a file, None if it is not there or cannot be read now."""
    try:
        return json.loads((folder / name).read_bytes())
    except OSError:  # a network drive may say so of a file that is being exchanged
        return None


class Ending:
    """Whether the one who waits for this job has asked it to end; looked up once a second.

    Args:
        folder: of the job, None for a process that another one tells for.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder, self._asked, self._looked = folder, False, float("-inf")

    def __call__(self) -> bool:
        """Return True once it is to end."""
        now = time.monotonic()
        if self._folder is not None and not self._asked and now - self._looked >= LOOK_SECONDS:
            self._looked, self._asked = now, read(self._folder, END) is True
        return self._asked


def end(folder: Path) -> None:
    """Ask the job of a folder to end in order."""
    write(folder, END, True)
