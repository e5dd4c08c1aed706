"""Ctrl-C: one sentence, nothing left running, exit code 130, within seconds.

Nothing is unwound. What is on disk is whole at any instant (docs/design.md, law 5), while Ray and
Prefect, asked to end in order, take minutes and print hundreds of lines of their own.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

CALL_SECONDS = 2.0
END_SECONDS = 2.0
_calls: list[Callable[[], object]] = []


@contextmanager
def calling(end: Callable[[], object]) -> Iterator[None]:
    """Have something called if an interrupt ends this process inside the block.

    Args:
        end: ends what is no process below this one, as a job of a cluster; given two seconds, in a
            thread of its own.
    """
    _calls.append(end)
    try:
        yield
    finally:
        _calls.remove(end)


@contextmanager
def at_once() -> Iterator[None]:
    """End this process, and all below it, at the first interrupt inside the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    with suppress(Exception):
        sys.stdout.flush()
    Console(stderr=True).show_cursor()  # a bar had hidden it
    program, *words = sys.argv
    again = shlex.join([Path(program).name, *words])
    print(
        f"\ninterrupted; the same command goes on from here: {again}", file=sys.stderr, flush=True
    )
    threads = [threading.Thread(target=_try, args=(call,), daemon=True) for call in _calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + CALL_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    below = psutil.Process().children(recursive=True)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, timeout=END_SECONDS)
    os._exit(128 + number)


def _try(call: Callable[[], object]) -> None:
    with suppress(Exception):  # what it was to end may be gone already
        call()
