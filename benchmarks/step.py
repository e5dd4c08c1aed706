"""What a cache saves and what it costs in a training step of stage 2.

    python -m benchmarks.step [--teachers NAME ...] [--codecs NAME ...] [--json FILE]

A ViT-T/16 learns at 256 pixels from one teacher, in one process, float32, in four ways:

    A  student alone: pixels and normalised targets lie in memory
    B  images are read, decoded and augmented; targets lie in memory
    C  the real thing: images as in B, targets read from a store, decoded and normalised
    D  images as in B, the teacher runs in the loop

B, C and D are the batches of `pipelines.training.batches`, threads and prefetching included. Ways
take turns in blocks of steps: the first ones of a block use up what was made ahead during another
way's turn and are not timed, so every timed step pays for its own batch, in waiting or in sharing
the cores. Every fourth round has D and the teacher's forward alone. Ratios are medians over rounds,
each of two blocks' mean steps, with their bootstrap intervals. Stores are in the page cache
(benchmarks/read.py reads cold ones). ideal_ratio = (teacher's forward alone + B) / B is what D over
C can be.

Teachers: EfficientNet-Lite2, a ViT-B/16, and the proxy, 1.9 B parameters in bfloat16 (random
weights: times do not depend on them). The proxy's forward takes minutes a batch on a CPU: D has
`--proxy-depth` of its 50 equal blocks, and what one more block takes is measured and multiplied;
the row's note says so, and its share of the ideal is then next to B / C, no finding of its own.
CPUs without bfloat16 units multiply bfloat16 matrices so slowly that the linear layers do it in
float32 (benchmarks/proxy_step.py).
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from benchmarks import tables
from benchmarks.pairs import bootstrap
from benchmarks.step_subjects import (
    DATASET,
    POLICY,
    SIDE,
    SUBJECTS,
    Subject,
    block_seconds,
    fill,
    indexed,
    measured,
    render,
    tokens_of,
)
from benchmarks.training import TrainingStep, targets_of
from cache.reader import Reader
from cache.samples import Samples
from cache.shard_ranges import ShardRanges
from eupe.normalise import zscore
from eupe.teachers import Teacher
from pipelines.features.cached import CachedSource
from pipelines.features.live import LiveSource
from pipelines.features.sources import FeatureSource, Fetched, Normalisers, Targets
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe import family
from pipelines.recipe.config import WorkersConfig
from pipelines.recipe.draws import TrainingDraw
from pipelines.recipe.mix import Mix
from pipelines.recipe.resolutions import Resolutions
from pipelines.training.batches import Batch, Batches, Loader
from pipelines.training.feeds import Feed

PREFETCH = 1
SETTLE = PREFETCH + 1
"""Steps of a block that use batches made during another way's turn."""
TIMED = 3
LIVE_EVERY = 4
COLUMNS = {
    "teacher": "",
    "codec": "",
    "a_seconds": ".3f",
    "b_seconds": ".3f",
    "c_seconds": ".3f",
    "d_seconds": ".3f",
    "ideal_ratio": ".2f",
    "d_over_c": ".2f",
    "d_over_c_of_ideal": ".3f",
    "c_over_b": ".3f",
    "c_over_b_high": ".3f",
    "wait_share": ".1%",
}


