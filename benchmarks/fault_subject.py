"""What faults happen to: twenty pictures, two tiny teachers, a student of a few steps.

The dataset grows once, so that it has two segments; of the two stores one is plain, one quantised.
Everything here is called in processes of its own (`fault_children`), and may end at any instant.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq

from cache.errors import MissingSamples, NotBuilt, StoreError
from cache.files import place
from cache.reader import Reader
from cache.repair import repair_root
from cache.samples import Samples
from cache.shard_ranges import ShardRange
from cache.store import Store, open_store
from cache.verify import unseen, verify_root
from eupe.spec import AugmentedView, CentreView, CodecName, EncoderSpec, StoreSpec
from pipelines.caching import indexing, precompute
from pipelines.caching.extractor import Extractor
from pipelines.machines.in_process import InProcess
from pipelines.recipe import family
from pipelines.recipe.config import (
    DatasetConfig,
    EvaluationConfig,
    ExtractionConfig,
    Recipe,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
    WorkersConfig,
)
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import OptimizerConfig, StageConfig
from pipelines.recipe.stores import CacheJob, cache_jobs
from pipelines.records import checkpoint, tracking
from pipelines.training import launch

PARTS = ("a", "b")
ALL = "*"
GROWING = (PARTS[0], ALL)
"""Parts that a build indexes, one after the other."""
PART_IMAGES = 10
DATASET = "train"
NUM_VIEWS = 2
ROWS_PER_SHARD = 4
STAGE: Final = "stage2"
STEPS = 8
RESOLUTION = 32


def lay_out(images: Path, first: int) -> None:
    """Write two Parquet files of emoji, `first` being the number of the first."""
    images.mkdir(parents=True)
    source = family.emoji("train").source
    rows = pq.read_table(source.path, columns=["image", *source.label_columns])
    for number, name in enumerate(PARTS):
        part = rows.slice(first + number * PART_IMAGES, PART_IMAGES)
        pq.write_table(part, images / f"{name}.parquet")


def recipe(images: Path, root: Path, parts: str = ALL) -> Recipe:
    """Return the run that lies below a root, and learns from one part or from all."""
    labels = family.emoji("train").source.label_columns
    source = SourceConfig(
        kind="parquet", path=str(images / f"{parts}.parquet"), label_columns=labels
    )
    network = EncoderSpec(
        architecture="vit_tiny_patch16_dinov3_qkvb",
        model_arguments={"embed_dim": 32, "depth": 1, "num_heads": 2},
    )
    codecs: dict[str, CodecName] = {"near": "float16", "far": "rot4"}
    stage = StageConfig(
        name=STAGE,
        teachers=tuple(codecs),
        teacher_resolutions={name: (RESOLUTION,) for name in codecs},
        student_resolutions=(RESOLUTION,),
        steps=STEPS,
        global_batch=4,
        micro_batch=4,
        head_hidden=16,
        optimizer=OptimizerConfig(lr=3e-3),
        precision="float32",
        log_every=1,
        checkpoint_every=2,
    )
    return Recipe(
        name="faults",
        run_directory=str(root / "run"),
        cache_root=str(root / "cache"),
        train=by_name(DatasetConfig(name=DATASET, source=source)),
        held_out=DatasetConfig(name="held-out", source=source),
        num_views=NUM_VIEWS,
        views=AugmentedView(canvas=RESOLUTION),
        held_out_views=CentreView(canvas=RESOLUTION),
        teachers=by_name(
            *(
                TeacherConfig(
                    name=name,
                    encoder=network,
                    weights=f"random:{number}",
                    resolutions=(RESOLUTION,),
                    codec=codec,
                )
                for number, (name, codec) in enumerate(codecs.items())
            )
        ),
        student=StudentConfig(name="student", encoder=network),
        stages=by_name(stage),
        extraction=ExtractionConfig(
            rows_per_shard=ROWS_PER_SHARD,
            moments_samples=8,
            compute_batch=ROWS_PER_SHARD,
            actors=2,
            cpus_per_actor=1,
            decode_threads=1,
        ),
        evaluation=EvaluationConfig(resolution=RESOLUTION),
    )


def job(images: Path, root: Path, parts: str = ALL) -> CacheJob:
    """Return the build of the train set's views."""
    return next(job for job in cache_jobs(recipe(images, root, parts)) if job.num_views > 1)


def build(
    images: Path, root: Path, indexed: Sequence[str] = GROWING, ray_address: str | None = None
) -> dict[str, Any]:
    """Build all of it, or what is missing; by Ray's actors where there is an address.

    Returns:
        shards computed and the specs of the stores.
    """
    for parts in indexed:
        work = job(images, root, parts)
        indexing.index_samples(work)
    pool: AbstractContextManager[Any] = nullcontext(
        InProcess(Extractor(work.teachers, decode_threads=1, compute_threads=1))
    )
    if ray_address is not None:
        os.environ["RAY_ADDRESS"] = ray_address
        pool = precompute.extractors(work)
    with pool as workers:
        stores = precompute.resolve_stores(work, workers)
        done = precompute.extract_missing(work, stores, workers)
    precompute.verify_stores(stores, deep=False)
    return {"shards": done.num_shards, "specs": [store.spec for store in stores]}


