"""What a cache saves and what it costs in a training step of stage 2.

    python -m benchmarks.step [--teachers NAME ...] [--codecs NAME ...] [--json FILE]

A ViT-T/16 learns at 256 pixels from one teacher, in one process, float32, in four ways:

    A  student alone: pixels and normalised targets lie in memory
    B  images are read, decoded and augmented; targets lie in memory
    C  the real thing: images as in B, targets read from a store, decoded and normalised
    D  images as in B, the teacher runs in the loop

B, C and D are the batches of `pipelines.batches`, threads and prefetching included; A, B and the
Cs of all codecs take turns, so c_over_b is a median over interleaved steps with its bootstrap
interval. ideal_ratio = (teacher's forward alone + B) / B is what D over C can be at most.

Teachers: EfficientNet-Lite2, a ViT-B/16, and the proxy, 1.9 B parameters in bfloat16 (random
weights: times do not depend on them). The proxy's forward takes minutes a batch on a CPU: D has
`--proxy-depth` of its 50 equal blocks, and what one more block takes is measured and multiplied;
the row's note says so. CPUs without bfloat16 units multiply bfloat16 matrices so slowly that the
linear layers do it in float32 (benchmarks/proxy_step.py).
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import track

from benchmarks import proxy_step, tables
from benchmarks.pairs import bootstrap
from benchmarks.training import TrainingStep, targets_of
from cache.codec import default_codec
from cache.reader import Reader
from cache.samples import Samples
from cache.store import Store, create_store
from cache.writer import write_shard
from eupe import views
from eupe.encoders import Encoder, Features
from eupe.moments import Moments
from eupe.normalise import zscore
from eupe.spec import AugmentedView, CodecName, DatasetSpec, StoreSpec, TeacherSpec
from eupe.students import FAMILY
from eupe.teachers import Teacher, load_teacher
from pipelines import family, images
from pipelines.batches import Batch, Batches, Feed
from pipelines.codec_torch import encode
from pipelines.draws import TrainingDraw
from pipelines.images import ImageReader
from pipelines.mix import Mix
from pipelines.scales import Scales
from pipelines.sources import CachedSource, LiveSource, Normalisers, Raw, Targets

SIDE = 256
POLICY = AugmentedView(canvas=SIDE)
NUM_IMAGES = 64
PROXY_BLOCKS = 50
COLUMNS = {
    "teacher": "",
    "codec": "",
    "a_seconds": ".3f",
    "b_seconds": ".3f",
    "c_seconds": ".3f",
    "d_seconds": ".3f",
    "ideal_ratio": ".2f",
    "d_over_c": ".2f",
    "c_over_b": ".3f",
    "c_over_b_high": ".3f",
    "wait_share": ".1%",
}
DATASET = DatasetSpec(name="emoji")
Forward = Callable[[torch.Tensor], Features]


@dataclass(frozen=True)
class Subject:
    """A teacher to measure.

    Attributes:
        teacher: what D runs.
        stored: what fills the stores.
        missing_blocks: blocks of the real teacher that D lacks.
        note: what the row must say.
    """

    teacher: Teacher
    stored: Forward
    missing_blocks: int = 0
    note: str = ""


def lite2(_: argparse.Namespace) -> Subject:
    """EfficientNet-Lite2's stride-16 map, ImageNet weights."""
    config = family.efficientnet_lite(2, (SIDE,))
    teacher = load_teacher(config.name, config.encoder, config.weights)
    return Subject(teacher, teacher)


def vit_b(_: argparse.Namespace) -> Subject:
    """A ViT-B/16 of random weights."""
    teacher = load_teacher("vit_b", FAMILY["eupe_vitb16"], "random:0")
    return Subject(teacher, teacher, note="random weights")


def proxy_vitg(arguments: argparse.Namespace) -> Subject:
    """The proxy with fewer blocks; its stores hold noise of the right shape."""
    encoder = proxy_step.build(arguments.proxy_depth)
    spec = TeacherSpec(
        name="proxy_vitg", encoder=FAMILY["proxy_vitg"], weights="0" * 64, dtype="bfloat16"
    )
    teacher = Teacher(spec, encoder)
    return Subject(
        teacher,
        Noise(encoder),
        PROXY_BLOCKS - arguments.proxy_depth,
        f"D ran {arguments.proxy_depth} of {PROXY_BLOCKS} blocks, {PROXY_BLOCKS} are worked out "
        "from the time of one more; bfloat16 weights, products in float32; stores hold noise",
    )


SUBJECTS: dict[str, Callable[[argparse.Namespace], Subject]] = {
    "efficientnet_lite2": lite2,
    "vit_b": vit_b,
    "proxy_vitg": proxy_vitg,
}


