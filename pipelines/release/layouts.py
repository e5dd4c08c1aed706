"""An exported student's files as others read them: timm's folder, the released names, its heads.

    model.safetensors         the network under timm's names
    config.json               timm's: timm.create_model("local-dir:<folder>", pretrained=True)
    released.safetensors      the same tensors under the names of the released EUPE files
    heads.safetensors         adapter heads, named <teacher>.<summary|patches>...
    normalisers.safetensors   what the teachers' tokens went through before the loss

Whatever is written is read again and compared bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eupe import interchange
from eupe.encoders import Encoder
from eupe.errors import BadInput
from eupe.networks import build_network
from pipelines.records.checkpoint import HEADS, NORMALISERS, Checkpoint
from pipelines.release.models import WEIGHTS, Model

CONFIG, RELEASED = "config.json", "released.safetensors"
POOLS = {
    "class_token": "token",
    "attention_pool": "map",
    "average_pool": "avg",
    "mean_patches": "avg",
}
"""Kind of summary -> timm's name of the pooling that gives it."""


def write_timm(folder: Path, encoder: Encoder, model: Model, licence: str) -> None:
    """Write a student's network and its config as timm keeps them.

    Args:
        folder: to write into.
        encoder: the student.
        model: how pictures go in.
        licence: what timm's record shall say of it.

    Raises:
        BadInput: a network that is not timm's.
    """
    if model.encoder.library != "timm":
        raise BadInput(f"{model.encoder.architecture} is {model.encoder.library}'s, not timm's")
    side = model.resolution
    record = {  # in the place of what timm says of its own weights of this architecture
        "license": licence,
        "tag": "",
        "description": "",
        "origin_url": "",
        "paper_name": "Efficient Universal Perception Encoder",
        "paper_ids": "arXiv:2603.22387",
        "notes": (),
    }
    timm.models.save_for_hf(
        _pooling(encoder),
        str(folder),
        model_config={"pretrained_cfg": record},
        safe_serialization=True,
        data_config={
            "input_size": (3, side, side),
            "mean": model.encoder.pixel_mean,
            "std": model.encoder.pixel_std,
            "interpolation": "bicubic",
            "crop_pct": model.views.share,
            "crop_mode": "center",
        },
    )


def _pooling(encoder: Encoder) -> nn.Module:
    """Return timm's network with the pooling that gives the student's summary, if it has it so.

    timm pools a DINOv3 by the mean of its patches, whose class token is what is trained here.
    """
    spec = encoder.spec
    arguments = {**spec.model_arguments, "global_pool": POOLS[spec.summary]}
    state = encoder.network.state_dict()
    try:
        network = build_network(spec.model_copy(update={"model_arguments": arguments}))
        network.load_state_dict(state)
    except (BadInput, RuntimeError):  # of other tensors, or of none: as timm has it then
        return encoder.network
    return network.eval()


def check_timm(folder: Path, encoder: Encoder, pixels: Tensor) -> bool:
    """Compare what timm makes of a folder with the student: tensors and tokens, bit for bit.

    Returns:
        True if its forward pass gives the student's summary, bit for bit too.

    Args:
        folder: that `write_timm` wrote.
        encoder: the student.
        pixels: pictures, float32 [B, 3, R, R], 0 to 255.

    Raises:
        RuntimeError: they differ.
    """
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    _same(f"{folder / WEIGHTS} through timm", network.state_dict(), encoder.network.state_dict())
    x = pixels * encoder.pixel_scale + encoder.pixel_offset
    student: Any = encoder.network
    with torch.inference_mode():
        ours, theirs = student.forward_features(x), network.forward_features(x)
        summary, pooled = encoder(pixels).summary, network(x)
    _same(f"tokens of {folder} through timm", {"tokens": theirs}, {"tokens": ours})
    return summary.shape == pooled.shape and torch.equal(summary, pooled)


def write_released(folder: Path, encoder: Encoder) -> None:
    """Write a student under the names of the released files, and read it again through them.

    Raises:
        BadInput: an architecture of which nothing is released.
        RuntimeError: what is read again is not the student.
    """
    network = encoder.network
    path = folder / RELEASED
    save_file(_owned(interchange.to_released(network)), path)
    again = interchange.to_timm(load_file(path), network)
    _same(str(path), again, network.state_dict())


def write_heads(folder: Path, saved: Checkpoint) -> None:
    """Write the adapter heads and the normalisers of a checkpoint, and read them again.

    Raises:
        BadInput: the checkpoint is damaged.
        RuntimeError: what is read again is something else.
    """
    for name, tensors in ((HEADS, saved.heads()), (NORMALISERS, saved.normalisers())):
        save_file(tensors, folder / name)
        _same(str(folder / name), load_file(folder / name), tensors)


def _same(what: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those wanted, bit for bit."""
    if set(found) != set(wanted):
        raise RuntimeError(f"{what}: other names, {sorted(set(found) ^ set(wanted))[:3]}")
    for name, value in wanted.items():
        if found[name].dtype != value.dtype or not torch.equal(found[name], value):
            raise RuntimeError(f"{what}: {name} is not what was written")


def _owned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that may be views of one another, which safetensors refuses."""
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}
