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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import fault_clusters, fault_subject, tables
from benchmarks.fault_buckets import BUCKET
from benchmarks.fault_children import Ended, in_child, num_operations, start_server
from benchmarks.fault_kinds import KINDS, Kind, Reference, Round
from benchmarks.fault_verdicts import Undisturbed, Verdict, run_round

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
    # Draws that are repeatable, not secret.
    chosen = drawn(kinds, arguments.rounds, random.Random(f"faults/kinds/{arguments.seed}"))  # noqa: S311
    verdicts = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("undisturbed", total=len(chosen) - arguments.first)
        work = undisturbed(folder)
        for number, kind in list(enumerate(chosen))[arguments.first :]:
            progress.update(task, description=kind.name)
            draws = random.Random(f"faults/round/{arguments.seed}/{number}")  # noqa: S311
            round = Round(work.reference, folder / f"round-{number}", draws)
            verdict = run_round(kind, work, round)
            verdicts.append(verdict)
            if not verdict.sound or arguments.verbose:
                took = f"{verdict.seconds:.0f} s, {'sound' if verdict.sound else 'NOT sound'}"
                for line in [took, *verdict.said]:
                    console.print(f"{number} {kind.name}: {line}", highlight=False, markup=False)
            shutil.rmtree(folder / f"round-{number}", ignore_errors=True)
            progress.advance(task)
            write(arguments.json, verdicts)
    return verdicts


def write(path: Path | None, verdicts: Sequence[Verdict]) -> None:
    """Write the figures of the rounds so far: a campaign that is cut off leaves them."""
    if path is not None:
        seconds = sum(verdict.seconds for verdict in verdicts)
        path.write_text(json.dumps(summary(verdicts, seconds), indent=2) + "\n")


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
    parser.add_argument("--first", type=int, default=0, help="go on with this round of them")
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="no kind that starts a cluster")
    parser.add_argument(
        "--verbose", action="store_true", help="say what every round took and refused"
    )
    arguments = parser.parse_args(argv)
    console, started = tables.console(), time.monotonic()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eupe-faults-")))
        os.environ |= {"OMP_NUM_THREADS": "1", **fault_clusters.settings(folder)}
        stack.callback(fault_clusters.NODES.close)
        stack.enter_context(BUCKET.served(folder))
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