@dataclass(frozen=True)
class Ready(Fetched):
    """Targets that are decoded already."""

    targets: dict[str, Targets]

    def decode(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Return the targets."""
        return self.targets


class InMemory(FeatureSource):
    """A feature source whose targets lie there already: every batch gets the same ones."""

    def __init__(self, samples: Samples, targets: Mapping[str, Targets]) -> None:
        self.samples, self._targets = samples, dict(targets)

    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""
        return {
            name: (each.summary.shape[-1], each.patches.shape[-1])
            for name, each in self._targets.items()
        }

    def shards(self) -> ShardRanges:
        """Return all shards of the dataset."""
        return self.samples.shards()

    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Mapping[str, int],
        canvases: np.ndarray | None = None,
    ) -> Fetched:
        """Bring nothing."""
        return Ready(np.ones(len(rows), bool), None, self._targets)


def batches(
    feed: Feed,
    samples: Samples,
    teacher: str,
    batch: int,
    threads: int,
    side: int = SIDE,
    prefetch: int = PREFETCH,
) -> Batches:
    """Return endless batches of a feed, made as in training; student and teacher see `side`."""
    shards = {DATASET.name: samples.shards()}
    return Batches(
        {DATASET.name: feed},
        TrainingDraw(Mix({DATASET.name: 1.0}, {}, batch, 0), shards, {DATASET.name: 1}, 0),
        lambda step: Resolutions(side, {teacher: side}),
        lambda scale, rows: rows,
        range(1_000_000),
        Loader(WorkersConfig(loader_threads=threads, prefetch_batches=prefetch)),
    )


class Way:
    """One way to do a step, timed in blocks: round -> mean seconds.

    Args:
        step: does it and returns the seconds it waited for its batch.
        settle: steps of a block that are not timed.
    """

    def __init__(self, step: Callable[[], float], settle: int) -> None:
        self._step, self._settle = step, settle
        self.seconds: dict[int, float] = {}
        self.waited: dict[int, float] = {}

    def run(self, number: int) -> None:
        """Do the block of a round."""
        for _ in range(self._settle):
            self._step()
        started = time.perf_counter()
        waited = sum(self._step() for _ in range(TIMED))
        self.seconds[number] = (time.perf_counter() - started) / TIMED
        self.waited[number] = waited / TIMED

    @property
    def median(self) -> float:
        """Median seconds."""
        return float(np.median(list(self.seconds.values())))

    @property
    def wait_share(self) -> float:
        """Share of the time that was waited."""
        return sum(self.waited.values()) / sum(self.seconds.values())


def learning(learn: TrainingStep, made: Iterator[Batch]) -> Way:
    """Return the way that takes a batch and learns from it."""

    def step() -> float:
        batch = next(made)
        learn(batch.pixels, batch.targets())
        return batch.wait_seconds

    return Way(step, SETTLE)


def looking(teacher: Teacher, batch: int) -> Way:
    """Return the way of the teacher alone: one forward."""
    pixels = torch.zeros(batch, 3, SIDE, SIDE, dtype=torch.uint8)

    def step() -> float:
        teacher(pixels)
        return 0.0

    return Way(step, 1)


def same_again(batch: Batch) -> Iterator[Batch]:
    """Return one batch for ever."""
    while True:
        yield batch


def measure(
    name: str, arguments: argparse.Namespace, root: Path, console: Console
) -> list[tables.Row]:
    """Measure one teacher with every codec."""
    subject = SUBJECTS[name](arguments)
    samples = indexed(root)
    drawn = render(samples)
    tokens = tokens_of(subject.stored, drawn, arguments.batch)
    moments = measured(tokens)
    normalisers = {name: Normalisers(*(zscore(each) for each in moments.values()))}
    reader = ImageReader(base(family.emoji("train").source))
    memory = InMemory(samples, {name: targets_of(tokens, slice(arguments.batch))})

    def made(source: FeatureSource) -> Batches:
        feed = Feed(source, reader, POLICY)
        return batches(feed, samples, name, arguments.batch, arguments.threads)

    learn = TrainingStep({name: (tokens.summary.shape[-1], tokens.patches.shape[-1])})
    streams = {"B": iter(made(memory))}
    for codec in arguments.codecs:
        digests = [view.digest for view in drawn]
        store = fill(root, subject.teacher.spec, codec, digests, tokens, moments)
        streams[codec] = iter(made(CachedSource({(name, SIDE): Reader(store)}, normalisers)))
    live = LiveSource(
        {name: subject.teacher}, samples, reader, POLICY, normalisers, arguments.batch
    )
    streams["D"] = iter(made(live))
    ways = {"A": learning(learn, same_again(next(streams["B"])))}
    ways |= {key: learning(learn, stream) for key, stream in streams.items()}
    ways["teacher"] = looking(subject.teacher, arguments.batch)
    for number in track(range(arguments.rounds), f"{name}: A, B, C, D", console=console):
        live_too = number % LIVE_EVERY == 0
        keys = [key for key in ways if live_too or key not in ("D", "teacher")]
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            ways[key].run(number)
    for stream in streams.values():
        stream.close()  # type: ignore[attr-defined]
    more = subject.missing_blocks * block_seconds(subject, arguments.batch)
    return rows_of(name, subject, ways, more, arguments.codecs)


def rows_of(
    name: str, subject: Subject, ways: Mapping[str, Way], more: float, codecs: Sequence[str]
) -> list[tables.Row]:
    """Turn times into rows.

    Args:
        name: of the teacher.
        subject: the teacher.
        ways: timed.
        more: seconds that the teacher's missing blocks would add to a forward.
        codecs: measured.
    """
    rows = []
    b, d, teacher = (ways[key].seconds for key in ("B", "D", "teacher"))
    for codec in codecs:
        c = ways[codec].seconds
        ratio = bootstrap([c[number] / b[number] for number in c])
        ideal = {number: (teacher[number] + more + b[number]) / b[number] for number in d}
        live = {number: (d[number] + more) / c[number] for number in d}
        share = bootstrap([live[number] / ideal[number] for number in d])
        rows.append(
            {
                "teacher": name,
                "codec": codec,
                "a_seconds": ways["A"].median,
                "b_seconds": ways["B"].median,
                "c_seconds": ways[codec].median,
                "d_seconds": ways["D"].median + more,
                "teacher_seconds": ways["teacher"].median + more,
                "ideal_ratio": float(np.median(list(ideal.values()))),
                "d_over_c": float(np.median(list(live.values()))),
                "d_over_c_of_ideal": share.median,
                "d_over_c_of_ideal_low": share.low,
                "d_over_c_of_ideal_high": share.high,
                "c_over_b": ratio.median,
                "c_over_b_low": ratio.low,
                "c_over_b_high": ratio.high,
                "wait_share": ways[codec].wait_share,
                "wait_share_b": ways["B"].wait_share,
                "rounds": len(c),
                "note": subject.note,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("step", __doc__)
    parser.add_argument("--teachers", nargs="+", choices=[*SUBJECTS], default=[*SUBJECTS])
    parser.add_argument("--codecs", nargs="+", default=["float16", "int8", "rot4"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=16, help="blocks of A, B and each C")
    parser.add_argument("--threads", type=int, default=2, help="that decode and draw")
    parser.add_argument("--proxy-depth", type=int, default=3, help="blocks of the proxy that run")
    arguments = parser.parse_args(argv)
    console = tables.console()
    table: list[tables.Row] = []
    for name in arguments.teachers:
        with tempfile.TemporaryDirectory(prefix="eupe-step-") as folder:
            table += measure(name, arguments, Path(folder), console)
    title = (
        f"ViT-T/16 at {SIDE}, batch {arguments.batch}, {torch.get_num_threads()} compute and "
        f"{arguments.threads} loader threads, {os.cpu_count()} cores, {platform.machine()}"
    )
    tables.show(table, COLUMNS, title, console, arguments.json)
    for note in dict.fromkeys(f"{row['teacher']}: {row['note']}" for row in table if row["note"]):
        console.print(note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
