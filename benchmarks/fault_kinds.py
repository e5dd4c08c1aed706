"""The kinds of fault, in one table: each readies a root, has a fault happen, says what it did.

A kind is a function in KINDS: adding one is adding a function with `@kind`.
"""

import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks import fault_subject
from benchmarks.fault_children import Child, Ended, in_child
from cache.format import layout
from eupe.spec import StoreSpec

PAGE = 4096
DISK_BYTES = 6 << 20
FOLDER_WILL_DO = ("HEAD", "config.json", "spec.json")
SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM}


@dataclass(frozen=True)
class Reference:
    """Undisturbed work, which what is left after a fault is compared with.

    Attributes:
        folder: holds the pictures, the root, half of it, and its twin of other pictures.
        specs: of the stores.
        build_operations: file operations of a build.
        train_operations: file operations of a training.
    """

    folder: Path
    specs: tuple[StoreSpec, ...]
    build_operations: int
    train_operations: int

    @property
    def images(self) -> Path:
        """The pictures."""
        return self.folder / "images"

    @property
    def root(self) -> Path:
        """The root: caches, and a training from them."""
        return self.folder / "undisturbed"

    @property
    def half(self) -> Path:
        """The root as it was when half of the work was done."""
        return self.folder / "half"

    @property
    def twin(self) -> Path:
        """The root of other pictures."""
        return self.folder / "twin"


@dataclass(frozen=True)
class Struck:
    """What a fault has done.

    Attributes:
        damaged: files that it changed or took away; none if it was the end of a process.
        broken: what went wrong already: a process that a fault elsewhere should not have ended.
        actors: that computed.
        there: the shards that lay there when the fault happened, see `shard_files`; None: those
            that lie there when it is over.
    """

    damaged: tuple[Path, ...] = ()
    broken: str = ""
    actors: int = 1
    there: dict[Path, int] | None = None

    def is_named(self, words: str) -> bool:
        """True if a refusal names a file that was damaged.

        What a HEAD, a spec or a checkpoint's description says wrongly is found beside it: there the
        folder will do.
        """
        return any(
            path.name in words or (path.name in FOLDER_WILL_DO and str(path.parent) in words)
            for path in self.damaged
        )


def shard_files(root: Path) -> dict[Path, int]:
    """Return which files of patches lie below a root, with their inodes: a new one is new work."""
    found = (root / "cache").glob("*/*/*/*/view-*/c.*")
    return {path.relative_to(root): path.stat().st_ino for path in found}


@dataclass
class Round:
    """One round: a root of its own, and what its fault is drawn by.

    Attributes:
        reference: undisturbed work.
        root: of this round; is not there yet.
        random: draws the moment and the place of the fault.
        stack: undoes what outlives the fault, at the round's end.
    """

    reference: Reference
    root: Path
    random: random.Random
    stack: ExitStack = field(default_factory=ExitStack)

    def copy(self, *parts: str) -> None:
        """Begin with undisturbed work: "cache", "run" or both."""
        for part in parts:
            shutil.copytree(self.reference.root / part, self.root / part)

    def child(self, what: Literal["build", "train"], dies_at: int | None, by: str) -> Ended:
        """Build or train, in a process that dies on its way."""
        work = fault_subject.build if what == "build" else fault_subject.train
        arguments = (self.reference.images, self.root)
        return in_child(work, *arguments, dies_at=dies_at, by=SIGNALS[by])


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: of it.
        strike: has it happen.
        then: what is done again afterwards.
        slow: True if a round takes more than a few seconds.
    """

    name: str
    strike: Callable[[Round], Struck]
    then: Literal["build", "train"]
    slow: bool = False


KINDS: dict[str, Kind] = {}


def kind(
    name: str, then: Literal["build", "train"] = "build", slow: bool = False
) -> Callable[[Callable[[Round], Struck]], Callable[[Round], Struck]]:
    """Enter a function in the table."""

    def enter(strike: Callable[[Round], Struck]) -> Callable[[Round], Struck]:
        assert name not in KINDS
        KINDS[name] = Kind(name, strike, then, slow)
        return strike

    return enter


# ------------------------------------------------------------------------------ ends of processes


def _died(ended: Ended) -> Struck:
    """Say that a process has died as it should have, or how it ended instead."""
    return Struck(broken="" if ended.how == "died" else f"{ended.how}: {ended.words}")


def _writer(by: str) -> None:
    @kind(f"writer {by}")
    def strike(round: Round) -> Struck:
        at = round.random.randint(1, round.reference.build_operations)
        return _died(round.child("build", at, by))


def _trainer(by: str) -> None:
    @kind(f"training worker {by}", then="train")
    def strike(round: Round) -> Struck:
        round.copy("cache")
        at = round.random.randint(1, round.reference.train_operations)
        return _died(round.child("train", at, by))


for _by in SIGNALS:
    _writer(_by)
    _trainer(_by)


# ------------------------------------------------------------------------------ disks


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of DISK_BYTES."""
    folder.mkdir(parents=True)
    size = f"size={DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "faults", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def _limited(work: Callable[..., object], num_bytes: int, *arguments: object) -> object:
    """Work in a process whose files may not become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    return work(*arguments)


def _fill(round: Round, what: Literal["build", "train"]) -> Struck:
    """Work on a disk with a few pages left; who may not mount one gets a limit to files' sizes."""
    work = fault_subject.build if what == "build" else fault_subject.train
    arguments = (round.reference.images, round.root)
    made = {"build": round.reference.root / "cache", "train": round.reference.root / "run"}[what]
    sizes = [path.stat().st_size for path in made.rglob("*") if path.is_file()]
    if os.geteuid():
        if what == "train":
            round.copy("cache")
        ended = in_child(_limited, work, round.random.randint(1, max(sizes) - 1), *arguments)
    else:
        round.stack.enter_context(_small_disk(round.root))
        if what == "train":
            round.copy("cache")
        disk = os.statvfs(round.root)
        left = round.random.randint(0, sum(-(-size // PAGE) for size in sizes) * 3 // 4)
        filler = round.root / "filler"
        filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - left * PAGE)))
        ended = in_child(work, *arguments)
        filler.unlink()
    sound = ended.how == "done" or (ended.how == "refused" and str(round.root) in ended.words)
    return Struck(broken="" if sound else f"{ended.how}: {ended.words}")


