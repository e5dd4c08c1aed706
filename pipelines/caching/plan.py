"""The plan of a recipe: what its caches and stages take, before a teacher runs.

A plan is a sum over stores and stages, each counted once: a store is known by what it holds, so
recipes that share caches share them in a plan too. Bytes come from the arithmetic that the writer
uses (`sizes`), FLOPs are counted on the meta device, the rest rests on `rates`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from cache.codec.nothing import NONE
from cache.errors import NotBuilt
from cache.samples import Samples
from cache.shard_ranges import ShardRanges
from eupe import costs
from eupe.encoders import shapes
from eupe.errors import BadInput
from eupe.pixels import RGB
from eupe.spec import EncoderSpec
from pipelines.caching import sizes
from pipelines.caching.rates import Rates
from pipelines.recipe.config import PIXELS, Recipe
from pipelines.recipe.drawn import Mask
from pipelines.recipe.stage import StageConfig
from pipelines.recipe.stores import CacheJob, network, planned_groups, rows_per_shard

KNOWN_IMAGES = {
    "emoji-test": 475,
    "emoji-train": 1_431,
    "imagenet1k": 1_281_167,
    "imagenet1k-val": 50_000,
    "lvd1689m": 1_689_000_000,
    "pd12m": 12_400_000,
    "pd12m-held-out": 10_000,
}
"""Pictures of sets that recipes name and that are not indexed here, as their makers count them."""
BACKWARD = 3
"""FLOPs of a training step, in forward passes: the way back takes two."""
TRAINED_BYTES = 16
"""Of a trained parameter: float32 weight, gradient and two moments of Adam."""


class UnknownSize(BadInput):
    """How many pictures a set has is neither indexed here, nor given, nor known."""


@dataclass(frozen=True)
class StorePlan:
    """One store.

    Attributes:
        key: what it holds; equal keys are one store.
        dataset: its name.
        views: kind of view, and how many of a sample.
        teacher: its name.
        resolution: pixels.
        codec: its name.
        images: rows, each view counted.
        share: of all views of all samples that its dataset has, what is built.
        num_bytes: on disk.
        fixed_bytes: of what there is of the store beside its shards.
        row_bytes: of one row's patches in their file.
        files: objects, each written by one request.
        forwards: images whose forward is counted here: all of them, but those that a store before
            it has, of the same network at the same resolution.
        config: the job's dataset and views through this teacher alone, at this resolution.
    """

    key: str
    dataset: str
    views: str
    teacher: str
    resolution: int
    codec: str
    images: int
    share: float
    num_bytes: int
    fixed_bytes: int
    row_bytes: int
    files: int
    forwards: int
    config: CacheJob

    @property
    def flops(self) -> float:
        """Of the teacher's forwards that are counted here."""
        (teacher,) = self.config.teachers
        return self.forwards * forward_flops(teacher.encoder, self.resolution)


@dataclass(frozen=True)
class StagePlan:
    """One stage, all its steps.

    Attributes:
        name: recipe and stage.
        samples: views that it shows.
        epochs: of the train set that is seen most often.
        train_flops: of student and heads, forward and back.
        teacher_flops: of the teachers, were they run live.
        read_bytes: of features and pixels, from the stores.
        decoded: views whose pictures are decoded, as no store has their pixels; live all are.
        memory_bytes: on one device: weights, gradients and Adam's moments, activations left out.
        host_bytes: of batches made ahead, all workers together.
        read_shards: files that are opened, each once an epoch and view.
    """

    name: str
    samples: int
    epochs: float
    train_flops: float
    teacher_flops: float
    read_bytes: float
    decoded: float
    memory_bytes: float
    host_bytes: float
    read_shards: float


class Pass(NamedTuple):
    """One pass of a set's pictures through some teachers.

    Attributes:
        job: that makes it.
        images: that it decodes, each view once for all teachers.
    """

    job: CacheJob
    images: int


