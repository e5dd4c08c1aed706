"""A whole run in small: 48 emoji, EfficientNet-Lite0 at 64 pixels, a student of two blocks."""

from pathlib import Path

from eupe.spec import CentreView, EncoderSpec
from pipelines.recipe.config import (
    DatasetConfig,
    EvaluationConfig,
    ExtractionConfig,
    Recipe,
    SourceConfig,
    StudentConfig,
)
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import OptimizerConfig, StageConfig
from pipelines.recipe.stores import cache_jobs
from support import small_caches

EMOJI = Path(__file__).resolve().parents[2] / "examples" / "emoji" / "emoji.parquet"


def recipe(directory: Path) -> Recipe:
    """Return the run; its images and everything it writes are below a folder."""
    teacher = small_caches.teacher()
    return Recipe(
        name="small_run",
        run_directory=str(directory / "run"),
        cache_root=str(directory / "cache"),
        train=by_name(dataset(directory, "train")),
        held_out=dataset(directory, "held-out"),
        views=small_caches.POLICY,
        num_views=2,
        held_out_views=CentreView(canvas=64),
        teachers=by_name(teacher),
        student=StudentConfig(
            name="student",
            encoder=EncoderSpec(
                architecture="vit_tiny_patch16_dinov3_qkvb",
                model_arguments={"embed_dim": 32, "depth": 2, "num_heads": 2},
            ),
        ),
        stages=by_name(
            StageConfig(
                name="stage2",
                teachers=("lite0",),
                teacher_scales={"lite0": (64,)},
                student_scales=(64,),
                steps=8,
                global_batch=8,
                micro_batch=8,
                head_hidden=32,
                optimizer=OptimizerConfig(lr=3e-3),
                precision="float32",
                log_every=2,
                checkpoint_every=4,
                evaluate_every=4,
            ),
        ),
        extraction=ExtractionConfig(rows_per_shard=10, moments_samples=16, compute_batch=8),
        evaluation=EvaluationConfig(label="label", k=3, resolution=64, batch=7),
    )


def dataset(directory: Path, name: str) -> DatasetConfig:
    source = SourceConfig(
        kind="parquet", path=str(directory / f"{name}.parquet"), label_columns=("label",)
    )
    return DatasetConfig(name=name, source=source)


def build(run: Recipe, directory: Path) -> None:
    """Write the images and build the caches, in this process."""
    pictures = list(small_caches.pictures(EMOJI, 48).items())
    small_caches.write_parquet(directory / "train.parquet", dict(pictures[:32]))
    small_caches.write_parquet(directory / "held-out.parquet", dict(pictures[32:]))
    for job in cache_jobs(run):
        small_caches.build(job)
