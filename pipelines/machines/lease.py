"""Leases: one process at a time works on something; who waits takes over from a holder that died.

A lease is a small file that its holder touches every few seconds. On the holder's own machine a
dead process is known at once; elsewhere by the file's age, by the clock of the file system it lies
on. Processes that look at a lease take turns by a lock on a file beside it.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from filelock import FileLock

from cache.errors import Busy
from cache.files import atomic
from cache.files.refused import writing

BEAT_SECONDS = 10.0
DEAD_SECONDS = 90.0
"""A lease that was not touched for so long is nobody's: nine beats missed."""
CLOCK_SECONDS = 2.0
"""When a process began is told by a clock that may be set."""
POLL_SECONDS = 0.5
SUFFIX = ".lease"


@dataclass(frozen=True)
class Holder:
    """Who works on something.

    Attributes:
        host: its name, and in a container the container's.
        pid: of the process.
        started: when it began, seconds since 1970; process numbers are used again.
        token: of this lease alone.
    """

    host: str
    pid: int
    started: float
    token: str

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}"


def holder(path: Path) -> Holder | None:
    """Return who holds a lease, None where nobody does or its holder has died.

    Args:
        path: of what is worked on; its lease lies beside it.
    """
    lease = _file(path)
    try:
        found = Holder(**json.loads(lease.read_bytes()))
        age = _now(lease.parent) - lease.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None
    us = _this_process()
    if found.host == us.host:
        return found if _lives(found) else None
    return found if age < DEAD_SECONDS else None


@contextmanager
def held(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lease on something inside the block.

    Args:
        path: of what is worked on, a file or folder; it need not be there.
        wait: for another holder to end or die; False: do not.

    Raises:
        Busy: another process holds it, and `wait` is False.
        StoreError: the lease cannot be written.
    """
    ours = _this_process()
    told = False
    while (other := _take(path, ours)) is not None:
        if not wait:
            raise Busy(f"{path} is in work on {other}")
        if not told:
            print(f"{path.name} is in work on {other}; waiting for it", file=sys.stderr, flush=True)
            told = True
        time.sleep(POLL_SECONDS)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(_file(path), ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        _give_back(path, ours)


def _take(path: Path, ours: Holder) -> Holder | None:
    """Take a lease that nobody alive holds; return who does, None if it is ours now."""
    lease = _file(path)
    with writing(lease):
        atomic.make_directories(lease.parent)
        with _turn(path):
            there = holder(path)
            if there is None:
                text = json.dumps(vars(ours)).encode()
                atomic.write(lease, [text], lease.parent)
            return there


def _give_back(path: Path, ours: Holder) -> None:
    with _turn(path), suppress(OSError):
        if holder(path) == ours:  # else it was taken over while this process was stopped
            _file(path).unlink()


def _beat(lease: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):  # a drive that is away for a moment
            os.utime(lease)


def _turn(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _file(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)


def _now(directory: Path) -> float:
    """Return the time by the clock of the file system, which stamps leases."""
    probe = directory / f".now-{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _this_process() -> Holder:
    process = psutil.Process()
    token = secrets.token_hex(8)
    return Holder(atomic.host(), os.getpid(), process.create_time(), token)


def _lives(found: Holder) -> bool:
    try:
        process = psutil.Process(found.pid)
        same = abs(process.create_time() - found.started) < CLOCK_SECONDS
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
