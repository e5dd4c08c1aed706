"""What a round has shown: the command given again, and all that is left beside undisturbed work."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import fault_subject
from benchmarks.fault_children import Ended, in_child
from benchmarks.fault_kinds import FaultNotHad, Kind, Reference, Round, Struck
from benchmarks.fault_subject import Seen

REDONE_ALLOWED = 2


@dataclass
class Verdict:
    """What one round has shown; `said` has a line for each thing that is wrong or was refused."""

    kind: str
    lost_rows: int = 0
    duplicate_rows: int = 0
    silent_differences: int = 0
    refusals: int = 0
    mended: int = 0
    failures: int = 0
    shards_redone: int = 0
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """True if nothing is wrong."""
        wrong = self.lost_rows + self.duplicate_rows + self.silent_differences + self.failures
        return not wrong and self.shards_redone <= REDONE_ALLOWED

    def refuse(self, words: str, struck: Struck) -> None:
        """Take a refusal: it must name a file that was damaged."""
        if struck.is_named(words):
            self.refusals = 1
            self.said.append(f"refused: {words}")
        else:
            self.fail(f"refused, and names no file that was damaged: {words}")

    def fail(self, words: str) -> None:
        """Take note of a command that ended otherwise than it should have."""
        self.failures += 1
        self.said.append(words)

    def lose(self, rows: Sequence[str]) -> None:
        """Take note of what is absent."""
        self.lost_rows += len(rows)
        self.said += [f"lost: {what}" for what in rows[:3]]

    def differ(self, count: int, words: str) -> None:
        """Take note of differences that nobody names."""
        self.silent_differences += count
        if count:
            self.said.append(f"silent: {words}")


@dataclass(frozen=True)
class Undisturbed:
    """What undisturbed work gives.

    Attributes:
        reference: where it lies.
        seen: what is read of it.
        files: digest of every data file.
        trained: its losses and weights.
    """

    reference: Reference
    seen: Seen
    files: dict[str, str]
    trained: object


def run_round(kind: Kind, work: Undisturbed, round: Round) -> Verdict:
    """Have one fault happen, give the command again, judge."""
    verdict, started = Verdict(kind.name), time.monotonic()
    with round.stack:
        try:
            struck = kind.strike(round)
        except FaultNotHad as error:  # the other rounds are had all the same
            struck = Struck(broken=str(error))
        if struck.broken:
            verdict.fail(struck.broken)
        judge = judge_build if kind.then == "build" else judge_training
        judge(verdict, work, round, struck)
    verdict.seconds = time.monotonic() - started
    return verdict


def judge_build(verdict: Verdict, work: Undisturbed, round: Round, struck: Struck) -> None:
    """Build again; compare rows, samples, records and files with those of the undisturbed build."""
    look(verdict, work, round, struck)
    there = round.shards() if struck.there is None else struck.there
    done = build(round, struck)
    verdict.shards_redone = -(-redone(there, round.shards()) // struck.actors)
    if done.how == "refused" and struck.damaged:
        verdict.refuse(done.words, struck)
    elif done.how != "done":
        verdict.fail(f"given again, the build {done.how}: {done.words}")
    seen = look(verdict, work, round, struck)
    if done.how == "done":
        verdict.lose(lost_rows(seen, work))
    different = other_files(round, work) if done.how == "done" else []
    if different:
        found = in_child(fault_subject.problems, round.root)
        named = " ".join([*(found.result or {}), found.words, *seen.refused.values()])
        unnamed = [path for path in different if Path(path).name not in named]
        verdict.differ(len(unnamed), f"files differ, and verify is silent: {unnamed[:3]}")
        if len(unnamed) < len(different):
            verdict.refuse(named, struck)
    if struck.damaged and (different or done.how == "refused"):
        mend(verdict, work, round, struck)


def mend(verdict: Verdict, work: Undisturbed, round: Round, struck: Struck) -> None:
    """Repair and build: all is as it was, or it was said what is lost for good."""
    repaired = in_child(fault_subject.repair, round.root)
    if repaired.how != "done":
        verdict.fail(f"repair {repaired.how}: {repaired.words}")
        return
    if struck.is_named(" ".join(repaired.result)):
        verdict.said.append(f"lost for good: {repaired.result[0]}")
        return
    done = build(round, struck)
    seen = look(verdict, work, round, struck)
    if done.how != "done":
        verdict.fail(f"after repair, the build {done.how}: {done.words}")
    elif seen.refused or lost_rows(seen, work) or other_files(round, work):
        wrong = [*seen.refused.values(), *lost_rows(seen, work), *other_files(round, work)]
        verdict.fail(f"repair has not mended it, and says nothing: {wrong[:3]}")
    else:
        verdict.mended = 1


def build(round: Round, struck: Struck) -> Ended:
    """Give the command again: that of all pictures, where they are all there."""
    indexed = (fault_subject.ALL,) if struck.damaged else fault_subject.GROWING
    return in_child(fault_subject.build, round.reference.images, round.root, indexed)


def lost_rows(seen: Seen, work: Undisturbed) -> list[str]:
    """Return what undisturbed work has, and nobody refuses, and is not there."""
    return [
        what
        for what in work.seen.values
        if what not in seen.values and not any(map(what.startswith, seen.refused))
    ]


def other_files(round: Round, work: Undisturbed) -> list[str]:
    """Return the data files that are not those of undisturbed work."""
    files = fault_subject.data_files(round.root)
    both = sorted(files.keys() | work.files.keys())
    return [path for path in both if files.get(path) != work.files.get(path)]


def look(verdict: Verdict, work: Undisturbed, round: Round, struck: Struck) -> Seen:
    """Read everything that is there: each value is as it was, or refused by name."""
    ended = in_child(fault_subject.look, round.root, work.reference.specs)
    if ended.how != "done":
        verdict.fail(f"reading {ended.how}: {ended.words}")
        return Seen()
    seen: Seen = ended.result
    other = [
        what for what, value in seen.values.items() if work.seen.values.get(what, value) != value
    ]
    new = [what for what in seen.values if what not in work.seen.values]
    verdict.differ(len(other) + len(new), f"other values read: {(other + new)[:3]}")
    verdict.duplicate_rows += seen.twice
    for words in set(seen.refused.values()):
        verdict.refuse(words, struck)
    return seen


def redone(before: Mapping[Path, int], now: Mapping[Path, int]) -> int:
    """Count the shards that lay there and were computed again, over views and stores."""
    again = [path for path, inode in before.items() if now.get(path, inode) != inode]
    return len({path.name for path in again})


def judge_training(verdict: Verdict, work: Undisturbed, round: Round, struck: Struck) -> None:
    """Train on; losses and weights must be those of the undisturbed training, bit for bit."""
    done = in_child(fault_subject.train, work.reference.images, round.root)
    if done.how == "done":
        verdict.differ(done.result != work.trained, "losses or weights differ")
    elif done.how == "refused" and struck.damaged:
        verdict.refuse(done.words, struck)
    else:
        verdict.fail(f"given again, the training {done.how}: {done.words}")
