"""Encoders: a network of timm, open_clip or others, read as pixels -> (summary, patches)."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from eupe import others
from eupe.errors import BadInput
from eupe.networks import build_network, shapes_alone
from eupe.others import Other
from eupe.spec import EncoderSpec


class Features(NamedTuple):
    """The tokens that an encoder gives for a batch of pictures.

    A NamedTuple, so that DDP, FSDP2 and torch.compile see the tensors inside.

    Attributes:
        summary: the global token, [B, D].
        patches: patch tokens on their grid, [B, H, W, D2].
    """

    summary: Float[Tensor, "b d"]
    patches: Float[Tensor, "b h w d2"]


class _Run(NamedTuple):
    """What one forward of a network gave.

    Attributes:
        final: its last tokens or map; of open_clip's own transformer the image embedding; of
            another library's network whatever it returns.
        layers: index of an intermediate -> it, [B, D, H, W].
    """

    final: Any
    layers: dict[int, Tensor]


class Encoder(nn.Module):
    """A network with its preprocessing, giving the tokens that its spec names.

    Summaries: `class_token` is prefix token 0; `average_pool` the network's own pooling up to
    before the classifier (ConvNeXt: average, then LayerNorm); `attention_pool` its attention pool
    through the projection the architecture carries (PEcore: 1280 wide; `num_classes=0` among the
    model arguments leaves it out); `mean_patches` the mean of the final patch tokens. An open_clip
    tower's pooled summary is its image embedding, projection included.

    Patches are the final tokens or map as `forward_features` gives them, or those that leave the
    spec's `layer`, without the network's final norm.

    Deviation: the paper says ConvNeXt has no class token; its pooled summary is ours.

    Args:
        spec: architecture, preprocessing, summary and layer.
        seed: of the initial weights; the global random state is left as it was.

    Raises:
        BadInput: an unknown architecture, model arguments it does not take, or a summary or
            layer it does not have.
    """

    pixel_scale: Tensor
    pixel_offset: Tensor

    def __init__(self, spec: EncoderSpec, seed: int = 0):
        super().__init__()
        self.spec = spec
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # the CPU's: fork_rng puts that one back
            self.network = build_network(spec)
        mean, std = torch.tensor(spec.pixel_mean), torch.tensor(spec.pixel_std)
        self.register_buffer("pixel_scale", (1 / (255 * std)).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_offset", (-mean / std).view(3, 1, 1), persistent=False)
        self._trunk_name = "trunk" if hasattr(self.network, "trunk") else ""
        self._index: int | None = None
        if self._other is None:
            _check_layout(self._trunk, spec)
            self._index = _layer_index(self._trunk, spec)
            _check_summary(self.network, self._trunk, spec)

    @property
    def _other(self) -> Other | None:
        """The network as `eupe.others` reads it; None for one of timm or open_clip."""
        return others.of(self.network, self.spec)

    @property
    def patch_size(self) -> int | None:
        """Side of a patch in pixels; None for a CNN and where only the tokens tell."""
        if self._other is not None:
            return None
        if hasattr(self._trunk, "patch_embed"):
            return int(self._trunk.patch_embed.patch_size[0])
        # open_clip's own transformer keeps it itself; a CNN has none.
        return int(self._trunk.patch_size[0]) if hasattr(self._trunk, "transformer") else None

    @property
    def stride(self) -> int:
        """Pixels from one of its last patches to the next; of other networks their step."""
        if (other := self._other) is not None:
            return other.step or other.resolution
        return self.patch_size or int(self._trunk.feature_info[-1]["reduction"])

    @property
    def native_resolution(self) -> int:
        """Side of the square input that the architecture was made for, pixels."""
        if (other := self._other) is not None:
            return other.resolution
        if hasattr(self._trunk, "transformer"):
            return int(self._trunk.image_size[0])
        return int(self._trunk.pretrained_cfg["input_size"][-1])

    @property
    def summary_dim(self) -> int:
        """Width of the summary."""
        return self._shape(self.native_resolution).summary.shape[1]

    @property
    def patch_dim(self) -> int:
        """Width of a patch token."""
        return self._shape(self.native_resolution).patches.shape[3]

    def grid(self, resolution: int) -> tuple[int, int]:
        """Return the patch grid (rows, columns) of a square input, resolution in pixels.

        Raises:
            BadInput: the network does not take that resolution.
        """
        self.check_resolution(resolution)
        if (patch := self.patch_size) is not None:
            return resolution // patch, resolution // patch
        _, rows, columns, _ = self._shape(resolution).patches.shape
        return rows, columns

    def check_resolution(self, resolution: int) -> None:
        """Refuse a resolution (pixels) that the network does not take.

        Raises:
            BadInput: the network does not take it; the message names what it takes.
        """
        name, patch = self.spec.architecture, self.patch_size
        if (other := self._other) is not None:
            _check_step(name, other, resolution)
        elif patch is not None and not getattr(self._trunk, "dynamic_img_size", False):
            if resolution != self.native_resolution:
                raise BadInput(
                    f"{name} at {resolution} px: it takes {self.native_resolution} px only"
                )
        elif patch is not None:
            if resolution < patch or resolution % patch:
                raise BadInput(f"{name} at {resolution} px: wants a multiple of its patch, {patch}")
        elif resolution < self.stride:
            raise BadInput(f"{name} at {resolution} px: wants at least its stride, {self.stride}")

    def forward(self, pixels: Real[Tensor, "b 3 r r"]) -> Features:
        """Encode square pictures.

        Args:
            pixels: uint8, or float in [0, 255], [B, 3, R, R], RGB.

        Returns:
            Features in the network's dtype.

        Raises:
            BadInput: the network does not take that resolution.
        """
        x = self._normalised(pixels)
        wanted = [] if self._index is None else [self._index]
        return self._read(self._run(x, wanted, self.spec.layer is not None), x)

    def several(
        self, pixels: Real[Tensor, "b 3 r r"], readers: Sequence["Encoder"]
    ) -> list[Features]:
        """Encode square pictures by one forward of the network, as each of some encoders reads it.

        Args:
            pixels: as of `forward`.
            readers: encoders of this network, mean and std; their summaries and layers differ.

        Returns:
            what `forward` of each gives.

        Raises:
            BadInput: the network does not take that resolution.
        """
        x = self._normalised(pixels)
        deep = any(each.spec.layer is not None for each in readers)
        wanted = {each._index for each in readers if each._index is not None}
        ran = self._run(x, sorted(wanted), deep)
        return [each._read(ran, x) for each in readers]

    @property
    def _trunk(self) -> Any:
        return self.network.get_submodule(self._trunk_name)

    def _normalised(self, pixels: Tensor) -> Tensor:
        """Return what the network takes; the pixels' resolution is looked at."""
        self.check_resolution(pixels.shape[-1])
        dtype = next(self.network.parameters(), self.pixel_scale).dtype
        # Normalised in float32 whatever the network computes in: 8 bits of bfloat16 lose pixels.
        return (pixels.float() * self.pixel_scale.float() + self.pixel_offset.float()).to(dtype)

    def _run(self, x: Tensor, wanted: list[int], deep: bool) -> _Run:
        """Run the network once.

        Args:
            x: what it takes.
            wanted: indices of timm's or open_clip's intermediates that will be read, rising.
            deep: True if a layer of another library's network will be.
        """
        if (other := self._other) is not None:
            return _Run(other.run(x, deep), {})
        trunk = self._trunk
        if not hasattr(trunk, "forward_features"):  # open_clip's own transformer
            final = len(trunk.transformer.resblocks) - 1
            wanted = wanted if final in wanted else [*wanted, final]
            output = trunk.forward_intermediates(x, indices=wanted)
            maps = output["image_intermediates"]
            return _Run(output["image_features"], dict(zip(wanted, maps, strict=True)))
        if not wanted:
            return _Run(trunk.forward_features(x), {})
        final, maps = trunk.forward_intermediates(x, indices=wanted)
        return _Run(final, dict(zip(wanted, maps, strict=True)))

    def _read(self, ran: _Run, x: Tensor) -> Features:
        """Take the spec's tokens from what the network made of pixels."""
        if (other := self._other) is not None:
            return Features(*other.read(ran.final, x))
        if hasattr(self._trunk, "forward_features"):
            return self._timm_features(ran, x.shape[-1])
        return self._open_clip_features(ran)

    def _timm_features(self, ran: _Run, resolution: int) -> Features:
        trunk, final = self._trunk, ran.final
        if final.ndim == 3:  # tokens; a CNN gives a map
            side = resolution // (self.patch_size or 1)
            last = final[:, trunk.num_prefix_tokens :].unflatten(1, (side, side))
        else:
            last = final.permute(0, 2, 3, 1)
        patches = last if self._index is None else ran.layers[self._index].permute(0, 2, 3, 1)
        kind = self.spec.summary
        if kind == "mean_patches":
            summary = last.flatten(1, 2).mean(1)
        elif self.spec.library == "open_clip":
            summary = self.network.get_submodule("head")(trunk.forward_head(final))
        elif kind == "class_token":
            summary = final[:, 0]
        else:
            summary = trunk.forward_head(final, pre_logits=kind == "average_pool")
        return Features(summary, patches)

    def _open_clip_features(self, ran: _Run) -> Features:
        layers = {index: layer.permute(0, 2, 3, 1) for index, layer in ran.layers.items()}
        last = self._trunk.ln_post(layers[max(layers)])
        patches = last if self._index is None else layers[self._index]
        if self.spec.summary == "mean_patches":
            return Features(last.flatten(1, 2).mean(1), patches)
        return Features(ran.final, patches)

    def _shape(self, resolution: int) -> Features:
        return _tokens(self.spec.model_dump_json(), resolution)


