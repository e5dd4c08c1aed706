"""What cached targets cost a training step on the device, for `benchmarks.gpu`.

`benchmarks.step` with the loop itself (`pipelines.training.loop`), whose batches come from one way
after the other, in turns:

    A  student alone: the same pixels and targets every time, on the device
    B  pixels are read from a store, targets lie on the device
    C  the real thing: pixels and targets are read from stores, targets decoded and normalised there

The teacher is of the proxy's shape, its features are made up. c_over_b is the median over rounds of
the mean step of C over that of B. What a step leaves the device idle is 1 - (what its kernels and
copies cover, in profiled steps) / (the step, unprofiled).
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import polars as pl
import torch

from benchmarks.gpu_bench import Bench, Busy
from benchmarks.pairs import bootstrap
from benchmarks.step import InMemory, batches
from benchmarks.step_subjects import DATASET, POLICY, fill, measured
from benchmarks.tables import Row
from benchmarks.training import smooth_features, targets_of
from cache.reader import Reader
from cache.samples import Samples
from cache.store import Store
from eupe.costs import cost
from eupe.encoders import Features, shapes
from eupe.normalise import zscore
from eupe.pixels import RGB
from eupe.spec import EncoderSpec, TeacherSpec
from eupe.students import FAMILY
from pipelines.features.cached import CachedSource
from pipelines.features.sources import FeatureSource, Normalisers, Targets
from pipelines.images.reader import ImageReader
from pipelines.recipe import family
from pipelines.recipe.config import PIXELS, Recipe, StudentConfig
from pipelines.records import tracking
from pipelines.training.batches import Batch
from pipelines.training.feeds import Feed
from pipelines.training.inputs import Inputs
from pipelines.training.loop import train_stage

TEACHER = "proxy"
STUDENTS = ("eupe_vits16", "eupe_vitb16", "eupe_vitt16", "eupe_convnext_tiny")
WARM = 3
"""First steps of a run, in which kernels are chosen and compiled."""
PREFETCH = 2
"""Batches that are made ahead, each by a thread."""
SETTLE = PREFETCH + 1
TIMED = 3
ROWS_PER_SHARD = 64
COLUMNS = {
    "student": "",
    "resolution": "",
    "compiled": "",
    "codec": "",
    "a_ms": ".1f",
    "b_ms": ".1f",
    "c_ms": ".1f",
    "c_over_b": ".3f",
    "images_per_s": ".0f",
    "utilisation": ".1%",
    "idle_a": ".1%",
    "idle_c": ".1%",
    "peak_gib": ".1f",
}


class Case(NamedTuple):
    """One student at one input side in pixels, with rows a step."""

    name: str
    encoder: EncoderSpec
    side: int
    batch: int


def cases(small: bool) -> list[Case]:
    """Return what is measured; as many tokens a step at either side."""
    if small:
        arguments = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        vit = FAMILY["eupe_vitt16"].model_copy(update={"model_arguments": arguments})
        return [Case("vit", vit, side, 4) for side in (32, 64)]
    return [
        Case(name, FAMILY[name], side, batch)
        for side, batch in ((256, 256), (512, 64))
        for name in STUDENTS
    ]


@dataclass(frozen=True)
class Stores:
    """Stores of made-up features and pixels at one side.

    Attributes:
        samples: of the dataset.
        feeds: codec -> how its batches are read.
        known: decoded targets of as many rows as a batch has at most, on the device.
        in_memory: (source) -> how batches are read whose targets it has.
        dims: (summary width, patch width) of the teacher.
        normalisers: of the teacher.
    """

    samples: Samples
    feeds: Mapping[str, Feed]
    known: Targets
    in_memory: Callable[[FeatureSource], Feed]
    dims: tuple[int, int]
    normalisers: Normalisers


class Step:
    """The section's measurements, which share their stores."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._made: dict[int, Stores] = {}

    def measure(self, compiled: bool) -> None:
        """Measure every case."""
        for case in cases(self._bench.small)[: 1 if compiled and self._bench.small else None]:
            label = f"{case.name} at {case.side}, compiled {compiled}"
            self._bench.do(label, partial(self._fitting, case, compiled))

    def _fitting(self, case: Case, compiled: bool) -> list[Row]:
        """Measure a case, with fewer rows a step if those are too many for the device."""
        try:
            return self._measured(case, compiled)
        except torch.OutOfMemoryError:
            if case.batch < 2:
                raise
        gc.collect()
        torch.cuda.empty_cache()
        return self._fitting(case._replace(batch=case.batch // 2), compiled)

    def _measured(self, case: Case, compiled: bool) -> list[Row]:
        bench = self._bench
        if case.side not in self._made:
            self._made[case.side] = stores(bench, case)
        given = self._made[case.side]
        threads = max(1, min(8, torch.get_num_threads()))
        known = Targets(*(each[: case.batch] for each in given.known))
        feeds = {"B": given.in_memory(InMemory(given.samples, {TEACHER: known})), **given.feeds}
        streams = {
            way: iter(
                batches(feed, given.samples, TEACHER, case.batch, threads, case.side, PREFETCH)
            )
            for way, feed in feeds.items()
        }
        still = next(streams["B"])
        still = replace(still, pixels=still.pixels.to(bench.device))
        turns = Turns(bench, {"A": iter(partial(_same, still), None), **streams})
        name = f"step-{case.name}-{case.side}-{case.batch}-{compiled}"
        run = recipe(case, bench.folder / name, len(turns), compiled, bench.small)
        inputs = Inputs(turns, {TEACHER: given.dims}, {TEACHER: given.normalisers}, {}, {})
        try:
            with bench.peak_memory() as peak:
                train_stage(
                    run, run.stage("stage2"), inputs, bench.folder / name, device=bench.device
                )
        finally:
            for stream in streams.values():
                stream.close()  # type: ignore[attr-defined]
        flops = 3 * 2 * case.batch * multiply_adds(case, given.dims)
        dtype = "float32" if bench.small else "bfloat16"
        (*_, last) = tracking.read(bench.folder / name / tracking.METRICS_FILE)
        return [
            {
                "student": case.name,
                "resolution": case.side,
                "batch": case.batch,
                "compiled": compiled,
                "codec": codec,
                **turns.row(codec),
                "images_per_s": case.batch / turns.median(codec),
                "utilisation": flops / turns.median("A") / bench.peak[dtype],
                "peak_gib": peak[0],
                "loss": last["loss/total"],
            }
            for codec in bench.codecs
        ]


def _same(batch: Batch) -> Batch:
    return batch


class Turns:
    """Batches of several ways, in turns of blocks; how long a step of each took.

    A step is timed from the loop's asking for its batch to its asking for the next one, so waiting
    and everything that the loop does is in it. The first steps of a block use up what was made
    ahead during another way's turn and are not timed.

    Args:
        bench: whose device it is.
        streams: way -> its endless batches.
    """

    def __init__(self, bench: Bench, streams: Mapping[str, Iterator[Batch]]) -> None:
        self._bench, self._streams = bench, streams
        self._rounds = 1 if bench.small else bench.rounds
        self.seconds: dict[str, list[float]] = {way: [] for way in streams}
        self.waited: dict[str, list[float]] = {way: [] for way in streams}
        self.busy: dict[str, Busy] = {}
        self.first_seconds = math.nan

    def __len__(self) -> int:
        return WARM + (self._rounds + 1) * len(self._streams) * (SETTLE + TIMED)

    def __call__(self, steps: range) -> Iterator[Batch]:
        """Yield the batches of the loop's steps."""
        numbers = iter(steps)
        started = perf_counter()
        for _ in range(WARM):
            yield from self._next("A", numbers)
            if math.isnan(self.first_seconds):
                self.first_seconds = perf_counter() - started
        ways = [*self._streams]
        for turn in range(self._rounds):
            for way in ways[turn % len(ways) :] + ways[: turn % len(ways)]:
                yield from self._block(way, numbers)
        for way in ways:
            yield from self._profiled(way, numbers)

    def _next(self, way: str, numbers: Iterator[int]) -> Iterator[Batch]:
        asked = perf_counter()
        batch = next(self._streams[way])
        yield replace(batch, step=next(numbers), wait_seconds=perf_counter() - asked)

    def _block(self, way: str, numbers: Iterator[int]) -> Iterator[Batch]:
        for _ in range(SETTLE):
            yield from self._next(way, numbers)
        started, waited = perf_counter(), 0.0
        for _ in range(TIMED):
            for batch in self._next(way, numbers):
                waited += batch.wait_seconds
                yield batch
        self.seconds[way].append((perf_counter() - started) / TIMED)
        self.waited[way].append(waited / TIMED)

    def _profiled(self, way: str, numbers: Iterator[int]) -> Iterator[Batch]:
        for _ in range(SETTLE):
            yield from self._next(way, numbers)
        with self._bench.profiled(TIMED) as found:
            for _ in range(TIMED):
                yield from self._next(way, numbers)
        self.busy[way] = found[0]

    def median(self, way: str) -> float:
        """Return the median step of a way, seconds."""
        return float(np.median(self.seconds[way]))

    def row(self, codec: str) -> Row:
        """Return what was found of one codec, beside A and B."""
        ratio = bootstrap(
            [c / b for c, b in zip(self.seconds[codec], self.seconds["B"], strict=True)]
        )
        row: Row = {
            "a_ms": self.median("A") * 1e3,
            "b_ms": self.median("B") * 1e3,
            "c_ms": self.median(codec) * 1e3,
            "c_over_b": ratio.median,
            "c_over_b_low": ratio.low,
            "c_over_b_high": ratio.high,
            "wait_share_b": sum(self.waited["B"]) / sum(self.seconds["B"]),
            "wait_share": sum(self.waited[codec]) / sum(self.seconds[codec]),
            "first_step_seconds": self.first_seconds,
        }
        for name, way in (("a", "A"), ("b", "B"), ("c", codec)):
            busy = self.busy[way]
            row |= {
                f"idle_{name}": busy.idle_share(self.median(way)),
                f"kernels_{name}": busy.kernels,
                f"kernel_ms_{name}": busy.seconds * 1e3,
                f"copy_ms_{name}": busy.copy_seconds * 1e3,
            }
        return row


def stores(bench: Bench, case: Case) -> Stores:
    """Make up features and pixels for a side, and write their stores."""
    side, root = case.side, bench.folder / f"stores-{case.side}"
    width, patch, count = (24, 16, 12) if bench.small else (1536, 16, 3 * case.batch)
    grid = side // patch
    samples = Samples.append(root, DATASET, _table(count), ROWS_PER_SHARD)
    digests = [f"view of {row}" for row in range(count)]
    patches = smooth_features(count, grid, width, bench.device)
    tokens = Features(patches.mean((1, 2)), patches)
    moments = measured(tokens)
    normalisers = Normalisers(*(zscore(each) for each in moments.values()))
    spec = TeacherSpec(name=TEACHER, encoder=EncoderSpec(architecture="made_up"), weights="0" * 64)
    generator = torch.Generator(bench.device).manual_seed(1)
    colours = torch.randint(
        0, 256, (count, side, side, 3), generator=generator, device=bench.device
    ).float()
    views = Features(colours.mean((1, 2)), colours)
    rgb = TeacherSpec(name=PIXELS, encoder=RGB, weights="0" * 64)
    pixels = {side: Reader(fill(root, rgb, "uint8", digests, views, measured(views), side))}

    def feed(source: FeatureSource) -> Feed:
        return Feed(source, ImageReader(str(root)), POLICY, pixels)

    def cached(store: Store) -> Feed:
        return feed(CachedSource({(TEACHER, side): Reader(store)}, {TEACHER: normalisers}))

    known = Targets(
        *(each.to(bench.device).clone() for each in targets_of(tokens, slice(case.batch)))
    )
    feeds = {
        codec: cached(fill(root, spec, codec, digests, tokens, moments, side))
        for codec in bench.codecs
    }
    return Stores(samples, feeds, known, feed, (width, width), normalisers)


def _table(count: int) -> pl.DataFrame:
    """Return a sample table of pictures that lie nowhere."""
    names = [f"made-up/{row:06d}" for row in range(count)]
    return pl.DataFrame(
        {
            "sample_id": names,
            "uri": [f"{name}.png" for name in names],
            "offset": [0] * count,
            "bytes": [1] * count,
            "digest": [row.to_bytes(32, "big") for row in range(count)],
            "labels": ["{}"] * count,
        }
    )


def recipe(case: Case, directory: Path, steps: int, compiled: bool, small: bool) -> Recipe:
    """Return the paper's stage 2 of so many steps, in one process, from one teacher."""
    whole = family.full(case.name if case.name in FAMILY else STUDENTS[0])
    stage = whole.stage("stage2").model_copy(
        update={
            "teachers": (TEACHER,),
            "teacher_resolutions": {TEACHER: (case.side,)},
            "student_resolutions": (case.side,),
            "steps": steps,
            "global_batch": case.batch,
            "micro_batch": case.batch,
            "head_hidden": 32 if small else 3072,
            "warmup_steps": 1,
            "compile": compiled,
            "precision": "float32" if small else "bfloat16",
            "log_every": steps,
            "checkpoint_every": steps,
            "evaluate_every": None,
        }
    )
    return whole.model_copy(
        update={
            "run_directory": str(directory),
            "student": StudentConfig(name=case.name, encoder=case.encoder),
            "stages": {"stage2": stage},
        }
    )


def multiply_adds(case: Case, dims: tuple[int, int]) -> int:
    """Return those of one picture's way through student and heads."""
    found, hidden = shapes(case.encoder, case.side), 3072
    heads: Sequence[tuple[int, int, int]] = (
        (1, found.summary_dim, dims[0]),
        (found.grid[0] * found.grid[1], found.patch_dim, dims[1]),
    )
    own = sum(tokens * hidden * (into + out) for tokens, into, out in heads)
    return cost(case.encoder, case.side).multiply_adds + own
