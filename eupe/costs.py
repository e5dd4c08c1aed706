"""Costs: parameters and multiply-adds of an encoder, counted on the meta device (no memory)."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from eupe.encoders import Encoder
from eupe.networks import shapes_alone
from eupe.spec import EncoderSpec


class Cost(NamedTuple):
    """Parameters of an encoder and multiply-adds of one picture.

    Attributes:
        parameters: of the encoder, without classifier and heads.
        multiply_adds: of one picture's forward pass, in matrix products, convolutions and
            attention. The paper prints twice this for its transformers and this for its ConvNeXts.
    """

    parameters: int
    multiply_adds: int


def cost(spec: EncoderSpec, resolution: int) -> Cost:
    """Count an encoder's parameters and one picture's multiply-adds.

    Args:
        spec: the encoder.
        resolution: side of its square input, pixels.

    Raises:
        BadInput: an unknown architecture, or a resolution that it does not take.
    """
    with shapes_alone():
        # Frozen: the counter wants the gradient's functions of whatever could be trained.
        encoder = Encoder(spec).eval().requires_grad_(False)
        pixels = torch.empty(1, 3, resolution, resolution)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(pixels)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    return Cost(parameters, counter.get_total_flops() // 2)
