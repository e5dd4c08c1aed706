"""Batch normalisation: a student that has it takes whole batches, on one worker."""

import math

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from eupe.errors import BadInput
from pipelines.recipe.stage import StageConfig


def check(network: nn.Module, stage: StageConfig, world_size: int) -> None:
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
