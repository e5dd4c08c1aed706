"""How a stage begins: its model, its optimizer, and the identity that a checkpoint is held to."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from eupe.errors import BadInput
from eupe.heads import DistillationModel
from eupe.students import build_student
from eupe.weights import digest, load_state_dict
from pipelines.recipe import addresses, marks
from pipelines.recipe.config import Recipe
from pipelines.recipe.stage import StageConfig
from pipelines.records import checkpoint, whole_state
from pipelines.records.checkpoint import Checkpoint
from pipelines.training.inputs import Inputs


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
    model = drawn_model(recipe, stage, dims)
    load_initial(model, recipe, stage)
    return model


def drawn_model(
    recipe: Recipe, stage: StageConfig, dims: Mapping[str, tuple[int, int]]
) -> DistillationModel:
    """Build a stage's model as the run's seed draws it, weights or none; as `initial_model`."""
    encoder = build_student(recipe.trained_by(stage).encoder, seed=recipe.seed)
    return DistillationModel(encoder, dims, stage.head_hidden, recipe.seed)


def load_initial(model: DistillationModel, recipe: Recipe, stage: StageConfig) -> None:
    """Put into a model what its stage starts from, if that is not what the seed draws.

    Raises:
        BadInput: as `initial_model`.
    """
    student = recipe.trained_by(stage)
    if stage.initial is not None:
        earlier = recipe.stage(stage.initial)
        load(model, checkpoint.finished(recipe.stage_directory(earlier.name), earlier.steps))
    elif student.weights is not None:
        model.encoder.network.load_state_dict(load_state_dict(student.weights, student.encoder))


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
    model.encoder.network.load_state_dict(fitting(saved, saved.encoder, model.encoder.network))
    model.heads.load_state_dict(fitting(saved, saved.heads, model.heads))


def fitting(
    saved: Checkpoint, read: Callable[[], dict[str, Tensor]], module: nn.Module
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint that a module is to take.

    Args:
        saved: the checkpoint.
        read: of it: `encoder` or `heads`.
        module: whole, or this worker's part of it.

    Raises:
        BadInput: they are of other shapes or names than the module's.
    """
    tensors = read()
    if (told := whole_state.misfit(module, tensors)) is not None:
        raise BadInput(f"{saved.directory} does not fit the model: {told}")
    return tensors


def identity(
    recipe: Recipe, stage: StageConfig, inputs: Inputs, initial_weights: str | None
) -> dict[str, object]:
    """Return everything that the losses of a stage depend on, as plain data.

    Of what is computed from it (timm's initialisation, a normaliser) nothing is hashed: another
    machine rounds otherwise, and may go on with the run.

    Args:
        recipe: the run.
        stage: one of its stages.
        inputs: what it trains on.
        initial_weights: as `initial_digest`, which reads all of them.
    """
    return {
        "draws": addresses.DRAWS,
        "seed": recipe.seed,
        "stage": marks.identity(stage),
        "student": recipe.trained_by(stage).encoder.model_dump(mode="json"),
        "initial_weights": initial_weights,
        "train": [[*share] for share in recipe.shares.items()],  # in order: the mix draws by it
        "homogeneous": dict(recipe.homogeneous),
        "views": recipe.views.model_dump(mode="json"),
        "num_views": _num_views(recipe),
        **addresses.lanes(recipe),
        "teachers": dict(inputs.identity),
    }


def _num_views(recipe: Recipe) -> int | dict[str, int]:
    """Return the views of each train set, or how many all of them have."""
    each = {name: recipe.views_of(name) for name in recipe.train}
    return each if set(each.values()) != {recipe.num_views} else recipe.num_views


def begins_anew(saved: Checkpoint, identity: Mapping[str, object]) -> bool:
    """Return True if the schedule of a run that goes on from a checkpoint begins anew there.

    A stage that was trained to its end and is asked for more steps goes on, and its learning rate
    rises and falls once more over those that are new: the cosine had ended at zero.

    Args:
        saved: the newest checkpoint.
        identity: of the run that goes on.

    Raises:
        BadInput: the checkpoint is of another run, named field by field; or of this one at another
            length and not at its end.
    """
    asked: Any = identity["stage"]
    there: Any = saved.identity.get("stage")
    if not isinstance(there, dict) or asked["steps"] == there.get("steps"):
        saved.check(identity)
        return False
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
    return True


def initial_digest(recipe: Recipe, stage: StageConfig) -> str | None:
    """Return the digest of the weights a stage starts from; None: they are drawn by the seed.

    Raises:
        BadInput: the initial stage is not trained to its end, or weights cannot be read.
    """
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
        lr=stage.peak_lr,
        betas=settings.betas,
        fused=True,
    )
