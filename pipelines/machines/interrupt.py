"""Ctrl-C and SIGTERM: one sentence, nothing left running, exit code 130 or 143, within seconds.

Nothing is unwound. What is on disk is whole at any instant (docs/design.md, law 5), while Ray and
Prefect, asked to end in order, take minutes and print hundreds of lines of their own.

SIGTERM is how a batch system or a cluster takes a machine back, and it waits half a minute before
it kills. Work that asks for that time (`in_order`) gets it: training saves what it has.
"""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil
from rich.console import Console

GRACE_SECONDS = 25.0
"""From SIGTERM to the end of whatever wants that time: Slurm and Kubernetes kill after 30."""
PATIENCE_SECONDS = {signal.SIGINT: 0.0, signal.SIGTERM: GRACE_SECONDS}
CALL_SECONDS = 2.0
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
END_SECONDS = 2.0
_calls: list[Callable[[float], object]] = []


class Terminated(BaseException):
    """Work ended in order because SIGTERM asked it to; says what is kept.

    No Exception: who goes on to other work after a failure must not after this.
    """


@contextmanager
def calling(end: Callable[[float], object]) -> Iterator[None]:
    """Have something called if a signal ends this process inside the block.

    Args:
        end: ends what is no process below this one, as a job of a cluster; called with the seconds
            for which it may wait for that end, and given two more, in a thread of its own.
    """
    _calls.append(end)
    try:
        yield
    finally:
        _calls.remove(end)


@contextmanager
def at_once() -> Iterator[None]:
    """End this process, and all below it, at the first SIGINT or SIGTERM inside the block."""
    with ExitStack() as handlers:
        for number in SAID:
            handlers.enter_context(_handled(number, _end))
        yield


@contextmanager
def in_order(tell: Callable[[], object] | None = None) -> Iterator[Callable[[], bool]]:
    """Let SIGTERM ask the work inside the block to end, instead of ending it.

    A process that is still there GRACE_SECONDS later is ended then, wherever it is: Ray, say, takes
    its time to leave. Outside the main thread, which alone gets signals, the work is never asked.

    Args:
        tell: called when SIGTERM comes, to ask processes elsewhere.

    Yields:
        what says if SIGTERM has come.
    """
    asked = list[threading.Timer]()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked:
            return
        asked.append(threading.Timer(GRACE_SECONDS, _end, (number, None, 0.0)))
        asked[0].daemon = True
        asked[0].start()
        if tell is not None:
            tell()

    with _handled(signal.SIGTERM, ask):
        yield lambda: bool(asked)


def going_on() -> str:
    """Return what the user is to do after an end by a signal."""
    program, *words = sys.argv
    return f"the same command goes on from here: {shlex.join([Path(program).name, *words])}"


@contextmanager
def unchanged(number: signal.Signals) -> Iterator[None]:
    """Keep what a signal does here, if anybody said so, though the block has it do something else.

    Ray's do: `ray.init` sets SIGTERM, and Ray Train SIGINT.
    """
    before = signal.getsignal(number)
    ours = callable(before) and threading.current_thread() is threading.main_thread()
    try:
        yield
    finally:
        if ours:
            signal.signal(number, before)


@contextmanager
def _handled(number: signal.Signals, handler: Callable[..., object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _end(number: int, frame: FrameType | None, patience: float | None = None) -> None:
    with suppress(ValueError):  # in no other thread than the main one
        for each in SAID:
            signal.signal(each, signal.SIG_IGN)
    with suppress(Exception):
        sys.stdout.flush()
    Console(stderr=True).show_cursor()  # a bar had hidden it
    sent = signal.Signals(number)
    print(f"\n{SAID[sent]}; {going_on()}", file=sys.stderr, flush=True)
    patience = PATIENCE_SECONDS[sent] if patience is None else patience
    threads = [threading.Thread(target=_try, args=(call, patience), daemon=True) for call in _calls]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + patience + CALL_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
    below = psutil.Process().children(recursive=True)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(below, timeout=END_SECONDS)
    os._exit(128 + number)


def _try(call: Callable[[float], object], patience: float) -> None:
    with suppress(Exception):  # what it was to end may be gone already
        call(patience)
