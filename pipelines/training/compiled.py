"""torch.compile where it pays: the student's blocks, its heads and the loss, each by itself.

A block is compiled once for all that are like it, whatever encloses it: FSDP2 gathers outside of
it, checkpoints see no other names, and a first step takes seconds where the student in one piece
takes more than a minute. Losses are equal up to rounding; what a compiler refuses is raised.
"""

import sys

import torch
from torch import Tensor, nn

from eupe import losses
from eupe.encoders import Features
from eupe.errors import BadInput
from eupe.heads import DistillationModel
from pipelines.features.fused import COMPILERS, has_compiler
from pipelines.recipe.stage import StageConfig

BACKEND = "inductor"
WORTH_STEPS = 1000
"""Steps from which compiling, which takes about as long as a few hundred, is worth it."""


GRAPHS = 64
"""Of one function at most, for shapes and widths: four teachers at three grids are a dozen."""


def pays(stage: StageConfig, device: torch.device) -> bool:
    """Return True if a stage is compiled: as it says, or on CUDA if it is not short.

    Raises:
        BadInput: it says so, and there is no C compiler.
    """
    wanted = stage.compile
    if wanted is None:
        wanted = device.type == "cuda" and stage.steps >= WORTH_STEPS
    if not wanted or has_compiler():
        return wanted
    lacks = f"{stage.name}: torch.compile wants a C compiler, and there is none of {COMPILERS}"
    if stage.compile:
        raise BadInput(f"{lacks}: install one, name it in CC, or set compile=false")
    print(f"{lacks}: computed without, at half the speed", file=sys.stderr)
    return False


def compile_regions(model: DistillationModel) -> None:
    """Compile a model's blocks and heads where they stand; those without blocks, as a whole."""
    torch._dynamo.config.recompile_limit = GRAPHS
    regions = blocks(model.encoder) or [model.encoder]
    for region in (*regions, *model.heads.values()):
        # Not the module: what is hooked on it, FSDP2's gathering say, is no part of the graph.
        region.forward = torch.compile(region.forward, backend=BACKEND)


def row_losses() -> losses.RowLosses:
    """Return `eupe.losses.row_losses`, compiled; widths are fixed, one graph for each of them."""
    fused = torch.compile(losses.row_losses, backend=BACKEND)

    def compiled(
        prediction: Features, target: Features, valid: Tensor, smooth_l1_beta: float
    ) -> Tensor:
        for tokens in (*prediction, *target):  # batches and grids may change, widths do not
            torch._dynamo.mark_static(tokens, tokens.ndim - 1)
        return fused(prediction, target, valid, smooth_l1_beta)

    return compiled


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer or of each stage of a CNN, as timm names them."""
    lists = [getattr(module, "blocks", ()) for module in model.modules()]
    return [block for blocks in lists for block in blocks]
