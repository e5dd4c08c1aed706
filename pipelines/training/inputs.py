"""Inputs: what a stage trains on, as the loop sees it, opened from a recipe's caches."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from typing import Any

import numpy as np
from torch import Tensor

from cache.codec.nothing import NONE
from cache.reader import Reader
from cache.shard_ranges import ShardRanges
from cache.store import Store
from eupe.errors import BadInput
from eupe.moments import Moments, merge, mixed
from eupe.normalise import Normaliser, phi_s, zscore
from pipelines.features.cached import CachedSource, samples_pin
from pipelines.features.live_rows import LiveRows
from pipelines.features.sources import Normalisers
from pipelines.images.parquet import RowGroups
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe import resolutions
from pipelines.recipe.config import Recipe
from pipelines.recipe.drawn import Mask
from pipelines.recipe.draws import TrainingDraw
from pipelines.recipe.stage import StageConfig
from pipelines.recipe.stores import (
    CacheJob,
    Opened,
    half_built,
    jobs_of,
    open_stores,
    pixel_jobs,
)
from pipelines.records import checkpoint
from pipelines.training.arrivals import Arrivals
from pipelines.training.batches import Batch, Batches, Loader
from pipelines.training.feeds import Feed

NORMALISERS: dict[str, Callable[[Moments], Normaliser]] = {"zscore": zscore, "phi-s": phi_s}


def _nothing() -> None:
    """Wait for nothing."""


@dataclass(frozen=True)
class Inputs:
    """What a stage trains on.

    Attributes:
        batches: steps -> this worker's micro-batches of those steps, in order.
        dims: teacher -> (summary width, patch width).
        normalisers: teacher -> what its tokens went through; kept in checkpoints.
        identity: what the tokens depend on, plain data; a run goes on only with the same.
        pins: store directory -> manifest version that is read; and sample table -> one past the
            last row that is drawn from.
        opened: the stores it reads, for an evaluation beside the training.
        wait_to_judge: returns once the stores that the student is judged by are whole.
    """

    batches: Callable[[range], Iterable[Batch]]
    dims: Mapping[str, tuple[int, int]]
    normalisers: Mapping[str, Normalisers]
    identity: Mapping[str, object]
    pins: Mapping[str, int]
    opened: Opened = field(default_factory=Opened)
    wait_to_judge: Callable[[], None] = _nothing


def from_caches(
    recipe: Recipe,
    stage: StageConfig,
    pins: Mapping[str, int] | None = None,
    loader: Loader | None = None,
) -> Inputs:
    """Open a stage's training caches.

    Args:
        recipe: the run.
        stage: one of its stages.
        pins: store directory -> manifest version to read; None, or a store that is not named: the
            newest. A run that resumes reads what it read before, whatever was added since.
        loader: how this worker loads its batches; None: alone, as the recipe says.

    Raises:
        BadInput: weights that cannot be read, or a proxy that stage 1 has not made yet.
        StoreError: a store is absent, half built or of another spec.
    """
    opened, resuming = Opened(), pins is not None
    training = _training_stores(recipe, stage, opened, resuming)
    normalisers = fixed_normalisers(recipe, stage, opened, resuming)
    feeds = {
        name: _feed(recipe, stage, job, stores, normalisers, pins or {}, resuming, opened)
        for name, (job, stores) in training.items()
    }
    identity: dict[str, dict[str, Any]] = {}
    for dataset, (_, stores) in training.items():
        for store in stores:
            own = identity.setdefault(
                store.spec.teacher.name,
                {
                    "teacher": store.spec.teacher.model_dump(mode="json"),
                    "codec": store.spec.codec.model_dump(mode="json"),
                    "moments": {},
                },
            )
            own["moments"][f"{dataset} at {store.spec.resolution}"] = store.moments_sha256
    given = of_feeds(recipe, stage, feeds, normalisers, identity, loader)
    waits = stage.on_missing == "wait"
    wait_to_judge = _waiting_to_judge(recipe, stage, opened) if waits else _nothing
    return replace(given, opened=opened, wait_to_judge=wait_to_judge)


def _may_lack(stage: StageConfig) -> bool:
    """True if shards that a stage draws may be missing when it begins."""
    return stage.on_missing != "refuse"


def _waiting_to_judge(recipe: Recipe, stage: StageConfig, opened: Opened) -> Callable[[], None]:
    """Return what waits for the centre views: all workers call it, one judges."""
    stores = [
        (job, store)
        for job in jobs_of(recipe, stage)
        if job.views == recipe.held_out_views
        for store in _stores(stage, job, True, opened)
    ]

    def missing() -> int:
        return sum(
            store.lacks(job.wanted_of(store), store.samples.shards()) for job, store in stores
        )

    def wait() -> None:
        Arrivals(recipe, stage).wait("what it is judged by", "shards", missing)

    return wait


def fixed_normalisers(
    recipe: Recipe, stage: StageConfig, opened: Opened, resuming: bool = True
) -> dict[str, Normalisers]:
    """Return a stage's normalisers, of its training caches.

    Args:
        recipe: the run.
        stage: one of its stages.
        opened: stores that are open already; those opened here are added.
        resuming: True for a stage that has begun: those of its newest checkpoint, where it has one.

    Raises:
        BadInput: as for `from_caches`.
        StoreError: as for `from_caches`.
    """
    training = _training_stores(recipe, stage, opened, resuming)
    mix = recipe.mix(stage)
    shares = dict(zip(mix.names, mix.expected().tolist(), strict=True))
    own = [(shares[name], stores) for name, (_, stores) in training.items()]
    normalisers = normalisers_of(stage, own)
    saved = checkpoint.latest(recipe.stage_directory(stage.name)) if resuming else None
    return normalisers if saved is None else _as_saved(normalisers, saved.normalisers())


def _training_stores(
    recipe: Recipe, stage: StageConfig, opened: Opened, resuming: bool
) -> dict[str, tuple[CacheJob, list[Store]]]:
    """Return train set -> its job and stores."""
    return {
        job.dataset.name: (job, _stores(stage, job, resuming, opened))
        for job in jobs_of(recipe, stage)
        if job.dataset in recipe.train.values() and job.views == recipe.views
    }


def of_feeds(
    recipe: Recipe,
    stage: StageConfig,
    feeds: Mapping[str, Feed],
    normalisers: Mapping[str, Normalisers],
    identity: Mapping[str, object],
    loader: Loader | None = None,
) -> Inputs:
    """Return the inputs of a stage whose datasets are open.

    Args:
        recipe: its mix, views, seed and loader settings.
        stage: its teachers, scales and batch.
        feeds: dataset -> how it is read, cached or live.
        normalisers: teacher -> what is done to its tokens.
        identity: as in `Inputs`.
        loader: how this worker loads its batches; None: alone, as the recipe says.

    Raises:
        BadInput: a dataset of the mix without feed, or datasets with teachers of other widths.
    """
    draw = TrainingDraw(
        recipe.mix(stage),
        {name: feed.source.shards() for name, feed in feeds.items()},
        {name: recipe.views_of(name) for name in feeds},
        recipe.seed,
    )

    def batches(steps: range) -> Batches:
        return Batches(
            feeds,
            draw,
            partial(resolutions.draw, stage, recipe.seed),
            partial(resolutions.micro_batch, stage),
            steps,
            loader or Loader(recipe.workers),
            Arrivals(recipe, stage).wait if stage.on_missing == "wait" else None,
        )

    widths = [feed.source.dims() for feed in feeds.values()]
    if any(other != widths[0] for other in widths):
        raise BadInput(f"teachers' widths differ between datasets: {widths}")
    pins = {name: version for feed in feeds.values() for name, version in feed.versions().items()}
    dims = {teacher: widths[0][teacher] for teacher in stage.teachers}
    return Inputs(batches, dims, normalisers, identity, pins)


def centre_feeds(
    recipe: Recipe,
    stage: StageConfig,
    normalisers: Mapping[str, Normalisers],
    resuming: bool = False,
    opened: Opened | None = None,
) -> dict[str, Feed]:
    """Open the centre views of the bank's sets and of the held-out set, for evaluation.

    Args:
        recipe: the run.
        stage: whose teachers and scales are wanted.
        normalisers: those the stage trained with.
        resuming: True for a run that goes on: as in `open_stores`.
        opened: stores that are open already; those opened here are added.

    Returns:
        dataset -> how it is read.

    Raises:
        BadInput: as for `from_caches`.
        StoreError: as for `from_caches`.
    """
    opened = opened or Opened()
    return {
        job.dataset.name: _feed(
            recipe,
            stage,
            job,
            _stores(stage, job, resuming, opened),
            normalisers,
            {},
            resuming,
            opened,
        )
        for job in jobs_of(recipe, stage)
        if job.views == recipe.held_out_views
    }


def normalisers_of(
    stage: StageConfig, stores: Sequence[tuple[float, Sequence[Store]]]
) -> dict[str, Normalisers]:
    """Make the normalisers of a stage: one a teacher and kind, over all resolutions and datasets.

    EUPE (arXiv:2603.22387), Fig. 3: statistics are measured once and then fixed. Datasets count as
    much as batches draw from them, whatever number of samples each was measured on.

    Args:
        stage: its teachers and which normaliser.
        stores: share of the draws, and stores, of each dataset; they are mixed in this order.
    """
    make = NORMALISERS[stage.normaliser]
    shares = [share for share, _ in stores]
    out = {}
    for teacher in stage.teachers:
        measured = [
            [store.moments() for store in each if store.spec.teacher.name == teacher]
            for _, each in stores
        ]
        modules = [
            make(
                mixed(
                    [reduce(merge, (Moments(*own[kind]) for own in each)) for each in measured],
                    shares,
                )
            )
            for kind in Normalisers._fields
        ]
        out[teacher] = Normalisers(*modules)
    return out


def _stores(stage: StageConfig, job: CacheJob, resuming: bool, opened: Opened) -> list[Store]:
    """Open the stores of a stage's teachers, by teacher and then resolution.

    All resolutions, drawn from or not: a teacher has one normaliser over all of them (law 9), so
    stages that draw other scales learn the same targets.
    """
    wanted = tuple(
        teacher.model_copy(update={"resolutions": tuple(sorted(teacher.resolutions))})
        for name in stage.teachers
        for teacher in job.teachers
        if teacher.name == name
    )
    half = resuming or _may_lack(stage)
    return open_stores(job.model_copy(update={"teachers": wanted}), half, opened)


def _feed(
    recipe: Recipe,
    stage: StageConfig,
    job: CacheJob,
    stores: Sequence[Store],
    normalisers: Mapping[str, Normalisers],
    pins: Mapping[str, int],
    resuming: bool,
    opened: Opened,
) -> Feed:
    may_lack, shards = _may_lack(stage), None
    if job.drawing is not None or may_lack:
        shards = _drawn_from(stores[0], pins)
    max_lost = int(job.extraction.max_failure_share * len(stores[0].samples))
    images = ImageReader(base(job.dataset.source), row_groups(), max_lost)
    live = None
    if stage.on_missing == "live":
        device = "cuda" if recipe.workers.use_gpu else "cpu"
        live = LiveRows(job.teachers, images, job.views, device)

    def reader(store: Store, wanted: Mask | None) -> Reader:
        version = pins.get(str(store.spec.directory()))
        if shards is None or wanted is None:
            return opened.reader(store, range(job.num_views), version, recipe.workers)
        growing, missing = may_lack, store.lacks(wanted, shards, version)
        if missing and version is not None:
            # Built since that run began: it waited for them, or is asked for more steps now.
            growing, missing = True, store.lacks(wanted, shards)
        if missing and not may_lack:
            raise half_built(store, missing, wanted)
        if missing and live is not None:
            live.load(store)  # what is wrong with its weights is said before the first step
        views = np.flatnonzero(wanted.any(axis=1)).tolist()
        return opened.reader(store, views, version, recipe.workers, growing)

    def drawn(of: CacheJob, store: Store) -> Mask | None:
        spec = store.spec
        if shards is None:
            return None
        return of.wanted(spec.teacher.name, spec.resolution, shards, spec.codec.name)

    readers, rest = (
        {
            (store.spec.teacher.name, store.spec.resolution): reader(store, drawn(job, store))
            for store in stores
            if store.spec.resolution in stage.teacher_resolutions[store.spec.teacher.name]
            and (store.spec.codec.name == NONE) is alone
        }
        for alone in (False, True)
    )
    source = CachedSource(readers, normalisers, shards, live, rest)
    pixels = dict[int, Reader]()
    for other in pixel_jobs(recipe, stage):
        if (other.dataset, other.views) != (job.dataset, job.views):
            continue
        for store in open_stores(other, resuming or may_lack, opened):
            wanted = drawn(other, store)
            every = np.ones((job.num_views, len(source.shards())), bool)
            whole = not store.lacks(every if wanted is None else wanted, source.shards())
            if whole or stage.on_missing == "wait":  # else views are drawn again
                pixels[store.spec.resolution] = reader(store, wanted)
    return Feed(source, images, job.views, pixels)


def _drawn_from(store: Store, pins: Mapping[str, int]) -> ShardRanges:
    """Return the shards of a dataset that a run draws from: those there were when it began."""
    shards = store.samples.shards()
    return shards.where(shards.stops <= pins.get(samples_pin(store.samples), shards.stops[-1]))


@cache
def row_groups() -> RowGroups:
    """Return the process's row groups: what all its readers keep in memory is bounded."""
    return RowGroups()


def _as_saved(
    computed: Mapping[str, Normalisers], saved: Mapping[str, Tensor]
) -> dict[str, Normalisers]:
    """Put a checkpoint's buffers in place of those computed here.

    PHI-S asks linear algebra for a basis: where the moments leave it open, another machine's
    differs, and a run that goes on would learn other targets.
    """
    for name, pair in computed.items():
        for kind, module in zip(pair._fields, pair, strict=True):
            prefix = f"{name}.{kind}."
            own = {
                key.removeprefix(prefix): v for key, v in saved.items() if key.startswith(prefix)
            }
            if own.keys() == module.state_dict().keys():  # else the run is another, and refused
                module.load_state_dict(own)
    return dict(computed)