def flow(images: Path, root: Path, ray_address: str, prefect_url: str) -> None:
    """Build as the flow `teacher-cache` does, each step a task, by Ray's actors."""
    os.environ |= {"RAY_ADDRESS": ray_address, "PREFECT_API_URL": prefect_url}
    import prefect  # after its settings: it reads them once, when imported

    from flows import teacher_cache

    indexing.index_samples(job(images, root, PARTS[0]))  # stores are made of all, as without it
    prefect.flow(name="faults")(teacher_cache.build)([[job(images, root)]], "Stores")


def train(
    images: Path, root: Path, workers: int = 1, ray_address: str | None = None
) -> dict[str, Any]:
    """Train, or go on; return every step's losses and the digest of the weights at the end.

    Args:
        images: the pictures.
        root: of the caches, and of the run.
        workers: that train together; several are Ray Train's.
        ray_address: of the cluster that has them.
    """
    run = recipe(images, root).model_copy(update={"workers": WorkersConfig(count=workers)})
    if ray_address is not None:
        os.environ["RAY_ADDRESS"] = ray_address
    launch.train(run, run.stage(STAGE))
    directory = run.stage_directory(STAGE)
    lines = tracking.read(directory / tracking.METRICS_FILE)
    losses = [
        {name: value for name, value in line.items() if name.startswith(("step", "loss/"))}
        for line in lines
    ]
    return {
        "losses": losses,
        "weights": checkpoint.finished(directory, STEPS).weights_digest(),
    }


@dataclass
class Seen:
    """What can be read of a cache root.

    Attributes:
        values: what -> digest of all that is read of it: a sample, a shard's record, a row.
        refused: beginning of a what -> the sentence that refused it.
        twice: samples, records and rows that are there more than once.
    """

    values: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    twice: int = 0

    def add(self, what: str, *parts: object) -> None:
        """Take the digest of what was read."""
        digest = hashlib.sha256()
        for part in parts:
            said = part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode()
            digest.update(said)
        self.twice += what in self.values
        self.values[what] = digest.hexdigest()


def look(root: Path, specs: Sequence[StoreSpec]) -> Seen:
    """Read everything that training reads; what is absent is in no list."""
    seen = Seen()
    try:
        samples = Samples.open(root / "cache", DATASET)
        shards = samples.shards()
        for shard in shards:
            for row in samples.shard(shard.shard).iter_rows(named=True):
                seen.add(f"sample {row['sample_id']}", row)
    except NotBuilt:
        return seen
    except StoreError as error:
        seen.refused[""] = str(error)
        return seen
    for spec in specs:
        name = f"{spec.teacher.name} "
        try:
            store = open_store(root / "cache", spec)
            for record in store.manifest().records():
                said = (record.patches_sha256, record.rows_sha256, record.samples_digest)
                seen.add(f"{name}record {record.view} {record.shard}", *map(str, said))
            for view in range(NUM_VIEWS):
                _look_at_view(seen, store, view, shards, f"{name}row {view} ")
        except NotBuilt:
            continue
        except StoreError as error:
            seen.refused[name] = str(error)
    return seen


def _look_at_view(
    seen: Seen, store: Store, view: int, shards: Sequence[ShardRange], name: str
) -> None:
    """Read one view of a store, shard by shard: one that is refused hides no other."""
    reader = Reader(store, [view])
    for shard in shards:
        rows = np.arange(shard.start, shard.stop)
        ids = reader.sample_ids(rows)
        try:
            chosen = reader.select(rows, view)
            decoded, summaries = chosen.decoded(), chosen.summaries
            said = zip(
                chosen.valid.tolist(),
                [None if each is None else str(each) for each in chosen.digests],
                chosen.reasons,
                chosen.parameters,
                strict=True,
            )
        except (MissingSamples, NotBuilt):
            continue
        except StoreError as error:
            seen.refused |= {f"{name}{sample_id}": str(error) for sample_id in ids}
            continue
        for at, (sample_id, words) in enumerate(zip(ids, said, strict=True)):
            seen.add(f"{name}{sample_id}", decoded[at], summaries[at], words)


def problems(root: Path) -> dict[str, str]:
    """Return what verify says of a root: file -> what is wrong with it."""
    reports = verify_root(root / "cache", True, unseen)
    return {str(each.path): str(each) for _, report in reports for each in report.problems}


def repair(root: Path) -> list[str]:
    """Mend a root; return what is lost for good."""
    found = [mended for _, mended in repair_root(root / "cache", write=True)]
    return [str(problem) for mended in found for problem in mended.lost]


def data_files(root: Path) -> Mapping[str, str]:
    """Return the digest of every data file of a cache root.

    Left out are manifests and sample tables, whose files' names count commits (`look` reads what
    is in them), the list of failures, and scratch.
    """
    cache = root / "cache"
    return {
        str(path.relative_to(cache)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path, _, _ in sorted(place.listing(cache))
        if not {"manifest", "samples", ".tmp"} & set(path.relative_to(cache).parts)
        and path.suffix != ".jsonl"
    }
