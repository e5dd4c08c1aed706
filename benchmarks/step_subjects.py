"""What `benchmarks.step` measures on: teachers, real images, and stores of their features."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.progress import track

from benchmarks import proxy_step
from cache.codec.known import default_codec, make_codec
from cache.samples import Samples
from cache.store import Store, create_store
from cache.writer import write_shard
from eupe import views
from eupe.encoders import Encoder, Features
from eupe.moments import Moments
from eupe.spec import AugmentedView, CodecName, DatasetSpec, StoreSpec, TeacherSpec
from eupe.students import FAMILY
from eupe.teachers import Teacher, load_teacher
from pipelines.features.codec_torch import encode
from pipelines.images import index
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe import family

SIDE = 256
POLICY = AugmentedView(canvas=SIDE)
DATASET = DatasetSpec(name="emoji")
NUM_IMAGES = 64
PROXY_BLOCKS = 50
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


def indexed(root: Path) -> Samples:
    """Index the first images of the emoji's train split."""
    records = index.whole(family.emoji("train").source).records
    return Samples.append(root, DATASET, records.slice(0, NUM_IMAGES), NUM_IMAGES)


def render(samples: Samples) -> list[views.View]:
    """Draw view 0 of every sample."""
    reader = ImageReader(base(family.emoji("train").source))
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


def measured(tokens: Features) -> dict[str, Moments]:
    """Measure the moments of features' first rows."""
    summary, patches = (each[:NUM_IMAGES].flatten(0, -2).cpu().numpy() for each in tokens)
    return {"summary": Moments.of(summary), "patches": Moments.of(patches)}


def fill(
    root: Path,
    teacher: TeacherSpec,
    codec: CodecName,
    digests: Sequence[str],
    tokens: Features,
    moments: Mapping[str, Moments],
    resolution: int = SIDE,
) -> Store:
    """Write a store of features, encoded where they lie; every shard of the dataset.

    Args:
        root: of the cache, the dataset's samples are in it.
        teacher: whose features they are.
        codec: name.
        digests: of the rows' views.
        tokens: float32, a row a sample.
        moments: of `measured`.
        resolution: of the teacher's input, pixels.
    """
    spec = StoreSpec(
        dataset=DATASET,
        views=POLICY,
        teacher=teacher,
        codec=default_codec(codec),
        resolution=resolution,
        grid=tuple(tokens.patches.shape[1:3]),
        patch_dim=tokens.patches.shape[-1],
        summary_dim=tokens.summary.shape[-1],
    )
    stored = {kind: (m.count, m.mean, m.scatter) for kind, m in moments.items()}
    sample = tokens.patches[:NUM_IMAGES].flatten(1, 2).cpu().numpy()
    fitted = make_codec(spec.codec, stored["patches"], spec.grid, sample)
    store = create_store(root, spec, stored, {}, fitted)
    records = []
    for shard in store.samples.shards():
        rows = slice(shard.start, shard.stop)
        encoded = encode(store.codec, tokens.patches[rows].flatten(1, 2))
        summary = tokens.summary[rows].cpu().numpy()
        table = pl.DataFrame(
            {
                "sample_id": store.samples.shard(shard.shard)["sample_id"],
                "valid": encoded.valid,
                "reason": pl.Series(encoded.reasons, dtype=pl.String),
                "view_digest": digests[rows],
                "parameters": ["{}"] * len(shard),
                "summary": pl.Series(summary, dtype=pl.Array(pl.Float32, summary.shape[1])),
            }
        )
        records.append(write_shard(store, 0, shard, encoded.data, table, {}, encoded.escapes))
    store.commit(records)
    return store


def block_seconds(subject: Subject, batch: int) -> float:
    """Return what one more block of the teacher takes, bfloat16 weights, products in float32."""
    if not subject.missing_blocks:
        return 0.0
    encoder = subject.teacher.encoder
    network: Any = encoder.network  # torch's modules answer with any attribute
    blocks = network.blocks
    pixels = torch.zeros(batch, 3, SIDE, SIDE, dtype=torch.uint8)
    whole, fewer = list[float](), list[float]()
    for _ in range(5):
        for times, kept in ((whole, blocks), (fewer, blocks[:1])):
            network.blocks = kept
            started = time.perf_counter()
            subject.teacher(pixels)
            times.append(time.perf_counter() - started)
    network.blocks = blocks
    seconds = float(np.median(np.subtract(whole, fewer)))
    return seconds / int(len(blocks) - 1)
