"""Whole states: a model's weights and optimizer state as one process holds them, sharded or not.

What these functions return and take is the same for one process, for copies (DDP) and for shards
(FSDP2), so a checkpoint does not know how many workers wrote it. Weights and optimizer state are
keyed by parameter name. Every worker must call each of them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers on the CPU; on ranks other than 0, nothing."""
    found: dict[str, Any] = get_model_state_dict(module, options=_GATHER)
    return found


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a module; each worker keeps its part of them.

    Raises:
        RuntimeError: names or shapes are not the module's.
    """
    set_model_state_dict(module, dict(tensors), options=_SPREAD)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state on the CPU; on ranks other than 0, nothing."""
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_GATHER)
    return found


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put a whole state into the optimizer; each worker keeps its part of it.

    Moments are laid out in memory as their parameters are: fused AdamW takes that for granted, and
    steps to other weights where a state was saved channels last, or was not.
    """
    set_optimizer_state_dict(model, optimizer, dict(state), options=_SPREAD)
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(parameter, DTensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
