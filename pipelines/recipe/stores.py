"""Cache jobs: which stores a recipe needs, and opening those that are built (loads no Ray)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.codec.known import default_codec, row_bytes
from cache.codec.nothing import NONE
from cache.errors import FingerprintMismatch, NotBuilt
from cache.files import copies
from cache.reader import Reader
from cache.samples import Samples
from cache.shard_ranges import ShardRanges
from cache.store import Store, open_store
from eupe.addressed import hashed
from eupe.encoders import shapes
from eupe.errors import BadInput
from eupe.pixels import RGB
from eupe.spec import DatasetSpec, Spec, StoreSpec, TeacherSpec, ViewPolicy
from eupe.weights import digest
from pipelines.recipe.config import (
    PIXELS,
    PROXY,
    DatasetConfig,
    ExtractionConfig,
    Recipe,
    StudentConfig,
    TeacherConfig,
    WorkersConfig,
)
from pipelines.recipe.drawn import Drawing, Mask, Turns
from pipelines.recipe.stage import StageConfig
from pipelines.records import checkpoint

SHARD_BYTES = 256 * 2**20
BANK_PATCHES = 2000
"""Images of a bank's set whose patches are kept, at least: the best constant is fitted to them, and
a mean of so many unit vectors is known to a hundredth. Of the others probes want summaries alone;
of ImageNet-1k the patches of all are terabytes."""


class CacheJob(Spec):
    """One dataset under one view policy through some teachers: the unit of cache building.

    Attributes:
        drawing: whose draws decide which views of which shards are wanted; None: all are.
        patch_images: so many images, or a few more, have their patches kept, and the others their
            summaries alone; None: all have. Of one view.
    """

    dataset: DatasetConfig
    views: ViewPolicy
    num_views: int
    teachers: tuple[TeacherConfig, ...]
    root: str
    extraction: ExtractionConfig
    drawing: Drawing | None = None
    patch_images: int | None = None

    def __str__(self) -> str:
        teachers = " + ".join(teacher.name for teacher in self.teachers)
        return f"{self.dataset.name}, {self.num_views} {self.views.kind} view(s), {teachers}"

    @property
    def kept(self) -> tuple[TeacherConfig, ...]:
        """The teachers with their codecs; where some images' summaries alone are kept, again so."""
        if self.patch_images is None:
            return self.teachers
        experts = (teacher for teacher in self.teachers if teacher.name != PIXELS)
        return (
            *self.teachers,
            *(teacher.model_copy(update={"codec": NONE}) for teacher in experts),
        )

    def wanted(
        self, teacher: str, resolution: int, shards: ShardRanges, codec: str | None = None
    ) -> Mask:
        """Say which views of which shards a store of the job shall hold, bool [views, shards].

        Args:
            teacher: of the store.
            resolution: of the store, pixels.
            shards: all of the dataset's.
            codec: of the store; None: the teacher's.
        """
        if self.patch_images is not None and teacher != PIXELS:
            whole = _some(shards, self.patch_images, self.dataset.name)[None]
            return ~whole if codec == NONE else whole
        if self.drawing is None:
            return np.ones((self.num_views, len(shards)), bool)
        if teacher == PIXELS:
            return self.drawing.of_student(self.dataset.name, shards, self.num_views, resolution)
        return self.drawing.of_teacher(
            self.dataset.name, shards, self.num_views, teacher, resolution
        )

    def turns(self, shards: ShardRanges) -> Turns | None:
        """Say in which turn views of shards are built; None: in the order of the dataset.

        Args:
            shards: all of the dataset's.
        """
        if self.drawing is None or self.extraction.order == "stored":
            return None
        return self.drawing.turns(self.dataset.name, shards, self.num_views)

    def wanted_of(self, store: Store) -> Mask:
        """Say which views of which shards a store shall hold, of the samples it knows."""
        spec = store.spec
        shards = store.samples.shards()
        return self.wanted(spec.teacher.name, spec.resolution, shards, spec.codec.name)


