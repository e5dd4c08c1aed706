"""The kinds of fault, in one table: each readies a root, has a fault happen, says what it did.

A kind is a function in KINDS: adding one is adding a function with `@kind`, here (ends of
processes), in `fault_files`, in `fault_clusters` or in `fault_buckets`.
"""

import random
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from benchmarks import fault_subject
from benchmarks.fault_children import Ended, in_child
from eupe.spec import StoreSpec

PATCHES = "cache/*/*/*/*/view-*/c.*"
"""Where files of patches lie below a root: one a shard, view and store."""
FOLDER_WILL_DO = ("HEAD", "config.json", "spec.json")
SIGNALS = {"killed": signal.SIGKILL, "terminated": signal.SIGTERM}


class FaultNotHad(Exception):
    """What a fault should have happened to did not come so far: on a busy machine, say."""


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
    def num_shards(self) -> int:
        """Files of patches of undisturbed work."""
        return len(list(self.root.glob(PATCHES)))

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
        there: the shards that lay there when the fault happened, see `Round.shards`; None: those
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


@dataclass
class Round:
    """One round: a root of its own, and what its fault is drawn by.

    Attributes:
        reference: undisturbed work.
        root: of this round, in a folder or in a bucket; is not there yet.
        random: draws the moment and the place of the fault.
        stack: undoes what outlives the fault, at the round's end.
        stamp: of a file of patches -> what changes when it is written anew.
    """

    reference: Reference
    root: Path
    random: random.Random
    stack: ExitStack = field(default_factory=ExitStack)
    stamp: Callable[[Path], int] = lambda path: path.stat().st_ino

    def copy(self, *parts: str) -> None:
        """Begin with undisturbed work: "cache"; "run" and "stages", which the run's links name."""
        for part in parts:
            shutil.copytree(self.reference.root / part, self.root / part, symlinks=True)

    def shards(self) -> dict[Path, int]:
        """Return which files of patches lie below the root, with their stamps."""
        found = self.root.glob(PATCHES)
        return {path.relative_to(self.root): self.stamp(path) for path in found}

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


def died(ended: Ended, *others: str) -> Struck:
    """Say that a process has died as it should have, or how it ended instead.

    Args:
        ended: how it has.
        others: that it may have.
    """
    as_wanted = ended.how in ("died", *others)
    return Struck(broken="" if as_wanted else f"{ended.how}: {ended.words}")


def _writer(by: str) -> None:
    @kind(f"writer {by}")
    def strike(round: Round) -> Struck:
        at = round.random.randint(1, round.reference.build_operations)
        return died(round.child("build", at, by))


def _trainer(by: str) -> None:
    @kind(f"training worker {by}", then="train")
    def strike(round: Round) -> Struck:
        round.copy("cache")
        at = round.random.randint(1, round.reference.train_operations)
        # SIGTERM, unless it comes too early or too late for that, has it save and end in order.
        others = ("ended",) if by == "terminated" else ()
        return died(round.child("train", at, by), *others)


for _by in SIGNALS:
    _writer(_by)
    _trainer(_by)
