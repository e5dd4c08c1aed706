"""Interchange: names of released files (EUPE, DINOv3, Perception Encoder) to and from timm's."""

import re
from collections.abc import Mapping

import torch
from timm.models import convnext, eva
from torch import Tensor, nn

from eupe.errors import BadInput

_RELEASED_MARKS = (
    "storage_tokens",  # EUPE and DINOv3 transformers
    "downsample_layers.0.0.weight",  # EUPE and DINOv3 ConvNeXt
    "transformer.resblocks.0.ln_1.weight",  # Perception Encoder
    "visual.transformer.resblocks.0.ln_1.weight",
)


def is_released(state: Mapping[str, Tensor]) -> bool:
    """True if tensors carry the names of a released file instead of timm's."""
    return any(mark in state for mark in _RELEASED_MARKS)


def to_timm(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a released file to timm's names, with timm's own filters.

    The forward passes then agree bit for bit. The mask token, the projectors and the rotary
    periods, which timm computes, are left out.

    Args:
        state: tensors of the released file.
        network: the timm network (the meta device will do) that is to take them.

    Raises:
        BadInput: a network that is neither timm's Eva nor its ConvNeXt, another patch size
            (timm would resample it unasked), or biases that the network has no place for.
    """
    if isinstance(network, convnext.ConvNeXt):
        return dict(convnext.checkpoint_filter_fn(dict(state), network))
    if not isinstance(network, eva.Eva):
        raise BadInput(
            f"a released checkpoint goes into timm's Eva or ConvNeXt, not {type(network).__name__}"
        )
    theirs, ours = state.get("patch_embed.proj.weight"), network.patch_embed.proj.weight
    if theirs is not None and theirs.shape[-2:] != ours.shape[-2:]:
        raise BadInput(
            f"the checkpoint has patches of {tuple(theirs.shape[-2:])} pixels, "
            f"the network {tuple(ours.shape[-2:])}"
        )
    if "storage_tokens" in state and not hasattr(network.blocks[0].attn, "q_bias"):
        raise BadInput("the network is built without query biases, take timm's *_qkvb variant")
    if "storage_tokens" in state and network.blocks[0].attn.q_bias is None:
        biases = [value for name, value in state.items() if name.endswith("attn.qkv.bias")]
        if any(bool(bias.chunk(3)[part].any()) for bias in biases for part in (0, 2)):
            raise BadInput("the network has no query bias and the checkpoint's are not zero")
        state = {name: v for name, v in state.items() if not name.endswith("attn.qkv.bias")}
    return dict(eva.checkpoint_filter_fn(dict(state), network))


def to_released(network: nn.Module) -> dict[str, Tensor]:
    """Return a timm network's tensors under the names of the released EUPE files.

    Raises:
        BadInput: a network that is neither timm's Eva (with query biases) nor its ConvNeXt.
    """
    state = network.state_dict()
    if isinstance(network, convnext.ConvNeXt):
        return {_convnext_name(name): value for name, value in state.items()}
    if not isinstance(network, eva.Eva) or network.reg_token is None:
        raise BadInput(
            "the released files hold timm's Eva with registers or ConvNeXt, "
            f"not {type(network).__name__}"
        )
    released = {"rope_embed.periods": network.rope.periods.detach()}
    for name, value in state.items():
        if name.endswith("attn.v_bias"):
            continue  # joins the query bias
        if name.endswith("attn.q_bias"):
            stem = name.removesuffix("q_bias")
            keys = torch.zeros_like(value)
            released[f"{stem}qkv.bias"] = torch.cat([value, keys, state[f"{stem}v_bias"]])
            released[f"{stem}qkv.bias_mask"] = torch.cat([keys + 1, keys, keys + 1])
            continue
        name = name.replace("reg_token", "storage_tokens")
        released[re.sub(r"\bgamma_([12])$", r"ls\1.gamma", name)] = value
    return released


def _convnext_name(name: str) -> str:
    name = re.sub(r"^stem\.", "downsample_layers.0.", name)
    name = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", name)
    name = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", name)
    name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
    return re.sub(r"^head\.norm\.", "norm.", name)