def _some(shards: ShardRanges, count: int, dataset: str) -> Mask:
    """Choose whole shards that hold so many images at least, or all: bool [shards].

    Rows are in the order of a hash, so that any shards are a random sample; which ones are taken
    is a matter of another, so that a data set which grows has to have few others.
    """
    order = np.argsort(hashed(shards.numbers, f"eupe.bank/patches/{dataset}"), kind="stable")
    lengths = shards.lengths[order]
    chosen = np.zeros(len(shards), bool)
    chosen[order[np.cumsum(lengths) - lengths < count]] = True
    return chosen


def cache_jobs(recipe: Recipe) -> list[CacheJob]:
    """List what a recipe needs of its expert teachers.

    Of the train sets the training views that its stages will draw, those of the kNN probe's bank in
    one centre view too (of most images without patches), and the held-out set in one centre view.
    Where the recipe wants its views' pixels cached, they come out of the same pass as the teachers'
    features.
    """
    return _built(recipe, (*recipe.teachers.values(), *_pixels(recipe, recipe.pixel_scales)))


def pixel_jobs(recipe: Recipe, stage: StageConfig) -> list[CacheJob]:
    """List the jobs whose stores hold a stage's pixels at its student's scales, if any do."""
    scales = tuple(scale for scale in recipe.pixel_scales if scale in stage.student_resolutions)
    return _jobs(recipe, _pixels(recipe, scales), (stage,)) if scales else []


def proxy_jobs(recipe: Recipe, stage1: Path | None = None) -> list[CacheJob]:
    """List what a recipe needs of its proxy, once stage 1 is done: every scale that is drawn.

    Args:
        recipe: the run.
        stage1: folder of stage 1's output; None: the run's own.

    Raises:
        BadInput: stage 1 is not trained to its end, or the recipe has no proxy.
    """
    return _built(recipe, (proxy_teacher(recipe, stage1),))


def job_groups(recipe: Recipe) -> list[list[CacheJob]]:
    """List what can be built of a recipe's caches now, a group for each set of teachers.

    The expert teachers' jobs; and the proxy's, where a stage learns from it and stage 1 is done.
    """
    groups = [cache_jobs(recipe)]
    taught = any(PROXY in stage.teachers for stage in recipe.stages.values())
    saved = checkpoint.latest(recipe.stage_directory("stage1"))
    if taught and saved is not None and saved.step >= recipe.stage("stage1").steps:
        groups.append(proxy_jobs(recipe))
    return groups


def planned_groups(recipe: Recipe) -> list[list[CacheJob]]:
    """List all that a recipe will ever want built, a group for each set of teachers.

    The proxy's jobs are there though stage 1 is not done; its weights are not to be read.
    """
    groups = [cache_jobs(recipe)]
    if recipe.proxy is not None and any(PROXY in s.teachers for s in recipe.stages.values()):
        groups.append(_built(recipe, (_as_teacher(recipe, recipe.proxy, "random:0"),)))
    return groups


def jobs_of(recipe: Recipe, stage: StageConfig) -> list[CacheJob]:
    """List the jobs whose stores a stage reads; of training views, those that it alone draws."""
    if PROXY in stage.teachers:
        return _jobs(recipe, (proxy_teacher(recipe),), (stage,))
    return _jobs(
        recipe, (*recipe.teachers.values(), *_pixels(recipe, recipe.pixel_scales)), (stage,)
    )


def proxy_teacher(recipe: Recipe, stage1: Path | None = None) -> TeacherConfig:
    """Return the proxy as a teacher like any other, its weights those of stage 1.

    EUPE (arXiv:2603.22387), stages 2 and 3: the frozen proxy teaches, at every scale of the
    pyramid; its adapter heads stay behind.

    Args:
        recipe: the run.
        stage1: folder of stage 1's output; None: the run's own.

    Raises:
        BadInput: stage 1 is not trained to its end, or the recipe has no proxy.
    """
    if recipe.proxy is None:
        raise BadInput(f"recipe {recipe.name} has no proxy")
    directory = stage1 or recipe.stage_directory("stage1")
    done = checkpoint.finished(directory, recipe.stage("stage1").steps)
    weights = f"checkpoint:{done.directory}"
    if copies.remote(done.directory) is not None:  # of another node's copy the run has no link
        weights = f"checkpoint:{done.directory.resolve()}"
    return _as_teacher(recipe, recipe.proxy, weights)


