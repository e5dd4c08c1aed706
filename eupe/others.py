"""Networks that are neither timm's nor open_clip's: one's own by import path, and transformers'.

What `eupe.encoders.Encoder` asks of either is the same: the side it was made for, the step of the
sides it takes, and its tokens.
"""

import importlib.util
import inspect
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn

from eupe import by_path
from eupe.errors import BadInput
from eupe.spec import EncoderSpec

CONTRACT = (
    "wants a torch.nn.Module whose forward takes pixels [B, 3, R, R] and returns (summary [B, D], "
    "patches [B, H, W, D2]), with attributes resolution (the side it was made for) and step (a "
    "side is any multiple of it; 0: that side alone)"
)


class Tokens(NamedTuple):
    """What a network gives: summary [B, D] and patches [B, H, W, D2]."""

    summary: Tensor
    patches: Tensor


class Other(ABC):
    """A network as an encoder reads it.

    Attributes:
        resolution: side of the square input that it was made for, pixels.
        step: a side is any multiple of this, pixels; 0: `resolution` alone.
    """

    resolution: int
    step: int

    @abstractmethod
    def run(self, x: Tensor, deep: bool) -> Any:
        """Run the network on normalised pixels [B, 3, R, R]; deep: a layer will be asked for."""

    @abstractmethod
    def read(self, output: Any, x: Tensor) -> Tokens:
        """Take the spec's tokens from what `run` gave of those pixels.

        Raises:
            BadInput: they are not what the spec names, or of other shapes.
        """


def build(spec: EncoderSpec) -> nn.Module:
    """Build the network of a spec whose library is `python` or `transformers`.

    Raises:
        BadInput: there is none, or it does not keep the contract.
    """
    if spec.library == "transformers":
        return _hugging_face(spec)
    network = by_path.build(spec.architecture, spec.model_arguments)
    sides = [getattr(network, name, None) for name in ("resolution", "step")]
    if not isinstance(network, nn.Module) or not all(type(side) is int for side in sides):
        raise BadInput(f"{spec.architecture} gives a {type(network).__name__}: {CONTRACT}")
    return network


def renamed(found: dict[str, Tensor], spec: EncoderSpec) -> dict[str, Tensor]:
    """Return tensors of a file under the names of a network of transformers, by its own rules.

    Files keep the names of the release that wrote them. What does not fit is returned as it is:
    whoever fits it says what is missing.
    """
    network: Any = _hugging_face(spec)
    wanted = network.state_dict()
    if set(wanted) <= set(found):
        return found
    try:
        made, said = type(network).from_pretrained(
            None, config=network.config, state_dict=found, output_loading_info=True
        )
    except (RuntimeError, ValueError, OSError):  # of other shapes, or of another network
        return found
    if said["missing_keys"] or said["mismatched_keys"]:
        return found
    state: dict[str, Tensor] = made.state_dict()
    return state


def of(network: nn.Module, spec: EncoderSpec) -> Other | None:
    """Return a network as an encoder reads it; None for those of timm, open_clip and pixels."""
    if spec.library == "python":
        return _Own(network, spec)
    return _Transformer(network, spec) if spec.library == "transformers" else None


