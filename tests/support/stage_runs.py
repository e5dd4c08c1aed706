"""Stages in small: the same steps from a cache and from live teachers, and a run of all three."""

from pathlib import Path

from eupe.spec import AugmentedView, EncoderSpec
from eupe.teachers import load_teacher
from pipelines.features.live import LiveSource
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe.config import (
    PROXY,
    EvaluationConfig,
    ExtractionConfig,
    Recipe,
    StudentConfig,
    WorkersConfig,
)
from pipelines.recipe.stage import OptimizerConfig, StageConfig
from pipelines.recipe.stores import CacheJob, cache_jobs, jobs_of, open_stores, proxy_jobs
from pipelines.records import tracking
from pipelines.training import inputs, launch
from pipelines.training.feeds import Feed
from pipelines.training.loop import train_stage
from support import small_caches, small_recipe

PYRAMID = (32, 48, 64)  # with patch 16: grids of 2, 3 and 4 tokens a side


def training_job(run: Recipe, stage: StageConfig) -> CacheJob:
    """Return the job whose stores a stage of a run with one train set trains on."""
    return next(job for job in jobs_of(run, stage) if job.views == run.views)


def losses(run: Recipe, stage: StageConfig, given: inputs.Inputs, directory: Path) -> list[float]:
    """Train a stage from its start and return its loss at every step."""
    train_stage(run, stage, given, directory)
    lines = tracking.read(directory / tracking.METRICS_FILE)
    assert [line["step"] for line in lines] == list(range(1, stage.steps + 1))
    return [line["loss/total"] for line in lines]


def from_cache(run: Recipe, stage: StageConfig, directory: Path) -> list[float]:
    """Return a stage's losses as it trains from its caches."""
    return losses(run, stage, inputs.from_caches(run, stage), directory)


def live(run: Recipe, stage: StageConfig, compute_batch: int) -> inputs.Inputs:
    """Return a stage's inputs with its teachers in the loop, normalised as the cached run's."""
    job = training_job(run, stage)
    stores = open_stores(job)
    normalisers = inputs.normalisers_of(stage, [(1.0, stores)])
    images = ImageReader(base(job.dataset.source))
    source = LiveSource(
        {each.name: load_teacher(each.name, each.encoder, each.weights) for each in job.teachers},
        stores[0].samples,
        images,
        run.views,
        normalisers,
        compute_batch,
    )
    feeds = {job.dataset.name: Feed(source, images, run.views)}
    return inputs.of_feeds(run, stage, feeds, normalisers, {})


def trained_stages(directory: Path, emoji: Path) -> Recipe:
    """Return `three_stages`, each trained from its caches, which are built here."""
    run = three_stages(directory, emoji)
    for job in cache_jobs(run):
        small_caches.build(job)
    launch.train(run, run.stage("stage1"))
    for job in proxy_jobs(run):
        small_caches.build(job)
    for name in ("stage2", "stage3"):
        launch.train(run, run.stage(name))
    return run


def vit(**arguments: int) -> EncoderSpec:
    """Return a ViT of two blocks."""
    return small_recipe.vit(**{"embed_dim": 48, **arguments})


def three_stages(directory: Path, emoji: Path) -> Recipe:
    """Return a run of all three stages; it and its images, written here, lie below a folder.

    Two experts of different kind, native resolution and grid: EfficientNet-Lite0 at 64 pixels
    (2 x 2) and a random ViT with patch 8 at 32 (4 x 4). The proxy sees them at 48 (3 x 3).
    """
    found = list(small_caches.pictures(emoji, 20).items())
    for name, part in (("train", found[:14]), ("held-out", found[14:])):
        small_caches.write_parquet(directory / f"{name}.parquet", dict(part))
    experts = (
        small_caches.teacher((64,)),
        small_recipe.random_teacher("vit8", (32,), vit(patch_size=8), weights="random:5"),
    )
    common = {
        "steps": 4,
        "global_batch": 6,
        "micro_batch": 6,
        "optimizer": OptimizerConfig(lr=1e-3),
    }
    native = {each.name: each.resolutions for each in experts}
    first, pyramid = {PROXY: PYRAMID[:1]}, {PROXY: PYRAMID}
    return small_recipe.recipe(
        directory,
        experts,
        [
            small_recipe.stage(native, (48,), name="stage1", student="proxy", **common),
            small_recipe.stage(first, PYRAMID[:1], **common),
            small_recipe.stage(pyramid, PYRAMID, name="stage3", initial="stage2", **common),
        ],
        name="three_stages",
        seed=178,  # draws all nine pairs of scales in ten steps
        views=AugmentedView(seed=11, canvas=64),
        num_views=2,
        proxy=StudentConfig(name=PROXY, encoder=vit(depth=3)),
        proxy_dtype="float32",
        proxy_codec="float32",
        student=StudentConfig(name="student", encoder=vit()),
        # Everything: tests ask the same caches for more steps than the stages have.
        extraction=ExtractionConfig(
            rows_per_shard=8, moments_samples=14, compute_batch=8, everything=True
        ),
        workers=WorkersConfig(loader_threads=2, prefetch_batches=3),
        evaluation=EvaluationConfig(label="label", k=3, resolution=64, batch=8),
    )
