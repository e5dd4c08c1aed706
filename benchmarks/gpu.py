"""What this project makes of a GPU, in one command, for the day one is at hand.

    python -m benchmarks.gpu [--minutes 5] [--cpu] [--json FILE]
        [--sections NAME ...] [--labels TEXT ...] [--codecs NAME ...] [--rounds 3]

No network, no Ray and no Prefect: all of it runs in this process, on one device. Sections, in order
of value:

    machine     what its matrix products and copies reach: the others are shares of that
    tests       those marked gpu
    step        a training step of stage 2 at 256 and 512 px, ViT-S, B, T and ConvNeXt-T: alone, and
                with cached targets (c_over_b), idle share, peak memory (benchmarks/gpu_step.py)
    codecs      decoding, plain and fused, and encoding: GB/s of float32 tokens, error to the oracle
    extraction  teachers of random weights beside their matmul-bound time; with and without streams
    loss        of one teacher: passes over memory, peak memory; also compiled
    compiled    as step, its blocks, heads and loss by torch.compile
    build       a build of real pictures, one process, decoding included

A section has a share of the minutes; what it has not begun by then is left out and named. Those of
--sections are done in the order given; with --labels each may take all the time there is. A fault
is written down with its traceback, the rest goes on, and the exit code is 1. The file is written
after every measurement, so a time-out loses the one under way. Timings of kernels are the
profiler's. --cpu runs everything small, to see that it runs.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks import gpu_codecs, gpu_extraction, gpu_loss, gpu_machine, gpu_step, tables
from benchmarks.gpu_bench import CODECS, ROUNDS, Bench

SHARES = {
    "machine": 0.08,
    "tests": 0.25,
    "step": 0.35,
    "codecs": 0.15,
    "extraction": 0.25,
    "loss": 0.1,
    "compiled": 0.5,
    "build": 0.15,
}
"""Of the minutes that a section may begin something in; together more than all, as most need less
than theirs."""
LABELLED = {"step", "codecs", "extraction", "loss", "compiled"}
"""Sections of several measurements, of which --labels picks."""
TABLES: dict[str, Mapping[str, str]] = {
    "machine": {"what": "", "per_s": ".3e"},
    "step": gpu_step.COLUMNS,
    "codecs": gpu_codecs.COLUMNS,
    "extraction": gpu_extraction.COLUMNS,
    "loss": gpu_loss.COLUMNS,
    "compiled": gpu_step.COLUMNS,
    "build": gpu_extraction.BUILD_COLUMNS,
}


def sections(bench: Bench) -> dict[str, Callable[[], None]]:
    """Return section -> what it does, in order of value."""
    step = gpu_step.Step(bench)
    return {
        "machine": lambda: gpu_machine.measure(bench),
        "tests": lambda: gpu_machine.run_tests(bench),
        "step": lambda: step.measure(compiled=False),
        "codecs": lambda: gpu_codecs.measure(bench),
        "extraction": lambda: gpu_extraction.measure(bench),
        "loss": lambda: gpu_loss.measure(bench),
        "compiled": lambda: step.measure(compiled=True),
        "build": lambda: gpu_extraction.build(bench),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("gpu", __doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="to be done in")
    parser.add_argument("--cpu", action="store_true", help="everything small, on the CPU")
    parser.add_argument("--sections", nargs="+", choices=[*SHARES], default=[*SHARES])
    parser.add_argument("--labels", nargs="+", default=[], help="measure what these are part of")
    parser.add_argument("--codecs", nargs="+", default=[*CODECS], help="that a step reads")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="over ways of a step")
    asked = parser.parse_args(argv)
    if not asked.cpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --cpu runs it small on the CPU")
    device = torch.device("cpu" if asked.cpu else "cuda:0")
    if asked.cpu:  # what is asked to be compiled runs as it is: a C++ compiler takes minutes
        torch.compiler.set_stance("force_eager")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="eupe-gpu-") as folder:
        ends = started + 60 * asked.minutes
        bench = Bench(
            device,
            asked.cpu,
            ends,
            Path(folder),
            asked.json,
            codecs=asked.codecs,
            rounds=asked.rounds,
        )
        bench.found |= {"machine": gpu_machine.describe(device), "asked": vars(asked)}
        measures = sections(bench)
        # Shares want the machine's peaks, whatever else is asked for.
        for name in dict.fromkeys(["machine", *asked.sections]):
            bench.labels = asked.labels if name in LABELLED else []
            share = 1.0 if asked.labels else SHARES[name]
            with bench.section(name, 60 * asked.minutes * share):
                measures[name]()
        bench.found |= {"seconds": time.monotonic() - started, "peak": bench.peak, "ended": True}
        bench.write()
    return report(bench)


def report(bench: Bench) -> int:
    """Print short tables and every fault; return the exit code."""
    out = tables.console()
    for name, columns in TABLES.items():
        if rows := bench.rows(name):
            tables.show(rows, columns, name, out, None)
    for row in bench.rows("tests"):
        out.print(f"tests: {row['said'][-1]}")  # type: ignore[index]
    for name, labels in bench.left_out.items():
        out.print(f"left out of {name}, no time: {', '.join(labels)}")
    for where, text in bench.faults.items():
        out.print(f"FAULT in {where}: {text.strip().splitlines()[-1]}", markup=False)
    return 1 if bench.faults else 0


if __name__ == "__main__":
    sys.exit(main())
