"""Recipes by name or from a file, their relative paths resolved once against EUPE_HOME."""

import difflib
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eupe.spec import AugmentedView, CentreView, EncoderSpec
from pipelines.recipe import family
from pipelines.recipe.config import (
    PROXY,
    DatasetConfig,
    EvaluationConfig,
    ExtractionConfig,
    OptimizerConfig,
    Recipe,
    SourceConfig,
    StageConfig,
    StageName,
    StudentConfig,
    WorkersConfig,
    changed,
    override,
)

DEFAULT = "demo"
STAGE_2_ONLY = "demo_stage2"
FILES = (".yaml", ".yml")
DEMO_PYRAMID = (64, 96, 128)


def demo() -> Recipe:
    """Return the demo: three stages on real emoji with two ImageNet teachers, on two cores.

    The teachers are Python packages; the pyramid is (64, 96, 128), as small as the emoji are.
    Views are mild: a run this short sees each picture some four times, and with the paper's
    stronger ones it learns less in the same time (docs/log.md).
    """
    teachers = (family.efficientnet_lite(0, (128,)), family.efficientnet_lite(2, (160,)))
    return Recipe(
        name=DEFAULT,
        run_directory=f"runs/{DEFAULT}",
        cache_root="runs/cache",
        train=(family.emoji("train"),),
        held_out=family.emoji("test"),
        views=AugmentedView(
            canvas=160,
            crop_area=(0.8, 1.0),
            jitter_probability=0.3,
            blur_sigma=(0.1, 1.0),
            blur_probability=0.1,
            solarize_probability=0.02,
        ),
        held_out_views=CentreView(canvas=160),
        teachers=teachers,
        proxy=StudentConfig(name=PROXY, encoder=_small_vit(depth=4, layer_scale=0.3)),
        proxy_dtype="float32",
        student=StudentConfig(name="vit_mini", encoder=_small_vit(depth=3, layer_scale=0.1)),
        stages=(
            _demo_stage("stage1", {t.name: t.resolutions for t in teachers}, (96,), steps=600),
            _demo_stage("stage2", {PROXY: DEMO_PYRAMID[:1]}, DEMO_PYRAMID[:1], steps=200),
            _demo_stage("stage3", {PROXY: DEMO_PYRAMID}, DEMO_PYRAMID, steps=500, lr=7e-4),
        ),
        extraction=ExtractionConfig(
            rows_per_shard=256,
            moments_samples=128,
            compute_batch=32,
            actors=2,  # two of one core each are a quarter faster than one of two
            cpus_per_actor=1,
            decode_threads=1,
        ),
        workers=WorkersConfig(),
        evaluation=EvaluationConfig(label="category", resolution=DEMO_PYRAMID[-1]),
    )


def demo_stage2() -> Recipe:
    """Return the demo's "Stage 2 only": both teachers straight into the student, same caches."""
    whole = demo()
    scales = {teacher.name: teacher.resolutions for teacher in whole.teachers}
    return whole.model_copy(
        update={
            "name": STAGE_2_ONLY,
            "run_directory": f"runs/{STAGE_2_ONLY}",
            "proxy": None,
            "stages": (_demo_stage("stage2", scales, (96,), steps=700),),
            "evaluation": whole.evaluation.model_copy(update={"resolution": 96}),
        }
    )


def _small_vit(depth: int, layer_scale: float) -> EncoderSpec:
    """Return a ViT-T/16 of fewer blocks.

    Deviation: LayerScale begins above the released family's 1e-5, with which a few hundred steps
    leave the blocks idle: the proxy's patches are then next to linear in its pixels, and stage 3
    has nothing to add to stage 2 (docs/log.md).
    """
    return EncoderSpec(
        architecture="vit_tiny_patch16_dinov3_qkvb",
        model_arguments={"depth": depth, "init_values": layer_scale},
    )


def _demo_stage(
    name: StageName,
    teacher_scales: dict[str, tuple[int, ...]],
    student_scales: tuple[int, ...],
    steps: int,
    lr: float = 1e-3,
) -> StageConfig:
    return StageConfig(
        stage=name,
        teachers=tuple(teacher_scales),
        student="proxy" if name == "stage1" else "student",
        teacher_scales=teacher_scales,
        student_scales=student_scales,
        steps=steps,
        global_batch=16,  # many small steps learn more in a minute than few large ones
        micro_batch=16,
        head_hidden=256,
        optimizer=OptimizerConfig(lr=lr, weight_decay=0.05),
        warmup_steps=steps // 10,
        precision="float32",  # a CPU without bfloat16 units is many times slower at it
        evaluate_every=250,
        checkpoint_every=250,
        initial="stage2" if name == "stage3" else None,
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    DEFAULT: demo,
    STAGE_2_ONLY: demo_stage2,
    **{name: partial(family.full, name) for name in family.STUDENTS},
    "proxy_vitg": family.proxy,
}
RECIPES |= {
    f"{name}_tiny": lambda whole=RECIPES[name]: family.tiny(whole())
    for name in (*family.STUDENTS, "proxy_vitg")
}


def get(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of that name, its paths absolute.

    Args:
        name: of the recipe; or a YAML file that says which recipe it changes, and how.
        overrides: fields to change, path.to.field=value (see `config.override`).

    Raises:
        ValueError: there is none, naming the nearest; or a change does not fit.
    """
    named = _from_file(home() / name) if name.endswith(FILES) else _named(name)
    return _placed(override(named, overrides), home())


def _from_file(path: Path) -> Recipe:
    """Read `recipe: NAME` and `set: {path.to.field: value}`; the new recipe has the file's name.

    Raises:
        ValueError: no such file, no YAML of that form, or a change that does not fit.
    """
    try:
        asked = OmegaConf.to_container(OmegaConf.load(path))
    except OSError as error:
        raise ValueError(f"{path}: no recipe there ({error.strerror})") from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(asked, dict) or set(asked) != {"recipe", "set"}:
        raise ValueError(f"{path}: wants `recipe: NAME` and `set: {{path.to.field: value}}`")
    base = _named(str(asked["recipe"]))
    fields = [("name", path.stem), *(asked["set"] or {}).items()]
    try:
        return changed(base, fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _named(name: str) -> Recipe:
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(RECIPES))}"
        raise ValueError(f"no recipe {name!r}; {hint}")
    return RECIPES[name]()


def home() -> Path:
    """Return the folder that relative paths mean: EUPE_HOME, or the working folder."""
    return Path(os.environ.get("EUPE_HOME") or ".").resolve()


def _placed(recipe: Recipe, home: Path) -> Recipe:
    def placed(path: str) -> str:
        return path if "://" in path else str(home / path)

    def weights(uri: str | None) -> str | None:
        scheme, colon, path = (uri or "").partition(":")
        return f"{scheme}{colon}{home / path}" if scheme in ("file", "checkpoint") else uri

    def student(config: StudentConfig) -> StudentConfig:
        return config.model_copy(update={"weights": weights(config.weights)})

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
            "teachers": tuple(
                teacher.model_copy(update={"weights": weights(teacher.weights)})
                for teacher in recipe.teachers
            ),
            "proxy": recipe.proxy and student(recipe.proxy),
            "student": student(recipe.student),
        }
    )
