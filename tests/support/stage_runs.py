"""Stages in small: the same steps from a cache and from live teachers, and a run of all three."""

from pathlib import Path

from eupe.spec import AugmentedView, CentreView, EncoderSpec
from eupe.teachers import load_teacher
from pipelines.features.sources import LiveSource
from pipelines.images.reader import ImageReader
from pipelines.recipe.config import (
    PROXY,
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
from pipelines.recipe.stores import CacheJob, jobs_of, open_stores
from pipelines.records import tracking
from pipelines.training import inputs
from pipelines.training.batches import Feed
from pipelines.training.loop import train_stage
from support import small_caches

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
    normalisers = inputs.normalisers_of(stage, [stores])
    source = LiveSource(
        {each.name: load_teacher(each.name, each.encoder, each.weights) for each in job.teachers},
        stores[0].samples,
        ImageReader(),
        run.views,
        normalisers,
        compute_batch,
    )
    feeds = {job.dataset.name: Feed(source, ImageReader(), run.views)}
    return inputs.of_feeds(run, stage, feeds, normalisers, {})


def vit(**arguments: int) -> EncoderSpec:
    """Return a ViT of two narrow blocks, patch 16 unless told."""
    return EncoderSpec(
        architecture="vit_tiny_patch16_dinov3_qkvb",
        model_arguments={"embed_dim": 48, "depth": 2, "num_heads": 2, **arguments},
    )


def three_stages(directory: Path, emoji: Path) -> Recipe:
    """Return a run of all three stages; it and its images, written here, lie below a folder.

    Two experts of different kind, native resolution and grid: EfficientNet-Lite0 at 64 pixels
    (2 x 2) and a random ViT with patch 8 at 32 (4 x 4). The proxy sees them at 48 (3 x 3).
    """
    found = list(small_caches.pictures(emoji, 20).items())
    sources: dict[str, SourceConfig] = {}
    for name, part in (("train", found[:14]), ("held-out", found[14:])):
        path = directory / f"{name}.parquet"
        sources[name] = small_caches.write_parquet(path, dict(part))
    experts = (
        small_caches.teacher((64,)),
        TeacherConfig(
            name="vit8",
            encoder=vit(patch_size=8),
            weights="random:5",
            resolutions=(32,),
            codec="float32",
        ),
    )
    return Recipe(
        name="three_stages",
        run_directory=str(directory / "run"),
        cache_root=str(directory / "cache"),
        seed=178,  # draws all nine pairs of scales in ten steps
        train=by_name(DatasetConfig(name="train", source=sources["train"])),
        held_out=DatasetConfig(name="held-out", source=sources["held-out"]),
        views=AugmentedView(seed=11, canvas=64),
        num_views=2,
        held_out_views=CentreView(canvas=64),
        teachers=by_name(*experts),
        proxy=StudentConfig(name=PROXY, encoder=vit(depth=3)),
        proxy_dtype="float32",
        proxy_codec="float32",
        student=StudentConfig(name="student", encoder=vit()),
        stages=by_name(
            _stage("stage1", {each.name: each.resolutions for each in experts}, (48,), 4),
            _stage("stage2", {PROXY: PYRAMID[:1]}, PYRAMID[:1], 4),
            _stage("stage3", {PROXY: PYRAMID}, PYRAMID, 4),
        ),
        extraction=ExtractionConfig(rows_per_shard=8, moments_samples=14, compute_batch=8),
        workers=WorkersConfig(loader_threads=2, prefetch_batches=3),
        evaluation=EvaluationConfig(label="label", k=3, resolution=64, batch=8),
    )


def _stage(
    name: str, teacher_scales: dict[str, tuple[int, ...]], scales: tuple[int, ...], steps: int
) -> StageConfig:
    return StageConfig(
        name=name,
        teachers=tuple(teacher_scales),
        student="proxy" if name == "stage1" else "student",
        teacher_scales=teacher_scales,
        student_scales=scales,
        steps=steps,
        global_batch=6,
        micro_batch=6,
        head_hidden=32,
        optimizer=OptimizerConfig(lr=1e-3),
        precision="float32",
        log_every=1,
        initial="stage2" if name == "stage3" else None,
    )