class Noise:
    """Features of an encoder's shape, standard normal."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._generator = encoder, torch.Generator().manual_seed(0)

    def __call__(self, pixels: torch.Tensor) -> Features:
        """Return features of pictures [B, 3, R, R]."""
        shape = (len(pixels), *self._encoder.grid(pixels.shape[-1]), self._encoder.patch_dim)
        return Features(
            torch.randn(len(pixels), self._encoder.summary_dim, generator=self._generator),
            torch.randn(shape, generator=self._generator),
        )


class InMemory:
    """A feature source whose targets lie there already: every batch gets the same ones."""

    mirrored = False

    def __init__(self, samples: Samples, targets: Mapping[str, Targets]) -> None:
        self.samples, self._targets = samples, dict(targets)

    def fetch(
        self,
        sample_ids: Sequence[str],
        view_numbers: np.ndarray,
        resolutions: Mapping[str, int],
        canvases: np.ndarray | None = None,
    ) -> Raw:
        """Bring nothing."""
        return Raw(np.ones(len(sample_ids), bool), None, {}, {})

    def decode(self, raw: Raw, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Return the targets."""
        return self._targets


def index(root: Path) -> Samples:
    """Index the first images of the emoji's train split."""
    records: pl.DataFrame = images.index(family.emoji("train").source, frozenset(), 1).records
    return Samples.append(root, DATASET, records.head(NUM_IMAGES), NUM_IMAGES)


def render(samples: Samples) -> list[views.View]:
    """Draw view 0 of every sample."""
    reader = ImageReader()
    return [
        views.make_view(reader.read(sample), POLICY, sample["sample_id"], 0)
        for sample in samples.table.iter_rows(named=True)
    ]


def tokens_of(forward: Forward, drawn: Sequence[views.View], batch: int) -> Features:
    """Run a network over the views."""
    pixels = np.stack([view.canvas for view in drawn])
    parts = []
    for start in track(range(0, len(pixels), batch), "features", transient=True):
        tensor = torch.from_numpy(pixels[start : start + batch]).permute(0, 3, 1, 2).contiguous()
        parts.append(forward(tensor))
    return Features(*(torch.cat(column) for column in zip(*parts, strict=True)))


def fill(
    root: Path, teacher: TeacherSpec, codec: CodecName, drawn: list[views.View], tokens: Features
) -> Store:
    """Write a store of features."""
    summary, patches = tokens.summary.numpy(), tokens.patches.flatten(1, 2)
    spec = StoreSpec(
        dataset=DATASET,
        views=POLICY,
        teacher=teacher,
        codec=default_codec(codec),
        resolution=SIDE,
        grid=tuple(tokens.patches.shape[1:3]),
        patch_dim=patches.shape[-1],
        summary_dim=summary.shape[-1],
    )
    moments = {"summary": Moments.of(summary), "patches": Moments.of(patches.flatten(0, 1))}
    store = create_store(
        root, spec, {kind: (m.count, m.mean, m.scatter) for kind, m in moments.items()}, {}
    )
    encoded = encode(store.codec, patches)
    table = pl.DataFrame(
        {
            "sample_id": store.samples.table["sample_id"],
            "valid": encoded.valid,
            "reason": pl.Series(encoded.reasons, dtype=pl.String),
            "view_digest": [view.digest for view in drawn],
            "parameters": ["{}"] * len(drawn),
            "summary": pl.Series(summary, dtype=pl.Array(pl.Float32, summary.shape[1])),
        }
    )
    (shard,) = store.samples.shards()
    store.commit([write_shard(store, 0, shard, encoded.data, table, {}, encoded.escapes)])
    return store


def batches(feed: Feed, samples: Samples, teacher: str, batch: int, threads: int) -> Batches:
    """Return endless batches of a feed, made as in training."""
    shards = {DATASET.name: samples.shards()}
    return Batches(
        {DATASET.name: feed},
        TrainingDraw(Mix({DATASET.name: 1.0}, {}, batch, 0), shards, {DATASET.name: 1}, 0),
        lambda step: Scales(SIDE, {teacher: SIDE}),
        lambda scale, rows: rows,
        range(1_000_000),
        threads=threads,
    )


class Way:
    """One way to feed the training step: times one step after the other."""

    def __init__(self, learn: TrainingStep, made: Iterator[Batch]) -> None:
        self._learn, self._made = learn, made
        self.seconds: list[float] = []
        self.waited: list[float] = []

    def step(self) -> None:
        """Take a batch and learn from it."""
        started = time.perf_counter()
        batch = next(self._made)
        self._learn(batch.pixels, batch.targets())
        self.seconds.append(time.perf_counter() - started)
        self.waited.append(batch.wait_seconds)


def same_again(batch: Batch) -> Iterator[Batch]:
    """Return one batch for ever."""
    while True:
        yield batch


