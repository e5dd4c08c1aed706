"""The student's view as an encoder: the picture is its own feature map, one token a pixel.

Cached like a teacher (codec uint8), it spares a training run decoding and augmenting the images
again: the same stores, reader, digests and verification serve both.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from eupe.spec import EncoderSpec

RGB = EncoderSpec(
    library="pixels",
    architecture="rgb",
    pixel_mean=(0.0, 0.0, 0.0),
    pixel_std=(1 / 255, 1 / 255, 1 / 255),  # tokens are the bytes themselves, 0 to 255
    summary="average_pool",
)
"""Patches: the picture, [B, R, R, 3] in 0 to 255; summary: its mean colour, [B, 3]."""


class Pixels(nn.Module):
    """A network without weights that gives back what it is given, in timm's manner."""

    pretrained_cfg: ClassVar[dict[str, Any]] = {"input_size": (3, 1, 1)}
    feature_info: ClassVar[tuple[dict[str, Any], ...]] = ({"reduction": 1},)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Return the pixels, [B, 3, R, R]."""
        return pixels

    def forward_head(self, pixels: Tensor, pre_logits: bool = True) -> Tensor:
        """Return the mean of the pixels, [B, 3]."""
        return pixels.mean((2, 3))
