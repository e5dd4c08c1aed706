"""One real forward and backward of the full-size proxy on a CPU, with its peak memory.

    python -m benchmarks.proxy_step [--batch 1] [--resolution 256] [--depth 50] [--json FILE]

Weights are random and bfloat16, activations are checkpointed. CPUs without bfloat16 units multiply
bfloat16 matrices up to 300 times slower than float32 ones (docs/log.md), so every linear layer
reads its bfloat16 weight and multiplies in float32: the storage and the rounding of a bfloat16 run.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eupe.encoders import Encoder
from eupe.students import FAMILY


class Float32Products(TorchFunctionMode):
    """Multiplies bfloat16 linear layers in float32 and rounds the result to bfloat16."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: tuple[Any, ...] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `function`, or the float32 form of it when it is a bfloat16 linear layer."""
        if function is F.linear and arguments[0].dtype == torch.bfloat16:
            function = _linear_in_float32
        return function(*arguments, **(keywords or {}))


class Float32Block(nn.Module):
    """A block that runs under `Float32Products`, when it is recomputed in the backward too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **keywords: Any) -> Tensor:
        """Return what the block makes of tokens [B, N, D]."""
        with Float32Products():
            result: Tensor = self.block(x, **keywords)
        return result


def _linear_in_float32(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    wide = None if bias is None else bias.float()
    return F.linear(input.float(), weight.float(), wide).bfloat16()


def build(depth: int) -> Encoder:
    """Build the proxy with `depth` of its 50 blocks, bfloat16, random weights of std 0.02."""
    spec = FAMILY["proxy_vitg"]
    arguments = {**spec.model_arguments, "depth": depth}
    with torch.device("meta"):
        encoder = Encoder(spec.model_copy(update={"model_arguments": arguments}))
    # Rotary tables and pixel statistics are computed, not drawn: take them from a shallow twin.
    shallow = Encoder(
        spec.model_copy(update={"model_arguments": {**arguments, "depth": 1}})
    ).named_buffers()
    encoder.to(torch.bfloat16).to_empty(device="cpu")
    buffers = dict(encoder.named_buffers())
    for name, value in shallow:
        buffers[name].copy_(value)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(float(name.endswith("weight") or "gamma" in name))
    network: Any = encoder.network
    network.blocks = nn.ModuleList(Float32Block(block) for block in network.blocks)
    network.set_grad_checkpointing(True)
    return encoder


def step(encoder: nn.Module, pixels: Tensor) -> tuple[float, float]:
    """Run one forward and backward; return their seconds."""
    started = time.perf_counter()
    features = encoder(pixels)
    loss = features.summary.float().square().mean() + features.patches.float().square().mean()
    forwarded = time.perf_counter()
    loss.backward()  # type: ignore[no-untyped-call]
    return forwarded - started, time.perf_counter() - forwarded


def main() -> None:
    """Measure and print one row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=1, help="pictures")
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    parser.add_argument("--depth", type=int, default=50, help="blocks, of 50")
    parser.add_argument("--json", type=Path, help="also write the row here")
    arguments = parser.parse_args()
    encoder = build(arguments.depth)
    shape = (arguments.batch, 3, arguments.resolution, arguments.resolution)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    forward_seconds, backward_seconds = step(encoder, pixels)
    missing = [name for name, p in encoder.named_parameters() if p.grad is None]
    row = {
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "dtype": "bfloat16",
        "batch": arguments.batch,
        "resolution": arguments.resolution,
        "forward_seconds": round(forward_seconds, 1),
        "backward_seconds": round(backward_seconds, 1),
        "parameters_without_gradient": missing,
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }
    print(json.dumps(row, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps([row], indent=2) + "\n")


if __name__ == "__main__":
    main()