def measure(
    name: str, arguments: argparse.Namespace, root: Path, console: Console
) -> list[tables.Row]:
    """Measure one teacher with every codec."""
    subject = SUBJECTS[name](arguments)
    samples = index(root)
    drawn = render(samples)
    tokens = tokens_of(subject.stored, drawn, arguments.batch)
    normalisers = {
        name: Normalisers(*(zscore(Moments.of(each.flatten(0, -2).numpy())) for each in tokens))
    }
    reader = ImageReader()
    memory = InMemory(samples, {name: targets_of(tokens, slice(arguments.batch))})

    def made(source: object) -> Batches:
        feed = Feed(source, reader, POLICY)  # type: ignore[arg-type]
        return batches(feed, samples, name, arguments.batch, arguments.threads)

    learn = TrainingStep({name: (tokens.summary.shape[-1], tokens.patches.shape[-1])})
    streams = {"B": iter(made(memory))}
    for codec in arguments.codecs:
        store = fill(root, subject.teacher.spec, codec, drawn, tokens)
        streams[codec] = iter(made(CachedSource({(name, SIDE): Reader(store)}, normalisers)))
    ways = {"A": Way(learn, same_again(next(streams["B"])))}
    ways |= {key: Way(learn, stream) for key, stream in streams.items()}
    order = list(ways)
    for number in track(range(arguments.rounds + 1), f"{name}: A, B, C", console=console):
        for key in order[number % len(order) :] + order[: number % len(order)]:
            ways[key].step()
    for stream in streams.values():
        stream.close()  # type: ignore[attr-defined]

    live = LiveSource(
        {name: subject.teacher}, samples, reader, POLICY, normalisers, arguments.batch
    )
    forward, more = [], subject.missing_blocks * block_seconds(subject, arguments.batch)
    with closing(iter(made(live))) as stream:  # type: ignore[type-var]
        ways["D"] = Way(learn, stream)
        pixels = torch.zeros(arguments.batch, 3, SIDE, SIDE, dtype=torch.uint8)
        for _ in track(range(arguments.live_rounds + 1), f"{name}: D", console=console):
            ways["D"].step()
            started = time.perf_counter()
            subject.teacher(pixels)
            forward.append(time.perf_counter() - started)
    return rows_of(name, subject, ways, float(np.median(forward[1:])), more, arguments.codecs)


def block_seconds(subject: Subject, batch: int) -> float:
    """Return what one more block of the teacher takes, bfloat16 weights, products in float32."""
    if not subject.missing_blocks:
        return 0.0
    encoder = subject.teacher.encoder
    blocks = encoder.network.blocks
    pixels = torch.zeros(batch, 3, SIDE, SIDE, dtype=torch.uint8)
    whole, fewer = [], []
    for _ in range(5):
        for times, kept in ((whole, blocks), (fewer, blocks[:1])):
            encoder.network.blocks = kept
            started = time.perf_counter()
            subject.teacher(pixels)
            times.append(time.perf_counter() - started)
    encoder.network.blocks = blocks
    return float(np.median(np.subtract(whole, fewer))) / (len(blocks) - 1)


def rows_of(
    name: str,
    subject: Subject,
    ways: Mapping[str, Way],
    forward: float,
    more: float,
    codecs: Sequence[str],
) -> list[tables.Row]:
    """Turn times into rows; the first step of every way warmed it up."""
    median = {key: float(np.median(way.seconds[1:])) for key, way in ways.items()}
    live = median["D"] + more
    rows = []
    for codec in codecs:
        ratio = bootstrap(np.array(ways[codec].seconds[1:]) / np.array(ways["B"].seconds[1:]))
        ideal = (forward + more + median["B"]) / median["B"]
        rows.append(
            {
                "teacher": name,
                "codec": codec,
                "a_seconds": median["A"],
                "b_seconds": median["B"],
                "c_seconds": median[codec],
                "d_seconds": live,
                "teacher_seconds": forward + more,
                "ideal_ratio": ideal,
                "d_over_c": live / median[codec],
                "d_over_c_of_ideal": live / median[codec] / ideal,
                "c_over_b": ratio.median,
                "c_over_b_low": ratio.low,
                "c_over_b_high": ratio.high,
                "wait_share": sum(ways[codec].waited[1:]) / sum(ways[codec].seconds[1:]),
                "wait_share_b": sum(ways["B"].waited[1:]) / sum(ways["B"].seconds[1:]),
                "note": subject.note,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("step", __doc__)
    parser.add_argument("--teachers", nargs="+", choices=[*SUBJECTS], default=[*SUBJECTS])
    parser.add_argument("--codecs", nargs="+", default=["float16", "int8", "rot4"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="steps of A, B and each C")
    parser.add_argument("--live-rounds", type=int, default=5, help="steps of D")
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
