"""Networks: an encoder's spec to the network that a library builds, with fresh weights."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eupe import others
from eupe.errors import BadInput
from eupe.pixels import RGB, Pixels
from eupe.spec import EncoderSpec

# The timm families whose positions follow the input's size when asked (dynamic_img_size).
_RESIZABLE_MODULES = ("timm.models.eva", "timm.models.vision_transformer")

_FILLING = {
    *(Tensor.uniform_, Tensor.normal_, Tensor.erfinv_, Tensor.clamp_),
    *(Tensor.mul_, Tensor.add_, Tensor.fill_, Tensor.zero_),
}
"""Functions that give values to a tensor that exists."""


class _Unfilled(TorchFunctionMode):
    """Leaves tensors as they are made: initialising one on the meta device only takes time."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _FILLING or getattr(function, "__module__", "") == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Let networks that are built inside have names and shapes and no values: no memory, no time.

    Of the time that a build takes on the meta device, three quarters went into drawing weights.
    """
    with torch.device("meta"), _Unfilled():
        yield


def build_network(spec: EncoderSpec, *, classifier: bool = False) -> nn.Module:
    """Build the network of a spec with fresh weights, drawn from the global random state.

    Args:
        spec: the encoder.
        classifier: keep the classifier that the released file of a timm architecture has, which
            an encoder drops; for matching names of a file.

    Raises:
        BadInput: an unknown architecture, or model arguments it does not take.
    """
    if spec.architecture.startswith(("hf-hub:", "hf_hub:")):
        raise BadInput(
            f"architecture {spec.architecture!r}: wants the name of what is built, and "
            f"weights: hf-hub:{spec.architecture.partition(':')[2]}"
        )
    if spec.library == "timm":
        arguments = dict(spec.model_arguments)
        if classifier:
            arguments.pop("num_classes", None)
        elif spec.summary != "attention_pool":
            arguments.setdefault("num_classes", 0)
        return _timm_network(spec.architecture, arguments)
    if spec.library == "pixels":
        if spec.architecture != RGB.architecture:
            raise BadInput(_unknown("pixels", spec.architecture, [RGB.architecture]))
        if spec.model_arguments:
            raise BadInput(f"model_arguments = {dict(spec.model_arguments)}: pixels take none")
        return Pixels()
    if spec.library == "open_clip":
        return _open_clip_tower(spec.architecture, spec.model_arguments)
    return others.build(spec)


def _timm_network(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(architecture):
        raise BadInput(_unknown("timm", architecture, timm.list_models()))
    if timm.model_entrypoint(architecture).__module__ in _RESIZABLE_MODULES:
        arguments = {"dynamic_img_size": True, **arguments}
    try:
        network: nn.Module = timm.create_model(architecture, pretrained=False, **arguments)
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise BadInput(f"timm's {architecture} refuses {dict(arguments)}: {error}") from error
    return network


def _open_clip_tower(architecture: str, arguments: Mapping[str, Any]) -> nn.Module:
    import open_clip  # brings torchvision, transformers and torch's compiler: seconds a process

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise BadInput(_unknown("open_clip", architecture, open_clip.list_models()))
    vision, width = dict(config["vision_cfg"]), config["embed_dim"]
    bare = vision.get("timm_proj") in (None, "none") and "timm_model_name" in vision
    if not bare:
        try:
            return _tower(width, {**vision, **arguments}, config)
        except TypeError as error:
            raise BadInput(
                f"open_clip's {architecture} refuses {dict(arguments)}: {error}"
            ) from error
    # open_clip hands a timm trunk no arguments of ours: its shell is built empty around our trunk.
    with shapes_alone():
        shell = _tower(width, vision, config)
    num_classes = 0 if vision["timm_proj"] == "none" else width
    chosen = {"num_classes": num_classes, "global_pool": vision.get("timm_pool", "avg")}
    shell.trunk = _timm_network(vision["timm_model_name"], {**chosen, **arguments})
    return shell


def _tower(width: int, vision: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    from open_clip.model import _build_vision_tower  # no public way builds one without its text

    tower: nn.Module = _build_vision_tower(width, dict(vision), config.get("quick_gelu", False))
    return tower


def _unknown(library: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{library} has no architecture {name!r}{hint}"
