"""Faults at the edge: bad input is one sentence and exit code 2, a bug keeps its traceback.

Work that SIGTERM has asked to end, and that did in order, is one sentence and exit code 143.

A process that another one waits for writes either to its job's folder, too.
"""

import errno
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from cache.errors import StoreError
from eupe.errors import BadInput
from pipelines.machines import interrupt, job_folder
from pipelines.machines.interrupt import Terminated

BAD_INPUT = 2
"""Exit code of a command that was asked for what cannot be done."""
TERMINATED = 128 + signal.SIGTERM
"""Exit code of a command that ended because it was asked to, a shell's way of saying so."""
REFUSED = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)
)
"""What the system says of a path that it does not let this user have."""


@dataclass(frozen=True)
class Failure:
    """Why a job failed.

    Attributes:
        sentence: what it says.
        bad_input: True if the user can put it right, False for a bug.
    """

    sentence: str
    bad_input: bool


def failure(folder: Path) -> Failure | None:
    """Return why the job of a folder failed, None if it did not say."""
    told = job_folder.read(folder, job_folder.ERROR)
    return None if told is None else Failure(**told)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn bad input into its sentence on stderr and exit code 2; let every other error pass.

    So does the end that SIGTERM asked for, with its own exit code.
    """
    try:
        yield
    except Terminated as ended:
        if (folder := job_folder.ours()) is not None:
            job_folder.write(
                folder, job_folder.ERROR, asdict(Failure(f"terminated; {ended}", False))
            )
        print(f"terminated; {ended}; {interrupt.going_on()}", file=sys.stderr)
        sys.exit(TERMINATED)
    except Exception as error:
        sentence = bad_input(error)
        if (folder := job_folder.ours()) is not None:
            named = f"{type(error).__name__}: {error}" if sentence is None else sentence
            failure = Failure(named, sentence is not None)
            job_folder.write(folder, job_folder.ERROR, asdict(failure))
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        sys.exit(BAD_INPUT)


def bad_input(error: BaseException) -> str | None:
    """Return what to tell the user about bad input, None if the error is a bug.

    BadInput and StoreError are bad input. StoreError has a root of its own: it speaks of what lies
    on a disk, and whoever catches a ValueError does not mean a damaged file. So is a path that the
    system refuses: any path may be below a folder that the user may not enter. An error of a Ray
    task counts as the error that the task raised.
    """
    cause = getattr(error, "cause", None)  # ray.exceptions.RayTaskError
    if isinstance(cause, Exception):
        error = cause
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename is not None:
        return f"{error.filename}: {error.strerror}; allow it to this user, or name another path"
    return str(error) if isinstance(error, BadInput | StoreError) else None


class RemoteBug(RuntimeError):
    """A bug in another process; its message is the traceback it had there."""


@contextmanager
def keeping_traceback() -> Iterator[None]:
    """Have a bug that leaves for another process keep its traceback, which pickling drops.

    It becomes a RemoteBug. Bad input leaves as it is: its type and its sentence are all of it.
    """
    try:
        yield
    except Exception as error:
        if bad_input(error) is None:
            raise RemoteBug(traceback.format_exc()) from None
        raise