class Pictures(NamedTuple):
    """A set's pictures as they are.

    Attributes:
        number: of them.
        mean_bytes: of one, as some are; None where the set is not indexed here.
    """

    number: int
    mean_bytes: float | None


@dataclass(frozen=True)
class Plan:
    """What some recipes take.

    Attributes:
        stores: key -> store.
        stages: name -> stage.
        passes: keys of a pass's stores -> the pass.
        pictures: set -> its pictures as they are.
        notes: what is said of it in sentences.
    """

    stores: Mapping[str, StorePlan] = field(default_factory=dict)
    stages: Mapping[str, StagePlan] = field(default_factory=dict)
    passes: Mapping[frozenset[str], Pass] = field(default_factory=dict)
    pictures: Mapping[str, Pictures] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __add__(self, other: "Plan") -> "Plan":
        """Return the plan of both: what they share is there once.

        Of a store that both draw from it is the larger: of one seed, more steps draw what fewer do.
        """
        larger = {
            key: store
            for key, store in other.stores.items()
            if key not in self.stores or store.num_bytes > self.stores[key].num_bytes
        }
        return Plan(
            {**self.stores, **larger},
            {**self.stages, **other.stages},
            {**self.passes, **other.passes},
            {**self.pictures, **other.pictures},
            tuple(dict.fromkeys((*self.notes, *other.notes))),
        )

    @property
    def num_bytes(self) -> int:
        """Of all stores, on disk."""
        return sum(store.num_bytes for store in self.stores.values())


def of_recipe(recipe: Recipe, rates: Rates, images: Mapping[str, int] | None = None) -> Plan:
    """Plan a recipe: everything that its stages will draw, and what its judges are shown.

    Args:
        recipe: which.
        rates: what codecs keep beside their codes is assumed there.
        images: dataset -> pictures, for those that are not indexed here.

    Raises:
        UnknownSize: of a set that is not indexed here.
        BadInput: a network that cannot be built.
    """
    plan, sets = _stores(recipe, planned_groups(recipe), rates, images or {})
    stages = {}
    for stage in recipe.stages.values():
        found = _of_stage(recipe, stage, plan, sets)
        stages[found.name] = found
    return plan + Plan(stages=stages, notes=tuple(_notes(recipe, stages.values())))


def of_stores(recipe: Recipe, groups: Sequence[Sequence[CacheJob]], rates: Rates) -> Plan:
    """Plan the stores of some of a recipe's jobs, as `stores.job_groups` lists them.

    Raises:
        UnknownSize: of a set that is not indexed here.
    """
    return _stores(recipe, groups, rates, {})[0]


def _stores(
    recipe: Recipe,
    groups: Sequence[Sequence[CacheJob]],
    rates: Rates,
    given: Mapping[str, int],
) -> "tuple[Plan, dict[str, _Dataset]]":
    per_shard = {job.dataset.name: rows_per_shard(job) for job in reversed(groups[0])}
    sets = {
        job.dataset.name: _dataset(recipe, job, per_shard[job.dataset.name], given)
        for job in groups[0]
    }
    plan = Plan(
        pictures={name: Pictures(each.num_rows, each.mean_bytes) for name, each in sets.items()}
    )
    for group in groups:
        for job in group:
            plan += _of_job(job, sets[job.dataset.name], rates)
    return plan, sets


@dataclass(frozen=True)
class _Dataset:
    """What a plan knows of a set of pictures."""

    shards: ShardRanges
    rows_per_shard: int
    sample_ids: tuple[str, ...]
    mean_bytes: float | None = None

    @property
    def num_rows(self) -> int:
        return self.shards.num_rows


