"""Interchange: names of released files (EUPE, DINOv2, DINOv3, CLIP) to and from timm's."""

import re
import sys
from collections.abc import Mapping

import torch
from timm.models import convnext, eva
from torch import Tensor, nn

from eupe.errors import BadInput

MARKS = frozenset(
    {
        "storage_tokens",  # EUPE and DINOv3 transformers
        "downsample_layers.0.0.weight",  # EUPE and DINOv3 ConvNeXt
        "transformer.resblocks.0.ln_1.weight",  # Perception Encoder
        "visual.transformer.resblocks.0.ln_1.weight",  # the same and CLIP, text beside
        "mask_token",  # DINOv2
        "embeddings.register_tokens",  # DINOv3 transformers, by Hugging Face
        "stages.0.downsample_layers.0.weight",  # DINOv3 ConvNeXt, by Hugging Face
        "model.stages.0.downsample_layers.0.weight",
    }
)
"""Tensors by which released files are known whose names are not timm's."""

_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2's training wraps blocks by the dozen
_TRANSFORMERS = (
    (r"^(model\.)?layer\.(\d+)\.", r"blocks.\2."),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.register_tokens$", "storage_tokens"),
    (r"^embeddings\.", ""),
    (r"\.attention\.o_proj\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"^(model\.)?stages\.(\d+)\.downsample_layers\.", r"downsample_layers.\2."),
    (r"^(model\.)?stages\.(\d+)\.layers\.(\d+)\.", r"stages.\2.\3."),
    (r"\bdepthwise_conv\.", "dwconv."),
    (r"\bpointwise_conv", "pwconv"),
    (r"\blayer_norm\.", "norm."),
)
"""Hugging Face's names of DINOv3's tensors and the released files' own."""


def to_timm(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of a released file to timm's names, with timm's own filter.

    The forward passes then agree bit for bit. The mask token, the projectors and the rotary
    periods, which timm computes, are left out.

    Args:
        state: tensors of the released file.
        network: the timm network (the meta device will do) that is to take them.

    Returns:
        the tensors; under the names they had where timm has no filter for that network.

    Raises:
        BadInput: another patch size or number of positions (timm would resample them unasked),
            biases that the network has no place for, or tensors that timm's filter does not take.
    """
    rename = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return dict(state)
    state = _from_transformers(state)
    _refuse_resampling(state, network)
    if isinstance(network, eva.Eva):
        state = _with_biases_as_in(network, state)
    elif hasattr(network, "blocks"):
        state = {_CHUNK.sub(r"blocks.\1.", name): value for name, value in state.items()}
    try:
        return dict(rename(dict(state), network))
    except (KeyError, RuntimeError, AttributeError, TypeError) as error:
        raise BadInput(f"timm's own filter does not take these tensors: {error!r}") from error


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of Hugging Face's DINOv3 to the released names; leave all others."""
    marks = ("embeddings.register_tokens", "stages.0.downsample_layers.0.weight")
    if not any(name.removeprefix("model.") in marks for name in state):
        return dict(state)
    mlp = {"up_proj": "fc1", "down_proj": "fc2"}
    if any(name.endswith(".mlp.gate_proj.weight") for name in state):
        mlp = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
    named = dict[str, Tensor]()
    rules = [*_TRANSFORMERS, *((rf"\.mlp\.{a}\.", f".mlp.{b}.") for a, b in mlp.items())]
    for name, tensor in state.items():
        renamed = name
        for theirs, released in rules:
            renamed = re.sub(theirs, released, renamed)
        named[renamed] = tensor
    for name in [name for name in named if ".attention.q_proj." in name]:
        query, value = named[name], named.get(name.replace("q_proj", "v_proj"))
        key = named.get(name.replace("q_proj", "k_proj"))
        if value is None or (key is None and name.endswith("weight")):
            continue  # said to be left over
        # Keys have no bias: it would change no attention.
        parts = [query, torch.zeros_like(query) if key is None else key, value]
        named[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
        for part in ("q_proj", "k_proj", "v_proj"):
            named.pop(name.replace("q_proj", part), None)
    return named


def _refuse_resampling(state: Mapping[str, Tensor], network: nn.Module) -> None:
    """Refuse patches or positions of another number, which timm's filters interpolate."""
    patches = getattr(getattr(network, "patch_embed", None), "proj", None)
    for name in ("patch_embed.proj.weight", "conv1.weight", "visual.conv1.weight"):
        theirs = state.get(name)
        if patches is None or theirs is None or theirs.ndim != 4:
            continue
        if theirs.shape[-2:] != patches.weight.shape[-2:]:
            raise BadInput(
                f"the checkpoint has patches of {tuple(theirs.shape[-2:])} pixels, "
                f"the network {tuple(patches.weight.shape[-2:])}"
            )
    ours = getattr(network, "pos_embed", None)
    for name in ("pos_embed", "positional_embedding", "visual.positional_embedding"):
        theirs = state.get(name)
        if ours is None or theirs is None:
            continue
        # DINOv2 with registers has a position for its class token, which timm adds to that.
        if theirs.shape[-2] not in (ours.shape[1], ours.shape[1] + 1):
            raise BadInput(
                f"the checkpoint has {theirs.shape[-2]} positions, the network {ours.shape[1]}: "
                "give it the img_size, among model_arguments, that the weights were trained at"
            )


def _with_biases_as_in(network: eva.Eva, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out query biases where the network has none and they are zero.

    Raises:
        BadInput: they are not zero, or the network knows no such biases.
    """
    if "storage_tokens" not in state:
        return dict(state)
    if not hasattr(network.blocks[0].attn, "q_bias"):
        raise BadInput("the network is built without query biases, take timm's *_qkvb variant")
    if network.blocks[0].attn.q_bias is not None:
        return dict(state)
    biases = [value for name, value in state.items() if name.endswith("attn.qkv.bias")]
    if any(bool(bias.chunk(3)[part].any()) for bias in biases for part in (0, 2)):
        raise BadInput("the network has no query bias and the checkpoint's are not zero")
    return {name: v for name, v in state.items() if not name.endswith("attn.qkv.bias")}


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