def _as_teacher(recipe: Recipe, proxy: StudentConfig, weights: str) -> TeacherConfig:
    return TeacherConfig(
        name=PROXY,
        encoder=proxy.encoder,
        weights=weights,
        dtype=recipe.proxy_dtype,
        resolutions=recipe.scales_of_proxy,
        codec=recipe.proxy_codec,
    )


def _pixels(recipe: Recipe, scales: tuple[int, ...]) -> tuple[TeacherConfig, ...]:
    """Return the views' own pixels as a teacher, none where no scale is wanted."""
    if not scales:
        return ()
    return (
        TeacherConfig(
            name=PIXELS,
            encoder=RGB,
            weights="random:0",  # it has none
            resolutions=tuple(sorted(scales)),
            codec="uint8",
        ),
    )


def _built(recipe: Recipe, teachers: tuple[TeacherConfig, ...]) -> list[CacheJob]:
    """List the jobs that a build does: what all stages draw, or everything if it is asked for."""
    stages = None if recipe.extraction.everything else tuple(recipe.stages.values())
    return _jobs(recipe, teachers, stages)


def _jobs(
    recipe: Recipe,
    teachers: tuple[TeacherConfig, ...],
    stages: tuple[StageConfig, ...] | None,
) -> list[CacheJob]:
    """List the jobs of some teachers; of training views those that `stages` draw, None: all."""
    drawing = (
        None
        if not stages
        else Drawing(
            stages=stages,
            shares=recipe.shares,
            homogeneous=recipe.homogeneous,
            seed=recipe.seed,
            lanes=recipe.lanes,
        )
    )
    judged = *recipe.bank, recipe.held_out
    apart = recipe.views != recipe.held_out_views  # else the bank's views are trained on too
    few = BANK_PATCHES if apart and stages is not None else None
    wanted: list[tuple[DatasetConfig, ViewPolicy, int, Drawing | None, int | None]] = [
        (dataset, recipe.views, recipe.views_of(dataset.name), drawing, None)
        for dataset in recipe.train.values()
        if apart or dataset not in judged
    ]
    wanted += [(dataset, recipe.held_out_views, 1, None, few) for dataset in recipe.bank]
    wanted.append((recipe.held_out, recipe.held_out_views, 1, None, None))
    return [
        CacheJob(
            dataset=dataset,
            views=policy,
            num_views=num_views,
            teachers=teachers,
            root=recipe.cache_root,
            extraction=recipe.extraction,
            drawing=own,
            patch_images=patch_images,
        )
        for dataset, policy, num_views, own, patch_images in wanted
    ]


def store_specs(job: CacheJob) -> list[StoreSpec]:
    """Work out the specs of a job's stores, one a teacher and resolution.

    Those of summaries alone come last, and only where they would hold what no store with patches
    has: no set of few images has any, nor one whose patches were all kept before.

    Raises:
        BadInput: weights that cannot be read, or a resolution a teacher does not take.
    """
    specs = []
    for config in job.teachers:
        teacher = _teacher_spec(config)
        specs += [
            _store_spec(job, config, teacher, resolution) for resolution in config.resolutions
        ]
    return specs if job.patch_images is None else [*specs, *_of_summaries(job, specs)]


def _of_summaries(job: CacheJob, specs: Sequence[StoreSpec]) -> list[StoreSpec]:
    """Return the specs of the stores of summaries alone beside those of a job's patches."""
    try:
        shards = Samples.open(job.root, job.dataset.name).shards()
    except NotBuilt:  # not indexed
        return []
    found = []
    for spec in specs:
        rest = job.wanted(spec.teacher.name, spec.resolution, shards, NONE)
        if spec.teacher.name == PIXELS or not rest.any():
            continue
        try:
            left = open_store(job.root, spec).lacks(rest, shards)
        except (NotBuilt, FingerprintMismatch):
            left = int(rest.sum())
        if left:
            found.append(spec.model_copy(update={"codec": default_codec(NONE)}))
    return found