def _dataset(recipe: Recipe, job: CacheJob, per_shard: int, given: Mapping[str, int]) -> _Dataset:
    """Return a set as it is indexed; else of the size that is given or known.

    Raises:
        UnknownSize: nobody says how many pictures it has.
    """
    name = job.dataset.name
    if name not in given:
        try:
            samples = Samples.open(recipe.cache_root, name)
        except NotBuilt:
            pass
        else:
            some = samples.at(np.arange(min(len(samples), sizes.EXAMPLES)))
            return _Dataset(
                samples.shards(),
                samples.rows_per_shard,
                tuple(some["sample_id"]),
                float(some["bytes"].to_numpy().mean()),
            )
    count = given.get(name, KNOWN_IMAGES.get(name))
    if count is None:
        raise UnknownSize(
            f"{name}: not indexed in {recipe.cache_root}, so its size is not known; "
            f"say --images {name}=N"
        )
    own = recipe.extraction.rows_per_shard or per_shard
    starts = np.arange(0, count, own)
    shards = ShardRanges(starts // own, starts, np.minimum(starts + own, count))
    return _Dataset(shards, own, ())


def _of_job(job: CacheJob, dataset: _Dataset, rates: Rates) -> Plan:
    """Plan the stores of one job, which come out of one pass over its pictures."""
    stores, seen = {}, np.zeros((job.num_views, len(dataset.shards)), bool)
    run: dict[tuple[str, str, str, int], Mask] = {}
    for teacher in job.kept:
        for resolution in teacher.resolutions:
            wanted = job.wanted(teacher.name, resolution, dataset.shards, teacher.codec)
            if teacher.codec == NONE and not wanted.any():
                continue
            seen |= wanted
            size = sizes.of_store(
                job,
                teacher,
                resolution,
                dataset.shards,
                dataset.rows_per_shard,
                wanted,
                rates.escapes,
                dataset.sample_ids,
            )
            which = *network(teacher), resolution
            before = run.get(which)
            run[which] = wanted if before is None else before | wanted
            rows = forwards = dataset.shards.count(wanted)
            if before is not None:
                forwards = dataset.shards.count(wanted & ~before)
            # Of a proxy the weights are not known yet; its recipe's stage 1 decides them.
            who = teacher.model_dump_json(exclude={"resolutions", "licence"})
            key = "/".join((job.root, job.dataset.name, job.views.model_dump_json(), who))
            key = f"{key}/{resolution}/{job.num_views}"
            stores[key] = StorePlan(
                key=key,
                dataset=job.dataset.name,
                views=f"{job.num_views} {job.views.kind}",
                teacher=teacher.name,
                resolution=resolution,
                codec=teacher.codec,
                images=rows,
                share=np.count_nonzero(wanted) / wanted.size,
                num_bytes=size.num_bytes,
                fixed_bytes=size.fixed_bytes,
                row_bytes=size.row_bytes,
                files=size.num_files,
                forwards=forwards,
                config=job.model_copy(
                    update={
                        "teachers": (teacher.model_copy(update={"resolutions": (resolution,)}),)
                    }
                ),
            )
    rows = dataset.shards.count(seen)
    return Plan(stores=stores, passes={frozenset(stores): Pass(job, rows)})


def _of_stage(
    recipe: Recipe, stage: StageConfig, plan: Plan, sets: Mapping[str, _Dataset]
) -> StagePlan:
    """Plan a stage; a step's means stand for its draws."""
    samples = stage.steps * stage.global_batch
    student = recipe.trained_by(stage).encoder
    teachers = {name: _encoder(recipe, name) for name in stage.teachers}
    row_bytes = {
        (store.teacher, store.resolution): store.row_bytes
        + 4 * shapes(_encoder(recipe, store.teacher), store.resolution).summary_dim
        for store in plan.stores.values()
        if store.codec != NONE
    }

    def mean(scales: Sequence[int], of: Mapping[tuple[str, int], float], who: str) -> float:
        return sum(of.get((who, scale), 0.0) for scale in scales) / len(scales)

    features = sum(mean(stage.teacher_resolutions[n], row_bytes, n) for n in stage.teachers)
    kept = mean(stage.student_resolutions, row_bytes, PIXELS)
    stored = [scale for scale in stage.student_resolutions if scale in recipe.pixel_scales]
    train = sum(
        forward_flops(student, scale)
        + sum(
            _head_flops(student, scale, encoder, side, stage.head_hidden)
            / len(stage.teacher_resolutions[name])
            for name, encoder in teachers.items()
            for side in stage.teacher_resolutions[name]
        )
        for scale in stage.student_resolutions
    ) / len(stage.student_resolutions)
    live = sum(
        forward_flops(encoder, side) / len(stage.teacher_resolutions[name])
        for name, encoder in teachers.items()
        for side in stage.teacher_resolutions[name]
    )
    heaviest = max(stage.student_resolutions)
    workers = recipe.workers
    ahead = (workers.prefetch_batches + 2) * min(
        stage.micro_batch * workers.count, stage.global_batch
    )
    seen = {name: float(n) for name, n in _seen(recipe, stage).items()}
    return StagePlan(
        name=f"{recipe.name} {stage.name}",
        samples=samples,
        epochs=max(seen[name] / sets[name].num_rows for name in recipe.train),
        train_flops=BACKWARD * samples * train,
        teacher_flops=samples * live,
        read_bytes=samples * (features + kept),
        decoded=samples * (1 - len(stored) / len(stage.student_resolutions)),
        memory_bytes=TRAINED_BYTES * _cost(student.model_dump_json(), heaviest).parameters,
        host_bytes=ahead * (features + 3 * heaviest**2),
        read_shards=sum(
            -(-n // sets[name].rows_per_shard) * len(stage.teachers) for name, n in seen.items()
        ),
    )


def _seen(recipe: Recipe, stage: StageConfig) -> dict[str, int]:
    """Return how many samples of each train set a stage shows."""
    mix = recipe.mix(stage)
    return {name: int(mix.totals(name, stage.steps).sum()) for name in recipe.train}


def _encoder(recipe: Recipe, name: str) -> EncoderSpec:
    """Return the network of a teacher as stages and stores name it."""
    if name in recipe.teachers:
        return recipe.teachers[name].encoder
    if name == PIXELS or recipe.proxy is None:
        return RGB
    return recipe.proxy.encoder


def forward_flops(encoder: EncoderSpec, resolution: int) -> float:
    """Return the FLOPs of one picture's forward pass, a multiply-add counted as two."""
    if encoder == RGB:
        return 0.0
    return 2.0 * _cost(encoder.model_dump_json(), resolution).multiply_adds


@lru_cache(maxsize=256)
def _cost(encoder: str, resolution: int) -> costs.Cost:
    return costs.cost(EncoderSpec.model_validate_json(encoder), resolution)


def _head_flops(
    student: EncoderSpec, scale: int, teacher: EncoderSpec, side: int, hidden: int
) -> float:
    """Return the FLOPs of one teacher's heads on a picture, forward (Eq. 3: two linear layers)."""
    ours, theirs = shapes(student, scale), shapes(teacher, side)
    tokens = max(ours.grid[0] * ours.grid[1], theirs.grid[0] * theirs.grid[1])
    summary = ours.summary_dim * hidden + hidden * theirs.summary_dim
    return 2.0 * (summary + tokens * (ours.patch_dim * hidden + hidden * theirs.patch_dim))


def _notes(recipe: Recipe, stages: Iterable[StagePlan]) -> Iterator[str]:
    """Say what the stored views buy."""
    for stage in stages:
        views = max(recipe.views_of(name) for name in recipe.train)
        yield (
            f"{stage.name} shows {stage.samples:,} views: {stage.epochs:,.1f} epochs of its most "
            f"seen set. With live teachers that is as many different views of each picture; "
            f"{views} stored ones are each shown {stage.epochs / views:,.1f} times, and what more "
            f"of them would teach is not known beforehand: compare two runs."
        )
