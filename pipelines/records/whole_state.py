"""Whole states: a model's weights and optimizer state as one process holds them, sharded or not.

What these functions return and take is the same for one process, for copies (DDP) and for shards
(FSDP2), so a checkpoint does not know how many workers wrote it. Weights and optimizer state are
keyed by parameter name. Every worker must call each of them: rank 0 alone has whole states, as it
writes them and as it reads them, and the others get theirs from it, tensor by tensor.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
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

MAX_LINES = 3
"""Tensors that a refusal names; the rest it counts."""
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's parameters and buffers on the CPU; on ranks other than 0, nothing."""
    found: dict[str, Any] = get_model_state_dict(module, options=_GATHER)
    return found


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put whole tensors into a module; each worker keeps its part of them.

    Args:
        module: the worker's.
        tensors: on rank 0, of the module's own names and shapes (`misfit`); elsewhere nothing.
    """
    set_model_state_dict(module, dict(tensors), options=_from_rank_0())


def misfit(module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Return how whole tensors differ from a module's in name or shape; None: they do not.

    One worker may ask this alone.
    """
    there: dict[str, Any] = get_model_state_dict(module)
    own = {name: tuple(value.shape) for name, value in there.items()}
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    if own == given:
        return None
    lines = [
        f"{name} is {given.get(name, 'not there')}, wanted {own.get(name, 'not at all')}"
        for name in sorted(own.keys() | given.keys())
        if own.get(name) != given.get(name)
    ]
    more = f"; and {len(lines) - MAX_LINES} more" if len(lines) > MAX_LINES else ""
    return "; ".join(lines[:MAX_LINES]) + more


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state on the CPU; on ranks other than 0, nothing."""
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_GATHER)
    return found


def load_optimizer_state(model: nn.Module, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Put a whole state, which rank 0 has, into the optimizer; each worker keeps its part of it.

    Moments are laid out in memory as their parameters are: fused AdamW takes that for granted, and
    steps to other weights where a state was saved channels last, or was not.
    """
    set_optimizer_state_dict(model, optimizer, _contiguous(state), options=_from_rank_0())
    for parameter, own in optimizer.state.items():
        for name, value in own.items():
            if isinstance(parameter, DTensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                own[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _from_rank_0() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())


def _contiguous(tree: Any) -> Any:
    """Return a state whose tensors are contiguous, as a broadcast takes them."""
    if isinstance(tree, Mapping):
        return {key: _contiguous(value) for key, value in tree.items()}
    return tree.contiguous() if isinstance(tree, Tensor) else tree
