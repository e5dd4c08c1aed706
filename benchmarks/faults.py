"""What is left after faults: processes killed, disks full, files damaged, a hundred times over.

    python -m benchmarks.faults [--rounds 100] [--seed 1] [--kinds NAME...] [--quick] [--json FILE]

A round has one fault of one kind, drawn by the seed, happen to a small build or training. Then the
same command is given again, and what lies there is compared with undisturbed work: every data file
byte for byte, every sample and row as it is read, every loss. Of a file that was damaged a refusal
that names it is as good, and `eupe cache repair` then mends it or says what is lost. Each kind
occurs as often as the next; slow ones (clusters of their own) once.

    lost_rows                   wanted, and absent after the command was given again
    duplicate_rows              samples, records or rows that are there twice
    silent_differences          values read, losses or files that differ, and nobody says so
    refusals                    rounds in which a damaged file was refused, by name
    mended                      of them, those after which `repair` and a build made all as it was
    failures                    commands that ended otherwise than they should have
    max_shards_redone_per_actor shards computed again although they had been committed or begun

Exit code 1 if one of the first three, or a failure, is above 0, or the last above 2.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import fault_clusters, fault_subject, tables
from benchmarks.fault_children import Ended, in_child, num_operations, start_server
from benchmarks.fault_kinds import KINDS, Kind, Reference, Round, Struck, shard_files
from benchmarks.fault_subject import Seen

REDONE_ALLOWED = 2
COLUMNS = {
    "kind": "",
    "rounds": "",
    "refusals": "",
    "mended": "",
    "lost_rows": "",
    "duplicate_rows": "",
    "silent_differences": "",
    "failures": "",
    "shards_redone": "",
    "seconds": ".1f",
}


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


def undisturbed(folder: Path) -> Undisturbed:
    """Do the work once without a fault, and once more for other pictures."""
    images, root = folder / "images", folder / "undisturbed"
    fault_subject.lay_out(images, 0)
    fault_subject.lay_out(folder / "twin-images", len(fault_subject.PARTS) * 10)
    result = required(in_child(fault_subject.build, images, root))
    for words in ((fault_subject.build, images), (fault_subject.train, images)):
        required(in_child(words[0], words[1], root))
    for work in (fault_subject.build, fault_subject.train):
        required(in_child(work, folder / "twin-images", folder / "twin"))
    operations = [
        required(in_child(num_operations, work, images, folder / "counted"))
        for work in (fault_subject.build, fault_subject.train)
    ]
    in_child(fault_subject.build, images, folder / "half", dies_at=operations[0] // 2)
    specs = tuple(result["specs"])
    return Undisturbed(
        Reference(folder, specs, *operations),
        required(in_child(fault_subject.look, root, specs)),
        dict(fault_subject.data_files(root)),
        required(in_child(fault_subject.train, images, root)),
    )


def required(ended: Ended) -> Any:
    """Return what undisturbed work returned.

    Raises:
        RuntimeError: it did not come to its end.
    """
    if ended.how != "done":
        raise RuntimeError(f"work without a fault {ended.how}: {ended.words}")
    return ended.result


def run_round(kind: Kind, work: Undisturbed, round: Round) -> Verdict:
    """Have one fault happen, give the command again, judge."""
    verdict, started = Verdict(kind.name), time.monotonic()
    with round.stack:
        struck = kind.strike(round)
        if struck.broken:
            verdict.fail(struck.broken)
        judge = judge_build if kind.then == "build" else judge_training
        judge(verdict, work, round, struck)
    verdict.seconds = time.monotonic() - started
    return verdict


def judge_build(verdict: Verdict, work: Undisturbed, round: Round, struck: Struck) -> None:
    """Build again; compare rows, samples, records and files with those of the undisturbed build."""
    look(verdict, work, round, struck)
    there = shard_files(round.root) if struck.there is None else struck.there
    done = build(round, struck)
    verdict.shards_redone = -(-redone(there, shard_files(round.root)) // struck.actors)
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


def drawn(kinds: Sequence[Kind], rounds: int, draws: random.Random) -> list[Kind]:
    """Draw the kinds of so many rounds: each once, in another order; quick ones again and again."""
    chosen: list[Kind] = []
    while len(chosen) < rounds:
        again = [kind for kind in kinds if not (kind.slow and chosen)] or list(kinds)
        chosen += draws.sample(again, min(len(again), rounds - len(chosen)))
    draws.shuffle(chosen)
    return chosen


def campaign(arguments: argparse.Namespace, folder: Path, console: Console) -> list[Verdict]:
    """Run all rounds."""
    start_server()
    asked = [KINDS[name] for name in arguments.kinds or KINDS]
    kinds = [kind for kind in asked if not (arguments.quick and kind.slow)]
    chosen = drawn(kinds, arguments.rounds, random.Random(f"faults/kinds/{arguments.seed}"))
    verdicts = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("undisturbed", total=len(chosen))
        work = undisturbed(folder)
        for number, kind in enumerate(chosen):
            progress.update(task, description=kind.name)
            draws = random.Random(f"faults/round/{arguments.seed}/{number}")
            round = Round(work.reference, folder / f"round-{number}", draws)
            verdict = run_round(kind, work, round)
            verdicts.append(verdict)
            if not verdict.sound or arguments.verbose:
                for line in verdict.said:
                    console.print(f"{number} {kind.name}: {line}", highlight=False, markup=False)
            shutil.rmtree(round.root, ignore_errors=True)
            progress.advance(task)
    return verdicts


def summary(verdicts: Sequence[Verdict], seconds: float) -> dict[str, Any]:
    """Return the figures of all rounds, with those of each kind."""
    kinds: dict[str, tables.Row] = {}
    for verdict in verdicts:
        counts = Counter(
            rounds=1,
            refusals=verdict.refusals,
            mended=verdict.mended,
            lost_rows=verdict.lost_rows,
            duplicate_rows=verdict.duplicate_rows,
            silent_differences=verdict.silent_differences,
            failures=verdict.failures,
        )
        row = kinds.setdefault(verdict.kind, {"seconds": 0.0, "shards_redone": 0})
        row |= {name: int(str(row.get(name, 0))) + count for name, count in counts.items()}
        row["shards_redone"] = max(int(str(row["shards_redone"])), verdict.shards_redone)
        row["seconds"] = float(str(row["seconds"])) + verdict.seconds
    total = {
        name: sum(int(str(row[name])) for row in kinds.values())
        for name in (
            "lost_rows",
            "duplicate_rows",
            "silent_differences",
            "refusals",
            "mended",
            "failures",
        )
    }
    return {
        "rounds": len(verdicts),
        "kinds": kinds,
        **total,
        "max_shards_redone_per_actor": max(verdict.shards_redone for verdict in verdicts),
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("faults", __doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="no kind that starts a cluster")
    parser.add_argument("--verbose", action="store_true", help="say what every round refused")
    arguments = parser.parse_args(argv)
    console, started = tables.console(), time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eupe-faults-")))
        os.environ |= {"OMP_NUM_THREADS": "1", **fault_clusters.settings(folder)}
        stack.callback(fault_clusters.NODES.close)
        verdicts = campaign(arguments, folder, console)
    found = summary(verdicts, time.monotonic() - started)
    rows = [{"kind": name, **row} for name, row in sorted(found["kinds"].items())]
    title = f"{len(verdicts)} faults, seed {arguments.seed}, {found['seconds']:.0f} s"
    tables.show(rows, COLUMNS, title, console, None)
    console.print({name: value for name, value in found.items() if name != "kinds"})
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(verdict.sound for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
