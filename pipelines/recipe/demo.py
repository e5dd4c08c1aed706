"""The demo: the three stages on real emoji, in minutes on two cores; and its stage 2 alone."""

from eupe.spec import AugmentedView, CentreView, EncoderSpec
from pipelines.recipe import family
from pipelines.recipe.config import (
    PROXY,
    EvaluationConfig,
    ExtractionConfig,
    Recipe,
    StudentConfig,
    WorkersConfig,
)
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import OptimizerConfig, StageConfig, StageName

NAME = "demo"
STAGE_2_ONLY = "demo_stage2"
PYRAMID = (64, 96, 128)


def whole() -> Recipe:
    """Return the demo: three stages on real emoji with two ImageNet teachers, on two cores.

    The teachers are Python packages; the pyramid is (64, 96, 128), as small as the emoji are.
    Views are mild: a run this short sees each picture some four times, and with the paper's
    stronger ones it learns less in the same time (docs/log.md).
    """
    teachers = (family.efficientnet_lite(0, (128,)), family.efficientnet_lite(2, (160,)))
    return Recipe(
        name=NAME,
        run_directory=f"runs/{NAME}",
        cache_root="runs/cache",
        train=by_name(family.emoji("train")),
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
        teachers=by_name(*teachers),
        proxy=StudentConfig(name=PROXY, encoder=_small_vit(depth=4, layer_scale=0.3)),
        proxy_dtype="float32",
        student=StudentConfig(name="vit_mini", encoder=_small_vit(depth=3, layer_scale=0.1)),
        stages=by_name(
            _stage("stage1", {t.name: t.resolutions for t in teachers}, (96,), steps=600),
            _stage("stage2", {PROXY: PYRAMID[:1]}, PYRAMID[:1], steps=200),
            _stage("stage3", {PROXY: PYRAMID}, PYRAMID, steps=500, lr=7e-4),
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
        evaluation=EvaluationConfig(label="category", resolution=PYRAMID[-1]),
    )


def stage_2_only() -> Recipe:
    """Return the demo's "Stage 2 only": both teachers straight into the student, same caches."""
    demo = whole()
    scales = {name: teacher.resolutions for name, teacher in demo.teachers.items()}
    return demo.model_copy(
        update={
            "name": STAGE_2_ONLY,
            "run_directory": f"runs/{STAGE_2_ONLY}",
            "proxy": None,
            "stages": by_name(_stage("stage2", scales, (96,), steps=700)),
            "evaluation": demo.evaluation.model_copy(update={"resolution": 96}),
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


def _stage(
    name: StageName,
    teacher_resolutions: dict[str, tuple[int, ...]],
    student_resolutions: tuple[int, ...],
    steps: int,
    lr: float = 1e-3,
) -> StageConfig:
    return StageConfig(
        name=name,
        teachers=tuple(teacher_resolutions),
        student="proxy" if name == "stage1" else "student",
        teacher_resolutions=teacher_resolutions,
        student_resolutions=student_resolutions,
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
