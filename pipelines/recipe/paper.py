"""What the paper states of a recipe and what is assumed: the marks of `eupe recipes show`."""

from collections.abc import Mapping
from typing import NamedTuple

from eupe.students import FAMILY
from pipelines.recipe.config import Recipe
from pipelines.recipe.marks import EXECUTION, Leaf, leaves

STATED: dict[str, object] = {
    "homogeneous.imagenet1k": 0.1,
    "teachers.pe_core_g.resolutions": [448],
    "teachers.pe_core_g.encoder.architecture": "vit_pe_core_gigantic_patch14_448",
    "teachers.pe_lang_g.resolutions": [448],
    "teachers.pe_lang_g.encoder.architecture": "vit_pe_lang_gigantic_patch14_448",
    "teachers.dinov3_hplus.resolutions": [256],
    "teachers.dinov3_hplus.encoder.architecture": "vit_huge_plus_patch16_dinov3",
    "teachers.dinov3_hplus.encoder.summary": "class_token",
    "proxy.encoder.model_arguments.embed_dim": 1536,
    "proxy.encoder.model_arguments.depth": 50,
    "proxy.encoder.model_arguments.num_heads": 16,
    "proxy.encoder.model_arguments.mlp_ratio": 8960 / 1536,
    "views.kind": "augmented",
    "student.encoder.pixel_mean": [0.485, 0.456, 0.406],
    "student.encoder.pixel_std": [0.229, 0.224, 0.225],
    "stages.stage1.teachers": ["pe_core_g", "pe_lang_g", "dinov3_hplus"],
    "stages.stage1.student": "proxy",
    "stages.stage2.teachers": ["proxy"],
    "stages.stage2.student": "student",
    "stages.stage3.teachers": ["proxy"],
    "stages.stage3.student": "student",
    "stages.stage3.initial": "stage2",
    "stages.stage1.student_resolutions": [256],
    "stages.stage1.teacher_resolutions.pe_core_g": [448],
    "stages.stage1.teacher_resolutions.pe_lang_g": [448],
    "stages.stage1.teacher_resolutions.dinov3_hplus": [256],
    "stages.stage1.head_hidden": 1536,
    "stages.stage2.student_resolutions": [256],
    "stages.stage2.teacher_resolutions.proxy": [256],
    "stages.stage2.steps": 390_000,
    "stages.stage2.global_batch": 8192,
    "stages.stage2.optimizer.lr": 2e-5,
    "stages.stage2.optimizer.weight_decay": 1e-4,
    "stages.stage2.head_hidden": 3072,
    "stages.stage3.student_resolutions": [256, 384, 512],
    "stages.stage3.teacher_resolutions.proxy": [256, 384, 512],
    "stages.stage3.steps": 100_000,
    "stages.stage3.global_batch": 4096,
    "stages.stage3.optimizer.lr": 1e-5,
    "stages.stage3.head_hidden": 3072,
    **{
        f"stages.{stage}.{field}": value
        for stage in ("stage1", "stage2", "stage3")
        for field, value in (("normaliser", "zscore"), ("loss.alpha", 0.9), ("loss.beta", 0.1))
    },
    "evaluation.bank": ["imagenet1k"],
    "evaluation.k": 10,
    "evaluation.resolution": 224,
}
"""Field -> value as EUPE (arXiv:2603.22387) prints it: the stages, Eq. 5, data and evaluation.

`settings` adds the network of each recipe's student."""


class Setting(NamedTuple):
    """One field of a recipe, what it is for, and where its value comes from."""

    path: str
    value: object
    description: str
    allowed: str
    origin: str


class Published(NamedTuple):
    """A printed figure beside ours: millions of parameters and multiply-adds or FLOPs at 256."""

    parameters_millions: float
    gflops_256: float | None
    counts_multiply_adds: bool


PUBLISHED = {
    "eupe_vitt16": Published(6, 4, False),
    "eupe_vits16": Published(21, 12, False),
    "eupe_vitb16": Published(86, 47, False),
    "eupe_convnext_tiny": Published(29, 5, True),
    "eupe_convnext_small": Published(50, 11, True),
    "eupe_convnext_base": Published(89, 20, True),
    "proxy_vitg": Published(1900, None, False),
}
"""The family table; ConvNeXt's printed GFLOPs match multiply-adds, the ViTs' twice that."""


def settings(recipe: Recipe) -> list[Setting]:
    """List every field of a recipe with its origin.

    Origins: `paper` (stated, and equal), `paper: X` (stated as X, changed here), `execution`
    (never changes what is learnt), `assumed` (ours: the paper does not say).
    """
    stated = dict(STATED)
    # A name may end in _tiny without being a twin's: eupe_convnext_tiny.
    published = FAMILY.get(recipe.name) or FAMILY.get(recipe.name.removesuffix("_tiny"))
    if recipe.student == recipe.proxy:  # the proxy's own recipe trains it as its student
        ours = {k: v for k, v in stated.items() if k.startswith("proxy.")}
        stated |= {k.replace("proxy", "student", 1): v for k, v in ours.items()}
    elif published is not None:
        stated["student.encoder.architecture"] = published.architecture
    return [
        Setting(leaf.path, leaf.value, leaf.description, leaf.allowed, _origin(leaf, stated))
        for leaf in leaves(recipe)
    ]


def _origin(leaf: Leaf, stated: Mapping[str, object]) -> str:
    if leaf.path in stated:
        return "paper" if leaf.value == stated[leaf.path] else f"paper: {stated[leaf.path]}"
    return "execution" if leaf.mark is EXECUTION else "assumed"
