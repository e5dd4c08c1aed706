"""Faults at the edge: bad input is one sentence and exit code 2, a bug keeps its traceback."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import StoreError

CHECKOUT = Path(__file__).resolve().parents[2]
ROOMS = ("eupe", "cache", "pipelines", "flows")
BAD_INPUT = 2


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn bad input into its sentence on stderr and exit code 2; let every other error pass."""
    try:
        yield
    except Exception as error:
        sentence = bad_input(error)
        if sentence is None:
            raise
        print(sentence, file=sys.stderr)
        sys.exit(BAD_INPUT)


def bad_input(error: BaseException) -> str | None:
    """Return what to tell the user about bad input, None if the error is no such thing.

    A StoreError always is. A ValueError, or the FloatingPointError of a loss that is not finite,
    is when a `raise` of ours made it, having looked at the input; one that escapes from a library
    is a bug, and its traceback is worth more. An error of a Ray task counts as the error the task
    raised, which is ours if `telling_whose` found so there.
    """
    cause = getattr(error, "cause", None)  # ray.exceptions.RayTaskError
    if isinstance(cause, Exception):
        error = cause
    if isinstance(error, StoreError):
        return str(error)
    if isinstance(error, ValueError | FloatingPointError) and (
        getattr(error, "ours", False) or raised_here(error)
    ):
        return str(error)
    return None


class RemoteBug(RuntimeError):
    """An error of another process that is no bad input; it says the traceback it had there."""


@contextmanager
def telling_whose() -> Iterator[None]:
    """Have an error that leaves for another process say whether it is ours.

    Pickling drops the traceback that would tell. Our own errors are marked, any other becomes a
    RemoteBug.
    """
    try:
        yield
    except Exception as error:
        if bad_input(error) is None:
            raise RemoteBug(traceback.format_exc()) from None
        error.ours = True
        raise


def raised_here(error: BaseException) -> bool:
    """Say whether a `raise` statement in one of the four rooms made the error.

    Libraries written in C leave no frame of their own, so the file alone does not tell.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    path, line = Path(frames[-1].filename), frames[-1].line or ""
    return line.startswith("raise") and any(path.is_relative_to(CHECKOUT / room) for room in ROOMS)