class Shapes(NamedTuple):
    """What an architecture says of its tokens at a resolution.

    Attributes:
        grid: (rows, columns) of the patches.
        patch_dim: width of a patch token.
        summary_dim: width of the summary.
    """

    grid: tuple[int, int]
    patch_dim: int
    summary_dim: int


def shapes(spec: EncoderSpec, resolution: int) -> Shapes:
    """Return an encoder's shapes at a resolution in pixels, worked out once a process.

    Raises:
        BadInput: as `Encoder`, or the network does not take that resolution.
    """
    return _shapes(spec.model_dump_json(), resolution)


def native_resolution(spec: EncoderSpec) -> int:
    """Return the side of the square input that an architecture was made for, pixels.

    Raises:
        BadInput: as `Encoder`.
    """
    return weightless(spec).native_resolution


def weightless(spec: EncoderSpec) -> Encoder:
    """Return an encoder on the meta device, built once a process: its layers, without weights.

    Raises:
        BadInput: as `Encoder`.
    """
    return _weightless(spec.model_dump_json())


@cache
def _shapes(spec: str, resolution: int) -> Shapes:
    encoder = _weightless(spec)
    encoder.check_resolution(resolution)
    return Shapes(encoder.grid(resolution), encoder.patch_dim, encoder.summary_dim)


