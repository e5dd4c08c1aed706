"""How a stage begins: its model, its optimizer, and the identity that a checkpoint is held to."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from eupe.errors import BadInput
from eupe.heads import DistillationModel
from eupe.students import build_student
from eupe.weights import digest
from pipelines.recipe import marks
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.records import checkpoint, whole_state
from pipelines.records.checkpoint import Checkpoint
from pipelines.training.inputs import Inputs

DRAWS = 2
"""Version of order, mix and view numbers: a run goes on only with the draws it began with."""


def initial_model(
    recipe: Recipe, stage: StageConfig, dims: Mapping[str, tuple[int, int]]
) -> DistillationModel:
    """Build a stage's model as it is before its first step: a pure function of the recipe.

    Encoder and heads start from the stage that `stage.initial` names, else from the student's
    weights, else from timm's initialisation under the run's seed.

    Args:
        recipe: the run.
        stage: one of its stages.
        dims: teacher -> (summary width, patch width).

    Raises:
        BadInput: the initial stage is not trained to its end, or weights do not fit.
    """
    student = recipe.trained_by(stage)
    encoder = build_student(student.encoder, student.weights, recipe.seed)
    model = DistillationModel(encoder, dims, stage.head_hidden, recipe.seed)
    if stage.initial is not None:
        earlier = recipe.stage(stage.initial)
        load(model, checkpoint.finished(recipe.stage_directory(earlier.name), earlier.steps))
    return model


def untrained_model(
    recipe: Recipe, stage: StageConfig, dims: Mapping[str, tuple[int, int]]
) -> DistillationModel:
    """Build a stage's model as it was before any stage trained it; arguments as `initial_model`."""
    return initial_model(recipe, stage.model_copy(update={"initial": None}), dims)


def load(model: DistillationModel, saved: Checkpoint) -> None:
    """Put a checkpoint's encoder and heads into a model.

    Raises:
        BadInput: they are of other shapes or names than the model's.
    """
    try:
        whole_state.load_weights(model.encoder.network, saved.encoder())
        whole_state.load_weights(model.heads, saved.heads())
    except RuntimeError as error:
        raise BadInput(f"{saved.directory} does not fit the model: {error}") from error


def check_batch_statistics(network: nn.Module, stage: StageConfig, world_size: int) -> None:
    """Refuse to cut a batch whose rows the network normalises together (batch normalisation).

    Its figures would then follow `micro_batch` and the number of workers, which are execution.

    Raises:
        BadInput: a global batch does not go through the network at once; the message says what
            would make it.
    """
    layers = (n for n, m in network.named_modules() if isinstance(m, _BatchNorm))
    if (layer := next(layers, None)) is None:
        return
    smallest, largest = min(stage.student_resolutions), max(stage.student_resolutions)
    at_once = math.ceil(stage.global_batch * largest**2 / smallest**2)
    name = f"{stage.name}: the student's layer {layer} normalises by batch"
    if stage.micro_batch < at_once:
        raise BadInput(
            f"{name}: micro_batch = {stage.micro_batch} would change what it learns; it wants "
            f"{at_once}, so that all {stage.global_batch} views of a step go through it at once "
            f"at {largest} px too"
        )
    if world_size > 1:
        raise BadInput(
            f"{name}: with {world_size} workers each would have statistics of its own; it wants "
            "workers.count = 1, or a network with LayerNorm (ConvNeXt, a ViT)"
        )
    if stage.activation_checkpointing:
        raise BadInput(
            f"{name}: activation_checkpointing would count each batch twice; it wants false"
        )


def identity(recipe: Recipe, stage: StageConfig, inputs: Inputs) -> dict[str, object]:
    """Return everything that the losses of a stage depend on, as plain data.

    Of what is computed from it (timm's initialisation, a normaliser) nothing is hashed: another
    machine rounds otherwise, and may go on with the run.

    Args:
        recipe: the run.
        stage: one of its stages.
        inputs: what it trains on.

    Raises:
        BadInput: the initial stage is not trained to its end, or weights cannot be read.
    """
    return {
        "draws": DRAWS,
        "seed": recipe.seed,
        "stage": marks.identity(stage),
        "student": recipe.trained_by(stage).encoder.model_dump(mode="json"),
        "initial_weights": _initial_weights(recipe, stage),
        "train": [[*share] for share in recipe.shares.items()],  # in order: the mix draws by it
        "homogeneous": dict(recipe.homogeneous),
        "views": recipe.views.model_dump(mode="json"),
        "num_views": recipe.num_views,
        "teachers": dict(inputs.identity),
    }


def schedule_start(saved: Checkpoint, identity: Mapping[str, object]) -> int:
    """Return the step at which the schedule of a run begins that goes on from a checkpoint.

    A stage that was trained to its end and is asked for more steps goes on, and its learning rate
    rises and falls once more over those that are new: the cosine had ended at zero.

    Args:
        saved: the newest checkpoint.
        identity: of the run that goes on.

    Raises:
        BadInput: the checkpoint is of another run, named field by field; or of this one at another
            length and not at its end.
    """
    began = int(saved.state().get("schedule_start", 0))
    asked: Any = identity["stage"]
    there: Any = saved.identity.get("stage")
    if not isinstance(there, dict) or asked["steps"] == there.get("steps"):
        saved.check(identity)
        return began
    length = {name: there.get(name) for name in ("steps", "warmup_steps")}
    saved.check({**identity, "stage": {**asked, **length}})
    if not saved.step == there["steps"] < asked["steps"]:
        first = "train those to their end and ask for more then, or " * (
            saved.step < there["steps"]
        )
        raise BadInput(
            f"{saved.directory} is of a run of {there['steps']} steps, {saved.step} of them done, "
            f"and {asked['steps']} are asked for: {first}give another run directory"
        )
    new = asked["steps"] - saved.step
    if asked["warmup_steps"] > new:
        raise BadInput(
            f"warmup_steps = {asked['warmup_steps']}: the schedule begins anew after step "
            f"{saved.step}, and only {new} steps are left"
        )
    return saved.step


def _initial_weights(recipe: Recipe, stage: StageConfig) -> str | None:
    """Return the digest of the weights a stage starts from; None: they are drawn by the seed."""
    if stage.initial is not None:
        earlier = recipe.stage(stage.initial)
        saved = checkpoint.finished(recipe.stage_directory(earlier.name), earlier.steps)
        return saved.weights_digest()
    student = recipe.trained_by(stage)
    return None if student.weights is None else digest(student.weights, student.encoder)


def normaliser_state(inputs: Inputs) -> dict[str, Tensor]:
    """Return the normalisers' buffers, named <teacher>.<summary|patches>.<buffer>."""
    return {
        f"{name}.{kind}.{key}": value
        for name, pair in inputs.normalisers.items()
        for kind, module in zip(pair._fields, pair, strict=True)
        for key, value in module.state_dict().items()
    }


def optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices and convolution kernels only.

    Biases, norms and LayerScale have one dimension; class, register and position tokens three.
    """
    settings = stage.optimizer
    decayed, free = list[nn.Parameter](), list[nn.Parameter]()
    for parameter in model.parameters():
        (decayed if parameter.ndim in (2, 4) else free).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": free, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=settings.betas,
        fused=True,
    )