class _Own(Other):
    """A network of one's own, which keeps the contract."""

    def __init__(self, network: Any, spec: EncoderSpec) -> None:
        self._network, self._spec = network, spec
        self.resolution: int = network.resolution
        self.step: int = network.step
        if spec.layer is not None:
            raise BadInput(
                f"{spec.architecture}: layer {spec.layer}; a network of your own returns the "
                "patches that are meant, by one of its model_arguments if there are several"
            )

    def run(self, x: Tensor, deep: bool) -> Any:
        return self._network(x)

    def read(self, output: Any, x: Tensor) -> Tokens:
        try:
            summary, patches = output
            kept = (
                summary.ndim == 2 and patches.ndim == 4 and len(summary) == len(patches) == len(x)
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise BadInput(f"{self._spec.architecture}: {error}; {CONTRACT}") from error
        if not kept:
            raise BadInput(
                f"{self._spec.architecture} gives {list(summary.shape)} and "
                f"{list(patches.shape)} of {list(x.shape)}: {CONTRACT}"
            )
        if self._spec.summary == "mean_patches":
            return Tokens(patches.flatten(1, 2).mean(1), patches)
        return Tokens(summary, patches)


class _Transformer(Other):
    """A vision model of transformers: a plain vision transformer, or a CNN that gives a map."""

    def __init__(self, network: Any, spec: EncoderSpec) -> None:
        self._network, self._spec = network, spec
        config = network.config
        patch = getattr(config, "patch_size", 0)
        self._takes_any = (
            "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        )
        self._patch = int(patch) if isinstance(patch, int) and not hasattr(config, "depths") else 0
        side = getattr(config, "image_size", 224)
        self.resolution = int(side if isinstance(side, int) else side[0])
        free = self._takes_any or config.model_type.startswith("dinov")
        self.step = (self._patch if free else 0) if self._patch else 32
        if spec.layer is not None and not self._patch:
            raise BadInput(f"{spec.architecture}: of transformers' CNNs the last map is taken only")
        kinds = {"class_token", "attention_pool", "mean_patches"}
        if not self._patch:
            kinds = {"average_pool", "mean_patches"}
        if spec.summary not in kinds:
            raise BadInput(f"{spec.architecture} has no {spec.summary}; it has {sorted(kinds)}")

    def run(self, x: Tensor, deep: bool) -> Any:
        settings: dict[str, Any] = {"output_hidden_states": deep}
        if self._takes_any:
            settings["interpolate_pos_encoding"] = x.shape[-1] != self.resolution
        return self._network(pixel_values=x, **settings)

    def read(self, output: Any, x: Tensor) -> Tokens:
        last = self._grid(output.last_hidden_state, x)
        patches = last
        if self._spec.layer is not None:
            blocks = output.hidden_states[1:]
            if not 0 <= self._spec.layer < len(blocks):
                raise BadInput(
                    f"{self._spec.architecture} has no block {self._spec.layer}: 0 to "
                    f"{len(blocks) - 1}"
                )
            patches = self._grid(blocks[self._spec.layer], x)
        kind = self._spec.summary
        if kind == "mean_patches":
            return Tokens(last.flatten(1, 2).mean(1), patches)
        if kind == "class_token":
            if output.last_hidden_state.shape[1] == last.shape[1] * last.shape[2]:
                raise BadInput(f"{self._spec.architecture} has no class_token before its patches")
            return Tokens(output.last_hidden_state[:, 0], patches)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise BadInput(f"{self._spec.architecture} has no {kind}: it pools nothing")
        return Tokens(pooled.flatten(1), patches)

    def _grid(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Return tokens [B, P + N, D], or a map [B, D, H, W], as [B, H, W, D]."""
        if tokens.ndim == 4:
            return tokens.permute(0, 2, 3, 1)
        side = x.shape[-1] // (self._patch or 1)
        if not self._patch or tokens.shape[1] < side * side:
            raise BadInput(
                f"{self._spec.architecture}: its last tokens do not lie on the grid of its "
                "patches; wants a plain vision transformer or a CNN"
            )
        grid: Tensor = tokens[:, -side * side :].unflatten(1, (side, side))
        return grid


def _hugging_face(spec: EncoderSpec) -> nn.Module:
    if importlib.util.find_spec("transformers") is None:
        raise BadInput(
            f"{spec.architecture} of transformers wants pip install 'eupe[transformers]'"
        )
    from transformers import AutoConfig, AutoModel

    try:
        known = AutoConfig.for_model(spec.architecture)  # it keeps any other name, and uses none
        if unknown := [name for name in spec.model_arguments if not hasattr(known, name)]:
            raise ValueError(f"its configuration has no {unknown}")
        config = AutoConfig.for_model(spec.architecture, **spec.model_arguments)
        build: Any = AutoModel.from_config  # not annotated
        network: nn.Module = build(config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise BadInput(
            f"transformers has no vision model {spec.architecture!r} with "
            f"{dict(spec.model_arguments)}: {str(error).splitlines()[0][:200]}"
        ) from error
    if getattr(network, "main_input_name", "") != "pixel_values":
        raise BadInput(f"transformers' {spec.architecture} reads no pictures alone")
    return network
