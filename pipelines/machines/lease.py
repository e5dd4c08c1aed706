"""Leases: one process at a time works on something; who waits takes over from a holder that died.

A lease is a small file that its holder touches every few seconds. On the holder's own machine a
dead process is known at once; elsewhere by the file's age, by the clock of the file system it lies
on. Processes that look at a lease take turns by a lock on a file beside it.

What is worked on in a copy of a bucket has its lease there, an object: taken, kept and given back
by compare and swap, its age told by the bucket's clock.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil
from filelock import FileLock

from cache.errors import Busy, StoreError
from cache.files import atomic, bucket, copies
from cache.files.bucket import Stamped
from cache.files.bucket_path import BucketPath
from cache.files.refused import writing

BEAT_SECONDS = 10.0
DEAD_SECONDS = 90.0
"""A lease that was not touched for so long is nobody's: nine beats missed."""
STARTED_SECONDS = 2.0
"""When a process began is known to a second."""
POLL_SECONDS, BUCKET_POLL_SECONDS = 0.5, 5.0
SUFFIX = ".lease"
FREE = b"{}\n"
"""A lease in a bucket that was given back."""
BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who works on something.

    Attributes:
        host: its name, and in a container the container's.
        pid: of the process.
        started: when it began, seconds since its machine did, which no clock that is set changes;
            process numbers are used again.
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

    Raises:
        StoreError: the bucket that it lies in does not answer.
    """
    return _lease(path).holder()


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
    lease, ours, told = _lease(path), _this_process(), False
    while (other := lease.take(ours)) is not None:
        if not wait:
            raise Busy(f"{path} is in work on {other}")
        if not told:
            print(f"{path.name} is in work on {other}; waiting for it", file=sys.stderr, flush=True)
            told = True
        time.sleep(lease.poll_seconds)
    ended = threading.Event()
    beats = threading.Thread(target=_beat, args=(lease, ended), daemon=True)
    beats.start()
    try:
        yield
    finally:
        ended.set()
        beats.join()
        lease.give_back(ours)


def _beat(lease: "_File | _Object", ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError, StoreError):  # a drive, or a bucket, that is away for a moment
            lease.beat()


def _lease(path: Path) -> "_File | _Object":
    there = copies.remote(path)
    return _File(path) if there is None else _Object(there)


class _File:
    """A lease on something in a local or shared folder."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.with_name(path.name + SUFFIX)
        self.poll_seconds = POLL_SECONDS

    def holder(self) -> Holder | None:
        """Return who holds it."""
        try:
            found = Holder(**json.loads(self._file.read_bytes()))
            age = _now(self._file.parent) - self._file.stat().st_mtime
        except (OSError, ValueError, TypeError):
            return None
        return _alive(found, lambda: age)

    def take(self, ours: Holder) -> Holder | None:
        """Take it if nobody alive holds it; return who does, None if it is ours now."""
        with writing(self._file):
            atomic.make_directories(self._file.parent)
            with self._turn():
                there = self.holder()
                if there is None:
                    text = json.dumps(vars(ours)).encode()
                    atomic.write(self._file, [text], self._file.parent)
                return there

    def beat(self) -> None:
        """Say that its holder lives."""
        os.utime(self._file)

    def give_back(self, ours: Holder) -> None:
        """Let others have it, unless it was taken over while this process was stopped."""
        with self._turn(), suppress(OSError):
            if self.holder() == ours:
                self._file.unlink()

    def _turn(self) -> FileLock:
        return FileLock(self._path.with_name(f".{self._path.name}.lock"))


class _Object:
    """A lease on something in a bucket; an object that names nobody is free."""

    def __init__(self, path: BucketPath) -> None:
        self._object = path.with_name(path.name + SUFFIX)
        self.poll_seconds = BUCKET_POLL_SECONDS
        self._ours, self._beats = Stamped(b"", {}), 0

    def holder(self) -> Holder | None:
        """Return who holds it."""
        return self._holder(bucket.read(self._object))

    def _holder(self, there: Stamped | None) -> Holder | None:
        if there is None:
            return None
        try:
            said = json.loads(there.content)
            found = Holder(**{name: said[name] for name in Holder.__dataclass_fields__})
        except (ValueError, TypeError, KeyError):
            return None
        return _alive(found, lambda: _bucket_now(self._object.parent) - there.written)

    def take(self, ours: Holder) -> Holder | None:
        """Take it if nobody alive holds it; return who does, None if it is ours now."""
        while True:
            there = bucket.read(self._object)
            other = self._holder(there)
            if other is not None:
                return other
            content = json.dumps(vars(ours)).encode()
            with suppress(Busy):
                self._ours = Stamped(content, bucket.swap(self._object, content, there))
                return None

    def beat(self) -> None:
        """Say that its holder lives; of a lease that was taken over, nothing."""
        self._beats += 1
        self._say(json.dumps({**json.loads(self._ours.content), "beats": self._beats}).encode())

    def give_back(self, ours: Holder) -> None:
        """Let others have it, unless it was taken over while this process was silent."""
        with suppress(StoreError):
            self._say(FREE)

    def _say(self, content: bytes) -> None:
        """Write what the lease shall say, if it is still ours.

        Raises:
            Busy: it was taken over.
            StoreError: the bucket does not answer; it may have written it all the same.
        """
        try:
            stamp = bucket.swap(self._object, content, self._ours)
        except Busy:
            there = bucket.read(self._object)
            if there is None or _token(there) != _token(self._ours):
                raise
            stamp = bucket.swap(self._object, content, there)  # an answer to us was lost
        self._ours = Stamped(content, stamp)


def _token(there: Stamped) -> object:
    try:
        said = json.loads(there.content)
    except ValueError:
        return None
    return said.get("token") if isinstance(said, dict) else None


@cache
def _bucket_clock(folder: BucketPath) -> float:
    """Return how far the clock of a bucket is ahead of this machine's monotonic one."""
    probe = folder / f".now-{secrets.token_hex(4)}"
    bucket.swap(probe, b"", None)
    found = bucket.read(probe)
    asked = time.monotonic()
    probe.unlink()
    if found is None:
        raise StoreError(f"{probe}: was written and is not there; the bucket loses objects")
    return found.written - asked


def _bucket_now(folder: BucketPath) -> float:
    """Return the time by the clock of a bucket, which stamps leases."""
    return time.monotonic() + _bucket_clock(folder)


def _now(directory: Path) -> float:
    """Return the time by the clock of the file system, which stamps leases."""
    probe = directory / f".now-{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _this_process() -> Holder:
    started, token = _started(psutil.Process()), secrets.token_hex(8)
    return Holder(_host(), os.getpid(), started, token)


def _started(process: psutil.Process) -> float:
    booted = psutil.boot_time()  # which psutil has added
    return float(process.create_time() - booted)


def _host() -> str:
    """Name this machine since it was started: names of machines in a cloud are not their own."""
    name = atomic.host()
    with suppress(OSError):
        name += f"-{BOOT.read_text().strip()[:8]}"
    return name


def _alive(found: Holder, age: Callable[[], float]) -> Holder | None:
    """Return the holder of a lease, None if it has died; its age is asked if that must tell."""
    if found.host == _host():
        return found if _lives(found) else None
    return found if age() < DEAD_SECONDS else None


def _lives(found: Holder) -> bool:
    try:
        process = psutil.Process(found.pid)
        same = abs(_started(process) - found.started) < STARTED_SECONDS
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False
