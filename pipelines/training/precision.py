"""In which precision a network learns: autocast's, and that of what stays float32 on CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipelines.recipe.stage import StageConfig


def autocast(stage: StageConfig, device: torch.device) -> torch.autocast:
    """Return the context of a stage's forward."""
    return torch.autocast(device.type, torch.bfloat16, enabled=stage.precision == "bfloat16")


@contextmanager
def products(device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices on CUDA be TF32's: 11 bits, and a multiple of the speed.

    Convolutions there are TF32's by torch's own default. Within this context are a network's
    forward and backward only: targets are decoded, losses summed and neighbours ranked in the
    whole float32. It is one switch of the process, so it is put back.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
