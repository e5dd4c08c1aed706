"""Recipes by name, their relative paths resolved once against EUPE_HOME."""

import difflib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from eupe.spec import AugmentedView, CentreView, EncoderSpec
from pipelines import family
from pipelines.config import (
    DatasetConfig,
    EvaluationConfig,
    ExtractionConfig,
    OptimizerConfig,
    Recipe,
    SourceConfig,
    StageConfig,
    StudentConfig,
    WorkersConfig,
    override,
)

DEFAULT = "demo"
STAGE_2_ONLY = "demo_stage2"


def demo_stage2() -> Recipe:
    """Return the demo's "Stage 2 only": both teachers straight into a small student.

    Real emoji, two ImageNet teachers that are Python packages, two cores, a few minutes.
    """
    teachers = (family.efficientnet_lite(0, (192,)), family.efficientnet_lite(2, (160,)))
    return Recipe(
        name=STAGE_2_ONLY,
        run_directory=f"runs/{STAGE_2_ONLY}",
        cache_root="runs/cache",
        train=(family.emoji("train"),),
        held_out=family.emoji("test"),
        views=AugmentedView(
            canvas=192, crop_area=(0.5, 1.0), blur_sigma=(0.1, 1.5), blur_probability=0.2
        ),
        num_views=2,
        held_out_views=CentreView(canvas=192),
        teachers=teachers,
        student=StudentConfig(
            name="vit_mini",
            encoder=EncoderSpec(
                architecture="vit_tiny_patch16_dinov3_qkvb", model_arguments={"depth": 6}
            ),
        ),
        stages=(
            StageConfig(
                stage="stage2",
                teachers=tuple(teacher.name for teacher in teachers),
                teacher_scales={teacher.name: teacher.resolutions for teacher in teachers},
                student_scales=(96,),
                steps=300,
                global_batch=64,
                micro_batch=64,
                head_hidden=768,
                optimizer=OptimizerConfig(lr=1.5e-3, weight_decay=0.05),
                warmup_steps=20,
                precision="float32",  # a CPU without bfloat16 units is many times slower at it
                evaluate_every=100,
            ),
        ),
        extraction=ExtractionConfig(rows_per_shard=256, moments_samples=256, compute_batch=32),
        workers=WorkersConfig(),
        evaluation=EvaluationConfig(label="category", resolution=96),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    STAGE_2_ONLY: demo_stage2,
    **{name: partial(family.full, name) for name in family.STUDENTS},
    "proxy_vitg": family.proxy,
}
RECIPES |= {
    f"{name}_tiny": lambda whole=RECIPES[name]: family.tiny(whole())
    for name in (*family.STUDENTS, "proxy_vitg")
}
RECIPES[DEFAULT] = lambda: demo_stage2().model_copy(
    update={"name": DEFAULT, "run_directory": f"runs/{DEFAULT}"}
)


def get(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of that name, its paths absolute.

    Args:
        name: of the recipe.
        overrides: fields to change, path.to.field=value (see `config.override`).

    Raises:
        ValueError: there is none, naming the nearest; or an override does not fit.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(RECIPES))}"
        raise ValueError(f"no recipe {name!r}; {hint}")
    return _placed(override(RECIPES[name](), overrides), home())


def home() -> Path:
    """Return the folder that relative paths mean: EUPE_HOME, or the working folder."""
    return Path(os.environ.get("EUPE_HOME") or ".").resolve()


def _placed(recipe: Recipe, home: Path) -> Recipe:
    def placed(path: str) -> str:
        return path if "://" in path else str(home / path)

    def dataset(config: DatasetConfig) -> DatasetConfig:
        source: SourceConfig = config.source.model_copy(update={"path": placed(config.source.path)})
        return config.model_copy(update={"source": source})

    shared = recipe.proxy_directory
    return recipe.model_copy(
        update={
            "run_directory": placed(recipe.run_directory),
            "cache_root": placed(recipe.cache_root),
            "proxy_directory": shared and placed(shared),
            "train": tuple(dataset(config) for config in recipe.train),
            "held_out": dataset(recipe.held_out),
        }
    )
