"""Work in processes of its own, that may be killed: how it ended, and file operations it dies at.

Processes are forked from one that has imported everything and started nothing: a build that is
killed and done again costs a second, not ten.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from cache.errors import StoreError
from eupe.errors import BadInput
from pipelines.machines.interrupt import Terminated

OPERATIONS = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "rmdir", "link")
PATIENCE_SECONDS = 120.0
PRELOADED = ["benchmarks.fault_subject", "tensorboard.summary.writer.event_file_writer", "ray"]


@dataclass(frozen=True)
class Ended:
    """How a piece of work ended.

    Attributes:
        how: "done", "refused" (StoreError or BadInput), "died" (by a signal), "ended" (in order, as
            SIGTERM asked it to), "failed" (any other error) or "hung" (killed after
            PATIENCE_SECONDS).
        result: what it returned, if done.
        words: the sentence of a refusal, or the traceback.
    """

    how: str
    result: Any = None
    words: str = ""


class Child:
    """A function that runs in a process of its own.

    Args:
        function: of a module that can be imported.
        arguments: of it.
        dies_at: the process kills itself at that file operation, a write being half done unless
            it ends in order; None: it lives.
        by: the signal that it dies by.
        settings: environment variables that are its own.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: object,
        dies_at: int | None = None,
        by: signal.Signals = signal.SIGKILL,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self._receives, sends = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(
            target=_work, args=(sends, function, arguments, dies_at, by, settings or {})
        )
        self.process.start()
        sends.close()

    def kill(self, by: signal.Signals) -> None:
        """Send it a signal, if it is still there."""
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, by)

    def end(self, patience_seconds: float = PATIENCE_SECONDS) -> Ended:
        """Wait until it has ended; kill it if that takes too long."""
        try:
            ended: Ended | None = None
            if self._receives.poll(patience_seconds):
                ended = self._receives.recv()
        except EOFError:
            ended = Ended("died")
        if ended is None:
            self.kill(signal.SIGKILL)
            ended = Ended("hung", words=f"no end after {patience_seconds:.0f} s")
        self.process.join()
        return ended


def in_child(function: Callable[..., Any], *arguments: object, **how: Any) -> Ended:
    """Run a function in a process of its own and wait for its end; see `Child`."""
    return Child(function, *arguments, **how).end()


def num_operations(function: Callable[..., Any], *arguments: object) -> int:
    """Count the file operations of a function, in this process."""
    done = _dying(None, signal.SIGKILL)
    function(*arguments)
    return done()


def start_server() -> None:
    """Start the process that the others are forked from."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)


def wait_until(happened: Callable[[], bool], child: Child, seconds: float) -> bool:
    """Wait for something, while a child runs; return whether it happened."""
    given = time.monotonic() + seconds
    while time.monotonic() < given and child.process.is_alive():
        if happened():
            return True
        time.sleep(0.01)
    return False


def _work(
    sends: Connection,
    function: Callable[..., Any],
    arguments: tuple[object, ...],
    dies_at: int | None,
    by: signal.Signals,
    settings: Mapping[str, str],
) -> None:
    """Run the function and send how it ended; what it says on the way is nobody's."""
    os.environ |= settings
    silence = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silence, stream)
    if dies_at is not None:
        _dying(dies_at, by)
    try:
        ended = Ended("done", function(*arguments))
    except (StoreError, BadInput) as error:
        ended = Ended("refused", words=str(error))
    except Terminated as error:
        ended = Ended("ended", words=str(error))
    except Exception:
        ended = Ended("failed", words=traceback.format_exc())
    sends.send(ended)


def _dying(dies_at: int | None, by: signal.Signals) -> Callable[[], int]:
    """Have this process die at its n-th file operation; return what counts them."""
    done = 0

    def disturbed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == dies_at:
                dies = signal.getsignal(by) is signal.SIG_DFL
                if dies and name == "write":  # half of it reaches the file
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), by)
                if dies:
                    time.sleep(PATIENCE_SECONDS)
            return real(*arguments, **named)

        return operation

    for name in OPERATIONS:
        setattr(os, name, disturbed(name, getattr(os, name)))
    return lambda: done
