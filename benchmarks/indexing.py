"""What indexing costs: pictures a second, memory, and what a second run of the same source takes.

    python -m benchmarks.indexing [--images 100000 1000000] [--workers 1 2] [--json FILE]

The pictures lie in tars of TAR_IMAGES. All tars are one file under many names (hard links, and
`key: shard` makes other ids of them), so that a million pictures take the disk of ten thousand and
are read from memory: what is measured is indexing, not a disk. A picture has PNG's header and
random bytes behind it: indexing reads a header and hashes every byte, and decodes nothing.

Each index is made by a fresh process. Its memory is what it and its workers hold together at most,
looked at every LOOK_SECONDS: anonymous memory, since mapped pages are the kernel's to drop.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from benchmarks import tables
from benchmarks.scale import memory_mb
from eupe.spec import CentreView
from pipelines.caching.indexing import index_samples, lookers
from pipelines.recipe.config import DatasetConfig, ExtractionConfig, SourceConfig
from pipelines.recipe.stores import CacheJob

TAR_IMAGES = 10_000
LOOK_SECONDS = 0.05
COLUMNS = {
    "images": ",",
    "bytes": ",",
    "workers": ",",
    "seconds": ".2f",
    "images_per_s": ",.0f",
    "anonymous_mb": ",.0f",
    "again_seconds": ".2f",
    "again_mb": ",.0f",
}


def write_tars(folder: Path, count: int, num_bytes: int) -> None:
    """Write tars of pictures, none of which is another's equal within a tar.

    Args:
        folder: of the tars.
        count: pictures of all tars.
        num_bytes: of a picture.
    """
    header = io.BytesIO()
    Image.new("RGB", (256, 256)).save(header, "PNG")
    rng = np.random.default_rng(0)
    full, rest = divmod(count, TAR_IMAGES)
    folder.mkdir()
    for length, names in ((TAR_IMAGES, range(full)), (rest, range(full, full + 1))):
        if not length or not names:
            continue
        first = folder / f"{names[0]:06d}.tar"
        with tarfile.open(first, "w") as tar:
            for number in range(length):
                content = (header.getvalue()[:64] + rng.bytes(num_bytes))[:num_bytes]
                member = tarfile.TarInfo(f"class{number % 100:03d}/{number:08d}.png")
                member.size = num_bytes
                tar.addfile(member, io.BytesIO(content))
        for name in names[1:]:
            os.link(first, folder / f"{name:06d}.tar")


def job(source: Path, root: Path, workers: int) -> CacheJob:
    """Describe a dataset that is indexed and no more."""
    return CacheJob(
        dataset=DatasetConfig(
            name="tars", source=SourceConfig(kind="webdataset", path=str(source), key="shard")
        ),
        views=CentreView(share=1.0),
        num_views=1,
        teachers=(),
        root=str(root),
        extraction=ExtractionConfig(rows_per_shard=100, cpus_per_actor=workers),
    )


def index_once(source: Path, root: Path, workers: int) -> tables.Row:
    """Index; run in a fresh process."""
    work = job(source, root, workers)
    start = time.perf_counter()
    with lookers(work) as pool:
        indexed = index_samples(work, pool if workers > 1 else None)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "samples": indexed.num_samples}


def indexed(source: Path, root: Path, workers: int) -> tables.Row:
    """Index in a fresh process; return what it says, and the most memory that it had."""
    words = ["--source", source, "--root", root, "--workers", workers]
    command = [sys.executable, "-m", "benchmarks.indexing", *map(str, words)]
    most = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, _anonymous_mb(process.pid))
            time.sleep(LOOK_SECONDS)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"indexing failed: exit code {process.returncode}")
    found: tables.Row = json.loads(said)
    return {**found, "anonymous_mb": most}


def _anonymous_mb(pid: int) -> float:
    """Return the anonymous memory of a process and of all below it."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(OSError, StopIteration):  # it has ended meanwhile
                total += memory_mb("RssAnon", process.pid)
    return total


def measure(source: Path, count: int, num_bytes: int, workers: int) -> tables.Row:
    """Index a source twice, into an empty folder and as it then is."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        first, again = (indexed(source, Path(folder), workers) for _ in range(2))
    if not first["samples"] == again["samples"] == count:
        raise RuntimeError(f"{first['samples']} and {again['samples']} of {count} were indexed")
    seconds = float(str(first["seconds"]))
    return {
        "images": count,
        "bytes": num_bytes,
        "workers": workers,
        "seconds": seconds,
        "images_per_s": count / seconds,
        "anonymous_mb": first["anonymous_mb"],
        "again_seconds": again["seconds"],
        "again_mb": again["anonymous_mb"],
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("indexing", __doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--bytes", type=int, default=400, help="of a picture; 110000: ImageNet's")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args(argv)
    if said.source is not None:
        print(json.dumps(index_once(said.source, said.root, *said.workers)))
        return 0
    rows = list[tables.Row]()
    for count in said.images:
        with tempfile.TemporaryDirectory(prefix="eupe-indexing-") as folder:
            source = Path(folder) / "tars"
            write_tars(source, count, said.bytes)
            rows += [measure(source, count, said.bytes, workers) for workers in said.workers]
    title = "indexing pictures in tars, from nothing and once more"
    tables.show(rows, COLUMNS, title, tables.console(), said.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