@kind("disk full, build")
def _disk_full_build(round: Round) -> Struck:
    return _fill(round, "build")


@kind("disk full, training", then="train")
def _disk_full_training(round: Round) -> Struck:
    return _fill(round, "train")


# ------------------------------------------------------------------------------ damaged files

CACHE_FILES = {
    "patches": "cache/*/*/*/*/view-*/c.*",
    "rows": "cache/*/*/*/*/view-*/rows-*",
    "zarr.json": "cache/*/*/*/*/view-*/zarr.json",
    "spec": "cache/*/*/*/*/spec.json",
    "moments": "cache/*/*/*/*/moments.arrow",
    "manifest segment": "cache/*/*/*/*/manifest/*.arrow",
    "manifest HEAD": "cache/*/*/*/*/manifest/HEAD",
    "sample segment": "cache/*/samples/*.arrow",
    "sample HEAD": "cache/*/samples/HEAD",
}
RUN_FILES = {"checkpoint": "run/*/checkpoints/step-00000006/*"}
"""Kind of file -> where such files lie below a root."""


Damage = Callable[[Round, Path, str], tuple[Path, ...]]
"""(round, a file, the pattern of its kind) -> the files that it damaged."""


def _flipped(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    content = bytearray(path.read_bytes())
    bit = round.random.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return (path,)


def _truncated(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    os.truncate(path, round.random.randrange(path.stat().st_size))
    return (path,)


def _deleted(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    path.unlink()
    return (path,)


def _exchanged(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    """Exchange a file for another of its kind, or the twin's: of its size if there is one."""
    content = path.read_bytes()
    twin = round.reference.twin / path.relative_to(round.root)
    below = [*sorted(round.root.glob(pattern)), twin]
    others = [other for other in below if other.is_file() and other.read_bytes() != content]
    like = [other for other in others if other.stat().st_size == len(content)]
    other = round.random.choice(like or others)
    path.write_bytes(other.read_bytes())
    if other == twin:
        return (path,)
    other.write_bytes(content)
    return path, other


DAMAGES = {
    "flipped": _flipped,
    "truncated": _truncated,
    "deleted": _deleted,
    "exchanged": _exchanged,
}


def _rolled_back(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    """Put a HEAD back as it was when half of the work was done."""
    earlier = round.reference.half / path.relative_to(round.root)
    if not earlier.is_file():  # the last store of all, say, had none yet
        path.unlink()
        return (path,)
    shutil.copyfile(earlier, path)
    return (path,)


def _damage(
    name: str,
    pattern: str,
    how: str,
    damage: Damage,
    then: Literal["build", "train"],
) -> None:
    @kind(f"{name} {how}", then=then)
    def strike(round: Round) -> Struck:
        round.copy("cache")
        if then == "train":  # at its last checkpoint but one
            round.copy("run")
            shutil.rmtree(round.root / "run" / fault_subject.STAGE / "checkpoints/step-00000008")
        path = round.random.choice(sorted(round.root.glob(pattern)))
        return Struck(damage(round, path, pattern))


for _how, _change in DAMAGES.items():
    for _name, _pattern in CACHE_FILES.items():
        _damage(_name, _pattern, _how, _change, "build")
    for _name, _pattern in RUN_FILES.items():
        _damage(_name, _pattern, _how, _change, "train")
for _name in ("manifest HEAD", "sample HEAD"):
    _damage(_name, CACHE_FILES[_name], "rolled back", _rolled_back, "build")


# ------------------------------------------------------------------------------ other builders


@kind("stale locks")
def _stale_locks(round: Round) -> Struck:
    """Leave the locks and temporary files of processes that are gone, some in mid-build."""
    at = round.random.randint(1, round.reference.build_operations)
    struck = _died(round.child("build", at, "killed"))
    gone = Child(os.getpid)
    pid = gone.process.pid
    gone.end()
    for scratch in sorted((round.root / "cache").rglob(layout.SCRATCH)):
        (scratch / "LOCK").write_text(f"{pid}\n")
        (scratch / f"elsewhere~{pid}~{round.random.getrandbits(64):016x}~HEAD").write_bytes(b"{")
    return struck


@kind("two builders at once")
def _two_builders(round: Round) -> Struck:
    """Start two builders on one root; one of them dies on its way, or both come to their end."""
    at = round.random.choice([None, round.random.randint(1, round.reference.build_operations)])
    arguments = (fault_subject.build, round.reference.images, round.root)
    children = [Child(*arguments), Child(*arguments, dies_at=at)]
    one, two = (child.end() for child in children)
    wanted = {"done", "died"} if at else {"done"}
    if one.how == "done" and two.how in wanted:
        return Struck()
    return Struck(broken="; ".join(f"{each.how}: {each.words}" for each in (one, two)))