class Opened:
    """Stores and readers that are open, for all who look at them: each is opened once.

    Whoever shares one of these reads one state of the caches, whatever is added meanwhile.
    """

    def __init__(self) -> None:
        self._stores: dict[tuple[str, str], Store] = {}
        self._readers: dict[tuple[Path, tuple[int, ...], int | None, str, int, bool], Reader] = {}
        self._whole: set[tuple[Path, bytes]] = set()

    def store(self, root: str, spec: StoreSpec) -> Store:
        """Return the store of a spec.

        Raises:
            StoreError: it is absent, or of another spec.
        """
        key = root, spec.fingerprint()
        if key not in self._stores:
            self._stores[key] = open_store(root, spec)
        return self._stores[key]

    def check_whole(self, store: Store, wanted: Mask) -> None:
        """Refuse a store that lacks shards.

        Args:
            store: from `store`.
            wanted: views of shards that will be read, bool [views, shards].

        Raises:
            NotBuilt: naming how many.
        """
        key = store.directory, wanted.tobytes()
        if key in self._whole:
            return
        if missing := store.todo(wanted):
            raise half_built(store, len(missing), wanted)
        self._whole.add(key)

    def reader(
        self,
        store: Store,
        views: Sequence[int],
        version: int | None,
        workers: WorkersConfig,
        growing: bool = False,
    ) -> Reader:
        """Return a reader of views of a store.

        Args:
            store: from `store`.
            views: numbers of the views to read.
            version: manifest version to read; None is the newest when first asked for.
            workers: how stores are read.
            growing: see `Reader`.

        Raises:
            StoreError: a view has no shard yet.
        """
        access, threads = workers.store_access, workers.copy_threads
        key = store.directory, tuple(views), version, access, threads, growing
        if key not in self._readers:
            self._readers[key] = Reader(store, views, version, access, threads, growing)
        return self._readers[key]


def half_built(store: Store, num_missing: int, wanted: Mask) -> NotBuilt:
    """Return the error of a store that lacks some of the shards that are wanted of it."""
    return NotBuilt(
        f"{store.directory}: half built, {num_missing} of {int(wanted.sum())} shards are missing; "
        "run `eupe cache build` (it computes only those)"
    )


def open_stores(job: CacheJob, half: bool = False, opened: Opened | None = None) -> list[Store]:
    """Open a job's stores for training: every wanted shard must be there.

    Args:
        job: whose stores.
        half: True if shards may be missing: of a run that goes on, those of samples that were added
            since it began; of a stage that waits for them, any.
        opened: stores that are open already; those opened here are added. None opens all anew.

    Raises:
        BadInput: weights that cannot be read.
        StoreError: a store is absent, of another spec, or half built.
    """
    opened = opened or Opened()
    stores = [opened.store(job.root, spec) for spec in store_specs(job)]
    if not half:
        for store in stores:
            opened.check_whole(store, job.wanted_of(store))
    return stores


def network(config: TeacherConfig) -> tuple[str, str, str]:
    """Return what of a teacher is run, whatever is read of it: equal ones want one forward."""
    return config.encoder.network.model_dump_json(), config.weights, config.dtype


def _teacher_spec(config: TeacherConfig) -> TeacherSpec:
    return TeacherSpec(
        name=config.name,
        encoder=config.encoder,
        weights=digest(config.weights, config.encoder),
        dtype=config.dtype,
    )


def _store_spec(
    job: CacheJob, config: TeacherConfig, teacher: TeacherSpec, resolution: int
) -> StoreSpec:
    shape = shapes(config.encoder, resolution)
    return StoreSpec(
        dataset=DatasetSpec(name=job.dataset.name),
        views=job.views,
        teacher=teacher,
        codec=default_codec(config.codec),
        resolution=resolution,
        grid=shape.grid,
        patch_dim=shape.patch_dim,
        summary_dim=shape.summary_dim,
    )


def rows_per_shard(job: CacheJob) -> int:
    """Return how many rows a shard of a new dataset has: whole compute batches.

    As many as make the largest patches array's shards SHARD_BYTES at most, and one batch where
    that is more: a batch never straddles shards, so what a shard leaves of its last one is
    computed on padding, for as long as the dataset lives.
    """
    largest = 1
    for config in job.teachers:
        for resolution in config.resolutions:
            (rows, columns), patch_dim, _ = shapes(config.encoder, resolution)
            largest = max(largest, row_bytes(config.codec, rows * columns, patch_dim))
    batch = job.extraction.compute_batch
    return max(1, SHARD_BYTES // largest // batch) * batch