@cache
def _tokens(spec: str, resolution: int) -> Features:
    """Encode one picture on the meta device: the architecture's own word on its shapes."""
    encoder = _weightless(spec)
    encoder.check_resolution(resolution)
    with torch.no_grad():
        found: Features = encoder(torch.empty(1, 3, resolution, resolution, device="meta"))
    return found


@cache
def _weightless(spec: str) -> Encoder:
    with shapes_alone():  # in evaluation mode: batch norm refuses one 1x1 map in training
        return Encoder(EncoderSpec.model_validate_json(spec)).eval()


def _layer_index(trunk: Any, spec: EncoderSpec) -> int | None:
    """Return which of the network's intermediates is the spec's layer; None for its last tokens."""
    if spec.layer is None:
        return None
    blocks = getattr(trunk, "blocks", None)
    if hasattr(trunk, "transformer"):
        blocks = trunk.transformer.resblocks
    elif not hasattr(trunk, "patch_embed"):
        strides = [int(stage["reduction"]) for stage in trunk.feature_info]
        if spec.layer not in strides:
            raise BadInput(f"{spec.architecture} has no layer of stride {spec.layer}: {strides}")
        return len(strides) - 1 - strides[::-1].index(spec.layer)
    depth = len(blocks) if blocks is not None else 0
    if not 0 <= spec.layer < depth:
        raise BadInput(f"{spec.architecture} has no block {spec.layer}: 0 to {depth - 1}")
    return spec.layer


def _check_step(name: str, other: Other, resolution: int) -> None:
    """Refuse a side, pixels, that another library's or one's own network does not take."""
    if not other.step and resolution != other.resolution:
        raise BadInput(f"{name} at {resolution} px: it takes {other.resolution} px only")
    if other.step and (resolution < other.step or resolution % other.step):
        raise BadInput(f"{name} at {resolution} px: wants a multiple of its step, {other.step}")


def _check_layout(trunk: Any, spec: EncoderSpec) -> None:
    """Refuse a network whose final tokens are neither its patches' nor a map, channels first."""
    hierarchical = hasattr(trunk, "patch_embed") and not hasattr(trunk, "num_prefix_tokens")
    if hierarchical or getattr(trunk, "output_fmt", "NCHW") != "NCHW":
        raise BadInput(
            f"{spec.architecture}: the final tokens of a {type(trunk).__name__} do not lie on the "
            "grid of its patches; wants a plain vision transformer or a CNN"
        )


def _check_summary(network: nn.Module, trunk: Any, spec: EncoderSpec) -> None:
    """Refuse a summary that the network does not have."""
    if hasattr(trunk, "transformer"):  # open_clip's own transformer
        pools = {"tok": "class_token", "avg": "average_pool"}
        own = "attention_pool" if trunk.attn_pool is not None else pools.get(trunk.pool_type, "")
        have = {own}
    elif hasattr(trunk, "patch_embed"):
        own = {"map": "attention_pool", "avg": "average_pool", "token": "class_token"}.get(
            trunk.global_pool, ""
        )
        have = {own}
        if spec.library == "timm" and getattr(trunk, "cls_token", None) is not None:
            have.add("class_token")
    else:
        have = {"average_pool"}
    have = {*have, "mean_patches"} - {""}
    if spec.summary not in have:
        raise BadInput(f"{spec.architecture} has no {spec.summary}; it has {sorted(have)}")
