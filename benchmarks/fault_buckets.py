"""Faults of a root in a bucket: writers cut off, objects and copies in the mirror damaged.

The bucket is the one of the tests, on loopback, behind a proxy that kills whoever sends. A round's
root lies under a prefix of its own; all processes share one mirror, but for a second machine's.
"""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import fault_subject
from benchmarks.fault_children import Child, Ended, in_child
from benchmarks.fault_files import CACHE_FILES, DAMAGES, PAGE, filled, limited, small_disk
from benchmarks.fault_kinds import SIGNALS, FaultNotHad, Round, Struck, died, kind
from cache.files import bucket, place
from cache.files.bucket_path import BucketPath

TESTS = Path(__file__).parents[1] / "tests"
MIRROR_BYTES = 1 << 26
FULL_PAGES = 64
"""So many pages are enough for a build's copies and uploads, one after the other."""


class Bucket:
    """The bucket of this campaign, and the mirror of this machine."""

    def __init__(self) -> None:
        self._served: Any = None
        self._server: Any = None
        self._folder = Path()

    @property
    def mirror(self) -> Path:
        """Where copies lie."""
        return self._folder / "mirror"

    @contextmanager
    def served(self, folder: Path) -> Iterator[None]:
        """Serve it on loopback, and let processes that are started from now on know of it."""
        sys.path.append(str(TESTS))
        from support import bucket_server  # not installed, and nobody else's

        self._server, self._folder = bucket_server, folder
        with bucket_server.serve() as self._served:
            os.environ |= {
                "AWS_ENDPOINT_URL": self._served.endpoint,
                "AWS_ACCESS_KEY_ID": "faults",
                "AWS_SECRET_ACCESS_KEY": "faults",
                "AWS_REGION": "us-east-1",
                "EUPE_MIRROR": str(self.mirror),
                "EUPE_MIRROR_BYTES": str(MIRROR_BYTES),
            }
            yield

    def begin(self, round: Round, copied: bool = False) -> None:
        """Let a round's root be a prefix, with undisturbed caches or empty; the mirror is empty."""
        shutil.rmtree(self.mirror, ignore_errors=True)
        round.root = BucketPath(f"s3://{self._server.NAME}/{round.root.name}")
        round.stamp = self.puts
        if copied:
            for path, _, _ in place.listing(round.reference.root / "cache"):
                bucket.send(path, round.root / str(path.relative_to(round.reference.root)))

    def puts(self, path: Path | None = None) -> int:
        """Return how often an object was sent, or all of them together."""
        name = None if path is None else "/".join(path.parts[2:])
        return sum(
            request.method == "PUT" and name in (None, request.key.lstrip("/"))
            for request in list(self._served.requests)
        )

    def end_at(self, number: int, when: str, by: str, child: Child) -> Ended:
        """Have a child end at a PUT, before the bucket hears of it or before the child is told."""
        known = threading.Event()

        def it(request: Any) -> bool:
            known.wait()
            return bool(request.method == "PUT" and request.number == number)

        behaviour = self._server.Behaviour
        self._served.behaviour = behaviour(
            victim=child.process.pid, by=SIGNALS[by], **{f"kill_{when}": it}
        )
        known.set()
        try:
            return child.end()
        finally:
            self._served.behaviour = behaviour()


BUCKET = Bucket()
"""Of this campaign."""


@cache
def _puts_of_a_build(images: Path, name: str) -> int:
    """Return how many PUTs an undisturbed build is."""
    before = BUCKET.puts()
    ended = in_child(fault_subject.build, images, BucketPath(name))
    if ended.how != "done":
        raise FaultNotHad(f"a build in a bucket without a fault {ended.how}: {ended.words}")
    return BUCKET.puts() - before


def _writer(by: str) -> None:
    @kind(f"bucket, writer {by}")
    def strike(round: Round) -> Struck:
        BUCKET.begin(round)
        images = round.reference.images
        all_of_them = _puts_of_a_build(images, str(round.root.parent / "undisturbed"))
        at = BUCKET.puts() + round.random.randint(1, all_of_them)
        when = round.random.choice(["before", "after"])
        child = Child(fault_subject.build, images, round.root)
        return died(BUCKET.end_at(at, when, by, child))


for _by in SIGNALS:
    _writer(_by)


@kind("bucket, two machines at once")
def _two_machines(round: Round) -> Struck:
    """Start two builders that share no lock and no mirror; both come to their end."""
    BUCKET.begin(round)
    other = {"EUPE_MIRROR": str(BUCKET.mirror / "elsewhere")}
    arguments = (fault_subject.build, round.reference.images, round.root)
    children = [Child(*arguments), Child(*arguments, settings=other)]
    ended = [child.end() for child in children]
    broken = [f"{each.how}: {each.words}" for each in ended if each.how != "done"]
    return Struck(broken="; ".join(broken))


@kind("bucket, mirror's disk full")
def _mirror_full(round: Round) -> Struck:
    """Build with a mirror of a few pages; who may not mount one gets a limit to files' sizes."""
    BUCKET.begin(round)
    left = round.random.randint(0, FULL_PAGES)
    arguments = (fault_subject.build, round.reference.images, round.root)
    if os.geteuid():
        ended = in_child(limited, arguments[0], max(1, left * PAGE), *arguments[1:])
    else:
        round.stack.enter_context(small_disk(BUCKET.mirror))
        with filled(BUCKET.mirror, left):
            ended = in_child(*arguments)
    named = any(str(place) in ended.words for place in (BUCKET.mirror, round.root))
    sound = ended.how == "done" or (ended.how == "refused" and named)
    return Struck(broken="" if sound else f"{ended.how}: {ended.words}")


def _object(how: str) -> None:
    @kind(f"bucket, object {how}")
    def strike(round: Round) -> Struck:
        """Damage an object of any kind; the bucket's HEADs have no numbers."""
        BUCKET.begin(round, copied=True)
        pattern = round.random.choice([p for n, p in CACHE_FILES.items() if "numbered" not in n])
        path = round.random.choice(sorted(round.root.glob(pattern)))
        return Struck(DAMAGES[how](round, path, pattern))


def _copy(how: str) -> None:
    @kind(f"bucket, mirror's copy {how}")
    def strike(round: Round) -> Struck:
        """Damage a copy: it is dropped and fetched again, and nobody is refused."""
        BUCKET.begin(round, copied=True)
        filled = in_child(fault_subject.look, round.root, round.reference.specs)
        copies = sorted(path for path in BUCKET.mirror.glob("??/*") if path.stat().st_size)
        if filled.how != "done" or not copies:
            return Struck(broken=f"reading {filled.how}, {len(copies)} copies: {filled.words}")
        path = round.random.choice(copies)
        DAMAGES[how](round, path, "")
        return Struck()


for _how in DAMAGES:
    _object(_how)
    if _how != "exchanged":  # a copy has no twin
        _copy(_how)
