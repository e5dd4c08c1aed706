"""How near extraction comes to a hand-written loop of decode, augment, forward and write.

    python -m benchmarks.extract [--images 256] [--pairs 7] [--codec float16] [--json FILE]

Both sides turn the same emoji into the same features of EfficientNet-Lite2 at 256 pixels on the
same cores. The loop is what one would write by hand: the next batch is decoded and augmented by a
thread pool while the teacher computes, features are encoded, each shard is one synced .npy file.
Ours is `pipelines.caching.precompute.extract_missing` with its Ray actor: view digests and
parameters, checks, checksums, shard files, a manifest commit a shard. Start-up (Ray, loading the
teacher) is apart. A pair is one view of all images, a new one each time, in turns; ratio_to_loop is
the median of the pairs' speed ratios, with its bootstrap interval.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import tables
from benchmarks.pairs import Timed, interleave
from cache.store import Store
from eupe import views
from eupe.spec import AugmentedView
from eupe.teachers import Teacher, load_teacher
from pipelines.caching import indexing, precompute
from pipelines.features.codec_torch import encode
from pipelines.images import index
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe import family
from pipelines.recipe.config import ExtractionConfig, SourceConfig
from pipelines.recipe.stores import CacheJob

SIDE = 256
POLICY = AugmentedView(canvas=SIDE)
COMPUTE_BATCH = 16
ROWS_PER_SHARD = 64
COLUMNS = {
    "name": "",
    "images_per_s": ".2f",
    "ratio_to_loop": ".3f",
    "ratio_low": ".3f",
    "ratio_high": ".3f",
}


class Loop:
    """The loop that extraction is compared with.

    Args:
        teacher: computes here.
        store: whose samples and codec are used.
        images: reads its samples.
        folder: features are written there.
        threads: that decode.
    """

    def __init__(
        self, teacher: Teacher, store: Store, images: ImageReader, folder: Path, threads: int
    ) -> None:
        self._teacher, self._store, self._folder = teacher, store, folder
        self._images, self._pool = images, ThreadPoolExecutor(threads)

    def view(self, view: int) -> None:
        """Compute and write one view of every sample."""
        rows = list(self._store.samples.table.iter_rows(named=True))
        starts = range(0, len(rows), COMPUTE_BATCH)
        ahead, done = self._drawn(rows[:COMPUTE_BATCH], view), []
        for start in starts:
            coming = ahead
            ahead = self._drawn(rows[start + COMPUTE_BATCH :][:COMPUTE_BATCH], view)
            pixels = np.stack([future.result() for future in coming])
            tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
            summary, patches = self._teacher(tensor)
            encoded = encode(self._store.codec, patches.flatten(1, 2))
            done.append((summary.numpy(), encoded.data))
            if (start + COMPUTE_BATCH) % ROWS_PER_SHARD == 0 or start == starts[-1]:
                self._write(f"{view}-{start}", done)
                done = []

    def _drawn(self, rows: Sequence[dict[str, object]], view: int) -> "list[Future[np.ndarray]]":
        return [self._pool.submit(self._draw, row, view) for row in rows]

    def _draw(self, row: dict[str, object], view: int) -> np.ndarray:
        image = views.decode(self._images.read(row), POLICY.background)
        parameters = views.draw(POLICY, str(row["sample_id"]), view, *image.size)
        return views.resize(views.render(image, POLICY, parameters), SIDE)

    def _write(self, name: str, done: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        for kind, parts in zip(("summary", "patches"), zip(*done, strict=True), strict=True):
            with open(self._folder / f"{kind}-{name}.npy", "wb") as file:
                np.save(file, np.concatenate(parts))
                file.flush()
                os.fsync(file.fileno())


def job(arguments: argparse.Namespace, root: Path, source: SourceConfig) -> CacheJob:
    """Describe the build."""
    teacher = family.efficientnet_lite(2, (SIDE,)).model_copy(update={"codec": arguments.codec})
    return CacheJob(
        dataset=family.emoji("train").model_copy(update={"source": source}),
        views=POLICY,
        num_views=1,
        teachers=(teacher,),
        root=str(root),
        extraction=ExtractionConfig(
            rows_per_shard=ROWS_PER_SHARD,
            moments_samples=64,
            compute_batch=COMPUTE_BATCH,
            cpus_per_actor=arguments.cores,
            decode_threads=arguments.cores,
        ),
    )


def lay_out(folder: Path, count: int) -> SourceConfig:
    """Lay the first emoji out as files."""
    source = family.emoji("train").source
    reader = ImageReader(base(source))
    for sample in index.whole(source).records.slice(0, count).to_pylist():
        path = folder / f"{sample['sample_id']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(reader.read(sample))
    return SourceConfig(kind="folder", path=str(folder))


def run(arguments: argparse.Namespace, folder: Path) -> list[tables.Row]:
    """Measure; return the table's rows."""
    work = job(arguments, folder / "root", lay_out(folder / "images", arguments.images))
    indexing.index_samples(work)
    torch.set_num_threads(arguments.cores)
    config = work.teachers[0]
    teacher = load_teacher(config.name, config.encoder, config.weights)
    with precompute.extractors(work) as pool:
        stores = precompute.resolve_stores(work, pool)
        loop = Loop(teacher, stores[0], ImageReader(folder / "images"), folder, arguments.cores)

        def ours(pair: int) -> None:
            views_now = work.model_copy(update={"num_views": pair + 2})
            precompute.extract_missing(views_now, stores, pool)

        precompute.extract_missing(work, stores, pool)  # view 0 warms both up
        loop.view(0)
        pairs = interleave(
            Timed(lambda pair: loop.view(pair + 1)), Timed(ours), arguments.pairs, arguments.seconds
        )
    ratio = pairs.speed_ratio()
    count = len(stores[0].samples)
    return [
        {
            "name": "loop",
            "images_per_s": count / float(np.median(pairs.reference)),
            "ratio_to_loop": 1.0,
        },
        {
            "name": "eupe",
            "images_per_s": count / float(np.median(pairs.subject)),
            "ratio_to_loop": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
            "pairs": len(pairs.subject),
            "codec": arguments.codec,
        },
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("extract", __doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=300.0, help="budget, at least five pairs")
    parser.add_argument("--cores", type=int, default=2, help="that either side computes on")
    parser.add_argument("--codec", default="float16")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="eupe-extract-") as folder:
        table = run(arguments, Path(folder))
    title = f"EfficientNet-Lite2 at {SIDE}, {arguments.codec}, {arguments.cores} cores"
    tables.show(table, COLUMNS, title, tables.console(), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
