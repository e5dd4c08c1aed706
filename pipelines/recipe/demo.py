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
PYRAMID = (48, 64, 96)
SCALE_ALONE = 96
"""Of the student that learns from both teachers at once."""


def whole() -> Recipe:
    """Return the demo: three stages on real emoji with two ImageNet teachers, on two cores.

    The teachers are Python packages, and see more pixels than the pyramid (48, 64, 96) has.
    Proxy and student are narrow ResNet-18s: in minutes, from nothing, a convolutional network
    learns what a transformer does not (docs/log.md). Views are mild: a run this short sees each
    picture some ten times, and with the paper's stronger ones it learns less in the same time.
    """
    teachers = (family.efficientnet_lite(0, (128,)), family.efficientnet_lite(2, (160,)))
    return Recipe(
        name=NAME,
        run_directory=f"runs/{NAME}",
        cache_root="runs/cache",
        pixels="all",  # drawing the views again at every step is an eighth of a step
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
        num_views=2,  # a second view of each picture teaches more than more steps on the first
        held_out_views=CentreView(canvas=160),
        teachers=by_name(*teachers),
        proxy=StudentConfig(name=PROXY, encoder=_resnet(32)),
        proxy_dtype="float32",
        student=StudentConfig(name="resnet_mini", encoder=_resnet(24)),
        stages=by_name(
            _stage("stage1", {t.name: t.resolutions for t in teachers}, PYRAMID, steps=800),
            _stage("stage2", {PROXY: PYRAMID[:1]}, PYRAMID[:1], steps=200),
            _stage("stage3", {PROXY: PYRAMID}, PYRAMID, steps=700),
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
            "stages": by_name(_stage("stage2", scales, (SCALE_ALONE,), steps=600)),
            "evaluation": demo.evaluation.model_copy(update={"resolution": SCALE_ALONE}),
        }
    )


def _resnet(width: int) -> EncoderSpec:
    """Return a ResNet-18, `width` channels wide at first, where ResNet's own is 64.

    Its patches are the stride-16 map: a ViT's grid with patch 16.

    Deviation: the family has transformers and ConvNeXts, which learn less in a few hundred steps
    from nothing (docs/log.md).
    """
    return EncoderSpec(
        architecture="resnet18",
        summary="average_pool",
        layer=16,
        model_arguments={"channels": (width, 2 * width, 4 * width, 8 * width)},
    )


def _stage(
    name: StageName,
    teacher_resolutions: dict[str, tuple[int, ...]],
    student_resolutions: tuple[int, ...],
    steps: int,
) -> StageConfig:
    return StageConfig(
        name=name,
        teachers=tuple(teacher_resolutions),
        student="proxy" if name == "stage1" else "student",
        teacher_resolutions=teacher_resolutions,
        student_resolutions=student_resolutions,
        steps=steps,
        global_batch=32,  # many small steps learn more in a minute than few large ones
        # Batch normalisation wants the whole batch at once, at the largest scale too.
        micro_batch=32 * max(student_resolutions) ** 2 // min(student_resolutions) ** 2,
        head_hidden=256,
        optimizer=OptimizerConfig(lr=4e-3, weight_decay=0.05, betas=(0.9, 0.95), clip_norm=3.0),
        warmup_steps=steps // 10,
        precision="float32",  # a CPU without bfloat16 units is many times slower at it
        evaluate_every=steps,  # at the end: it takes as long as thirty steps
        checkpoint_every=300,
        initial="stage2" if name == "stage3" else None,
    )
