"""Recipes for people with one node: pictures and teachers that may be had, their licences named.

The shape is the paper's, three stages with a proxy; teachers, proxy, batches and steps are smaller
(Deviation: the paper's data is not public, and its caches would fill a data centre). What they
cost, in bytes, hours and money: `eupe plan`.
"""

from eupe.spec import AugmentedView, EncoderSpec
from eupe.students import FAMILY
from pipelines.recipe import family
from pipelines.recipe.config import (
    PROXY,
    DatasetConfig,
    EvaluationConfig,
    Recipe,
    SourceConfig,
    StudentConfig,
    TeacherConfig,
)
from pipelines.recipe.named import by_name
from pipelines.recipe.stage import OptimizerConfig, StageConfig

PE_CORE_L = TeacherConfig(
    name="pe_core_l",
    encoder=EncoderSpec(
        architecture="vit_pe_core_large_patch14_336",
        pixel_mean=family.PIXEL_HALF,
        pixel_std=family.PIXEL_HALF,
        summary="attention_pool",
    ),
    weights="hub:fb",
    dtype="bfloat16",
    resolutions=(336,),
    codec=family.CODEC,
    licence="Apache-2.0",
)
DINOV3_L = TeacherConfig(
    name="dinov3_l",
    encoder=EncoderSpec(architecture="vit_large_patch16_dinov3"),
    weights="hub:lvd1689m",
    dtype="bfloat16",
    resolutions=(256,),
    codec=family.CODEC,
    licence="dinov3-license",
)
SIGLIP2 = TeacherConfig(
    name="siglip2_so400m",
    encoder=EncoderSpec(
        architecture="vit_so400m_patch16_siglip_256",
        pixel_mean=family.PIXEL_HALF,
        pixel_std=family.PIXEL_HALF,
        summary="attention_pool",
    ),
    weights="hub:v2_webli",
    dtype="bfloat16",
    resolutions=(256,),
    codec=family.CODEC,
    licence="Apache-2.0",
)
DINOV2_L = TeacherConfig(
    name="dinov2_l",
    encoder=EncoderSpec(architecture="vit_large_patch14_reg4_dinov2"),
    weights="hub:lvd142m",
    dtype="bfloat16",
    resolutions=(224,),
    codec=family.CODEC,
    licence="Apache-2.0",
)


def imagenet1k(student: str) -> Recipe:
    """Return a student of ImageNet-1k, taught by PE-Core-L and DINOv3-L through a ViT-L proxy.

    Args:
        student: a key of `eupe.students.FAMILY`.
    """
    name = f"imagenet1k_{student.removeprefix('eupe_')}"
    return _recipe(
        name,
        student,
        teachers=(PE_CORE_L, DINOV3_L),
        train=DatasetConfig(
            name="imagenet1k",
            source=SourceConfig(kind="folder", path="data/imagenet1k/train"),
            licence=family.IMAGENET_TERMS,
        ),
        held_out=DatasetConfig(
            name="imagenet1k-val", source=SourceConfig(kind="folder", path="data/imagenet1k/val")
        ),
        label="label",
    )


def permissive() -> Recipe:
    """Return a ViT-S/16 that may be used commercially: SigLIP 2 and DINOv2 on public-domain PD12M.

    PD12M is 12.4 million pictures in the public domain or under CC0; without labels, so that no
    kNN judges it unless a held-out set of one's own brings them.
    """
    return _recipe(
        "permissive",
        "eupe_vits16",
        teachers=(SIGLIP2, DINOV2_L),
        train=DatasetConfig(
            name="pd12m",
            source=SourceConfig(kind="webdataset", path="data/pd12m/train/*.tar"),
            licence="CC0-1.0",
            num_views=1,  # twelve million pictures are seen some twenty times as it is
        ),
        held_out=DatasetConfig(
            name="pd12m-held-out",
            source=SourceConfig(kind="webdataset", path="data/pd12m/held-out/*.tar"),
            licence="CC0-1.0",
        ),
        label=None,
    )


def _recipe(
    name: str,
    student: str,
    teachers: tuple[TeacherConfig, ...],
    train: DatasetConfig,
    held_out: DatasetConfig,
    label: str | None,
) -> Recipe:
    native = {teacher.name: teacher.resolutions for teacher in teachers}
    first, pyramid = family.PYRAMID[:1], family.PYRAMID
    return Recipe(
        name=name,
        run_directory=f"runs/{name}",
        cache_root="runs/cache",
        pixels="all",
        lanes=family.LANES,
        train=by_name(train),
        held_out=held_out,
        views=AugmentedView(),
        num_views=2,
        held_out_views=family.USUAL_CROP,
        teachers=by_name(*teachers),
        proxy=StudentConfig(
            name=PROXY, encoder=EncoderSpec(architecture="vit_large_patch16_dinov3_qkvb")
        ),
        proxy_codec=family.CODEC,
        student=StudentConfig(name=student.removeprefix("eupe_"), encoder=FAMILY[student]),
        stages=by_name(
            _stage("stage1", native, first, 100_000, 1024, lr=2e-4, head_hidden=1536),
            _stage("stage2", {PROXY: first}, first, 125_000, 2048, lr=2e-4),
            _stage("stage3", {PROXY: pyramid}, pyramid, 50_000, 1024, lr=1e-4, initial="stage2"),
        ),
        extraction=family.NODE_EXTRACTION,
        workers=family.NODE_WORKERS,
        evaluation=EvaluationConfig(label=label, resolution=224),
    )


def _stage(
    name: str,
    teachers: dict[str, tuple[int, ...]],
    students: tuple[int, ...],
    steps: int,
    global_batch: int,
    lr: float,
    head_hidden: int = 3072,
    initial: str | None = None,
) -> StageConfig:
    """Return a stage; batches are a quarter of the paper's, rates those usual for them."""
    return StageConfig.model_validate(
        {
            "name": name,
            "teachers": tuple(teachers),
            "student": "proxy" if name == "stage1" else "student",
            "teacher_resolutions": teachers,
            "student_resolutions": students,
            "steps": steps,
            "global_batch": global_batch,
            "micro_batch": 128,
            "head_hidden": head_hidden,
            "optimizer": OptimizerConfig(lr=lr, weight_decay=1e-4),
            "warmup_steps": 1_000,
            "checkpoint_every": 1_000,
            "evaluate_every": 5_000,
            "initial": initial,
        }
    )
