"""One stage of distillation as a recipe says it: its loss, its optimizer and everything else."""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from eupe.errors import BadInput
from eupe.spec import Spec
from pipelines.recipe.marks import EXECUTION, IDENTITY

StageName = Literal["stage1", "stage2", "stage3"]


class LossConfig(Spec):
    """Eq. 4-7 of EUPE (arXiv:2603.22387)."""

    alpha: Annotated[float, IDENTITY] = Field(
        0.9, ge=0, description="weight of the patches' cosine loss (paper)"
    )
    beta: Annotated[float, IDENTITY] = Field(
        0.1, ge=0, description="weight of the patches' smooth L1 (paper)"
    )
    smooth_l1_beta: Annotated[float, IDENTITY] = Field(
        1.0, gt=0, description="where smooth L1 turns from square to linear; not in the paper"
    )
    gamma: Annotated[dict[str, float], IDENTITY] = Field(
        {}, description="teacher -> factor of its patch term (Eq. 7)"
    )


MOST_VIEWS = 10_000
"""A view's folder has four digits."""
MOST_STEPS = 100_000_000
"""Draws are planned as arrays of all steps; a hundred times those of any published training."""
SQRT_BATCH = 1024
"""Batch at which `lr_scaling: sqrt` leaves a rate as it is (DINOv2, arXiv:2304.07193)."""
LINEAR_BATCH = 256
"""Batch at which `lr_scaling: linear` does (Goyal et al., arXiv:1706.02677)."""


class OptimizerConfig(Spec):
    """AdamW. The paper states a base learning rate and weight decay only."""

    lr: Annotated[float, IDENTITY] = Field(
        2e-5,
        gt=0,
        description="base learning rate: scaled, it is what the warm-up ends at and a cosine "
        "begins at, which ends at 0",
    )
    lr_scaling: Annotated[Literal["none", "sqrt", "linear"], IDENTITY] = Field(
        "none",
        description="what lr is multiplied by: 1; sqrt: the root of global_batch / 1024 (DINOv2's "
        "rule); linear: global_batch / 256 (that of supervised training)",
    )
    weight_decay: Annotated[float, IDENTITY] = Field(
        1e-4, ge=0, description="of matrices and convolution kernels"
    )
    betas: Annotated[tuple[float, float], IDENTITY] = Field(
        (0.9, 0.999), description="decay of the gradient's first and second moment"
    )
    clip_norm: Annotated[float | None, IDENTITY] = Field(
        1.0, gt=0, description="longest gradient; null: no clipping"
    )


class StageConfig(Spec):
    """One stage of distillation: who learns from whom, at which scales, for how long."""

    name: Annotated[StageName, IDENTITY] = Field(description="of its folder; draws are made by it")
    teachers: Annotated[tuple[str, ...], IDENTITY] = Field(
        min_length=1, description="names of teachers of the recipe, or [proxy]"
    )
    student: Annotated[Literal["student", "proxy"], IDENTITY] = Field(
        "student", description="which network of the recipe is trained"
    )
    teacher_resolutions: Annotated[dict[str, tuple[int, ...]], IDENTITY] = Field(
        description="teacher -> resolutions drawn from, pixels; one entry means fixed"
    )
    student_resolutions: Annotated[tuple[int, ...], IDENTITY] = Field(
        min_length=1, description="resolutions of the student's input drawn from, pixels"
    )
    steps: Annotated[int, IDENTITY] = Field(ge=1, le=MOST_STEPS, description="of the optimizer")
    global_batch: Annotated[int, IDENTITY] = Field(
        ge=1, description="views a step, of all workers together"
    )
    micro_batch: Annotated[int, EXECUTION] = Field(
        ge=1,
        description="views that go through the student at once, at its smallest scale; losses are "
        "equal up to rounding, since drop path is drawn by row and a student with batch "
        "normalisation takes whole batches alone",
    )
    head_hidden: Annotated[int, IDENTITY] = Field(
        3072, ge=1, description="width inside the adapter heads"
    )
    normaliser: Annotated[Literal["zscore", "phi-s"], IDENTITY] = Field(
        "zscore", description="of the teachers' tokens"
    )
    loss: LossConfig = Field(LossConfig(), description="weights of its terms")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW")
    warmup_steps: Annotated[int, IDENTITY] = Field(
        0,
        ge=0,
        description="of the steps, in which the learning rate rises to lr; if fewer steps are "
        "asked for than these alone, they keep their share",
    )
    precision: Annotated[Literal["float32", "bfloat16"], IDENTITY] = Field(
        "bfloat16", description="of autocast; weights and losses stay float32"
    )
    compile: Annotated[bool | None, EXECUTION] = Field(
        None,
        description="the student and the loss by torch.compile, which wants a C compiler; null: on "
        "CUDA, in stages of at least 1,000 steps",
    )
    activation_checkpointing: Annotated[bool, EXECUTION] = Field(
        False, description="compute activations again on the way back: less memory, more time"
    )
    strategy: Annotated[Literal["ddp", "fsdp2"], EXECUTION] = Field(
        "ddp", description="with several workers: copies of the model, or shards of it"
    )
    on_missing: Annotated[Literal["refuse", "wait", "live"], EXECUTION] = Field(
        "refuse",
        description="when shards that it draws are not built yet; wait: begins once those of its "
        "first steps are there, and waits for the others, while `eupe cache build` runs elsewhere; "
        "live: its teachers compute what is missing, in the loop, as a build would",
    )
    patience_seconds: Annotated[float, EXECUTION] = Field(
        1800.0,
        gt=0,
        description="on_missing wait: it gives up after so long without a commit to any store of "
        "the recipe",
    )
    log_every: Annotated[int, EXECUTION] = Field(
        10, ge=1, description="steps between two lines of metrics.jsonl"
    )
    evaluate_every: Annotated[int | None, EXECUTION] = Field(
        None,
        ge=1,
        description="held-out figures every so many steps; such a step is saved too; null: none",
    )
    checkpoint_every: Annotated[int, EXECUTION] = Field(
        100, ge=1, description="steps between two checkpoints; the last step always has one"
    )
    keep_checkpoints: Annotated[int, EXECUTION] = Field(
        2, ge=1, description="newest ones; older ones are removed"
    )
    initial: Annotated[StageName | None, IDENTITY] = Field(
        None, description="start from that stage's checkpoint; null: from the network's weights"
    )

    @model_validator(mode="after")
    def _complete(self) -> "StageConfig":
        if set(self.teachers) != set(self.teacher_resolutions):
            raise BadInput(
                f"teacher_resolutions names {sorted(self.teacher_resolutions)}, teachers "
                f"{self.teachers}: "
                "every teacher needs its resolutions"
            )
        if self.warmup_steps > self.steps:
            raise BadInput(
                f"warmup_steps = {self.warmup_steps}, steps = {self.steps}: the warm-up is a part "
                "of the steps"
            )
        if unknown := set(self.loss.gamma) - set(self.teachers):
            raise BadInput(
                f"loss.gamma names {sorted(unknown)}; the stage's teachers are {self.teachers}"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up: the base one, scaled by the batch."""
        scales = {
            "none": 1.0,
            "sqrt": math.sqrt(self.global_batch / SQRT_BATCH),
            "linear": self.global_batch / LINEAR_BATCH,
        }
        return self.optimizer.lr * scales[self.optimizer.lr_scaling]
