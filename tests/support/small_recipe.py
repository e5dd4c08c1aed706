"""The one builder of test recipes: a run small enough for a test; any field may be given."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from eupe.spec import AugmentedView, CentreView, EncoderSpec
from pipelines.recipe.config import (
    DatasetConfig,
    EvaluationConfig,
    ExtractionConfig,
    Recipe,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
)
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import OptimizerConfig, StageConfig


def vit(**arguments: float) -> EncoderSpec:
    """Return a ViT of two narrow blocks, patch 16 unless told."""
    return EncoderSpec(
        architecture="vit_tiny_patch16_dinov3_qkvb",
        model_arguments={"embed_dim": 32, "depth": 2, "num_heads": 2, **arguments},
    )


def random_teacher(
    name: str, resolutions: tuple[int, ...], encoder: EncoderSpec, **fields: object
) -> TeacherConfig:
    """Return a teacher of random weights whose features are kept as they are."""
    settings = {"weights": "random:0", "codec": "float32", **fields}
    return TeacherConfig(name=name, encoder=encoder, resolutions=resolutions, **settings)


def stage(
    teacher_resolutions: Mapping[str, tuple[int, ...]],
    student_resolutions: tuple[int, ...],
    **fields: object,
) -> StageConfig:
    """Return a stage of a few steps in float32 that writes every step down."""
    settings = {
        "name": "stage2",
        "teachers": tuple(teacher_resolutions),
        "teacher_resolutions": dict(teacher_resolutions),
        "student_resolutions": student_resolutions,
        "steps": 12,
        "global_batch": 8,
        "micro_batch": 8,
        "head_hidden": 32,
        "optimizer": OptimizerConfig(lr=3e-3),
        "precision": "float32",
        "log_every": 1,
    }
    return StageConfig(**{**settings, **fields})


def recipe(
    directory: Path,
    teachers: Sequence[TeacherConfig],
    stages: Sequence[StageConfig],
    *,
    canvas: int = 64,
    **fields: object,
) -> Recipe:
    """Return a run; its images and everything it writes are below a folder.

    Args:
        directory: holds `train.parquet` and `held-out.parquet`, unless other data sets are given.
        teachers: of the recipe.
        stages: in their order.
        canvas: side of the views, pixels.
        fields: of the recipe, in the place of those here.
    """
    settings = {
        "name": "small",
        "run_directory": str(directory / "run"),
        "cache_root": str(directory / "cache"),
        "train": by_name(dataset(directory, "train")),
        "held_out": dataset(directory, "held-out"),
        "views": AugmentedView(seed=5, canvas=canvas),
        "held_out_views": CentreView(canvas=canvas),
        "teachers": by_name(*teachers),
        "student": StudentConfig(name="student", encoder=vit()),
        "stages": by_name(*stages),
        "extraction": ExtractionConfig(rows_per_shard=10, moments_samples=16, compute_batch=8),
        "evaluation": EvaluationConfig(resolution=canvas),
    }
    return Recipe(**{**settings, **fields})


def dataset(directory: Path, name: str) -> DatasetConfig:
    """Return a set of images in a Parquet file of its name."""
    path = str(directory / f"{name}.parquet")
    source = SourceConfig(kind="parquet", path=path, label_columns=("label",))
    return DatasetConfig(name=name, source=source)
