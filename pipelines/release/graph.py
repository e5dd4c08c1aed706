"""ONNX: a student as one graph, pixels to summary and patches, compared with itself on pictures."""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import Dim

from eupe.encoders import Encoder, Features
from eupe.errors import BadInput

GRAPH = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference of a token's coordinate, of the largest coordinate there is (at least 1):
float32 sums in another order. A position that is off by a part of a patch makes 1e-2."""
WANTED = ("onnx", "onnxscript", "onnxruntime")
MAX_STEPS, MAX_BATCH = 1 << 12, 1 << 16


class Graph(NamedTuple):
    """What a graph takes, and how close it comes.

    Attributes:
        step: the side of its input is any multiple of this, pixels; None: one side alone.
        resolution: that side, or the one it was traced at.
        difference: the largest there was, of the largest coordinate.
        resolutions: sides that it was compared at, pixels.
        reason: why it takes one side alone; empty if it takes several.
    """

    step: int | None
    resolution: int
    difference: float
    resolutions: tuple[int, ...]
    reason: str = ""


def write(folder: Path, encoder: Encoder, pictures: Sequence[Tensor]) -> Graph:
    """Write a student as ONNX, of any batch and, where the network allows it, any square side.

    Args:
        folder: to write into.
        encoder: the student, in evaluation mode.
        pictures: float32 [B, 3, R, R], 0 to 255, at one R after another; the first is traced. At
            least two R where the network takes several.

    Returns:
        What was written.

    Raises:
        BadInput: `onnx`, `onnxscript` or `onnxruntime` is not installed.
        RuntimeError: the network cannot be written so, or gives other tokens.
    """
    missing = [name for name in WANTED if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"ONNX wants {', '.join(missing)}: pip install 'eupe[release]', or give --no-onnx"
        )
    path = folder / GRAPH
    side, step, reason = pictures[0].shape[-1], _step(encoder), "the network takes no other"
    if step is not None and len(pictures) > 1:
        try:
            _trace(path, encoder, pictures[0], step)
            worst = max(_difference(path, encoder, pixels) for pixels in pictures)
        except Exception as error:  # whatever exporter and runtime raise: one side is left to try
            reason = f"of several: {type(error).__name__}: {str(error).splitlines()[0]}"
        else:
            if worst <= TOLERANCE:
                sides = tuple(pixels.shape[-1] for pixels in pictures)
                return Graph(step, side, worst, sides)
            reason = f"of several: differs from the student by {worst:.2g}"
    _trace(path, encoder, pictures[0], None)
    worst = _difference(path, encoder, pictures[0])
    if worst > TOLERANCE:
        raise RuntimeError(f"{path}: differs from the student by {worst:.2g}, above {TOLERANCE}")
    return Graph(None, side, worst, (side,), reason)


class _Flat(nn.Module):
    """An encoder that returns a tuple: names of outputs are then ours to give."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Float[Tensor, "b 3 r r"]) -> tuple[Tensor, Tensor]:
        summary, patches = self.encoder(pixels)
        return summary, patches


def _step(encoder: Encoder) -> int | None:
    """Return what an input's side is a multiple of; None where the network takes one alone."""
    step = encoder.stride
    try:
        for side in (2 * step, 3 * step):
            encoder.check_resolution(side)
    except BadInput:
        return None
    return step


def _trace(path: Path, encoder: Encoder, pixels: Tensor, step: int | None) -> None:
    shapes: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH)}
    if step is not None:
        side = step * Dim("side", min=1, max=MAX_STEPS)
        shapes |= {2: side, 3: side}
    with _symbolic_positions(encoder.network), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names of axes that are one another's multiples
        program = torch.onnx.export(
            _Flat(encoder).eval(),
            (pixels,),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=["pixels"],
            output_names=list(Features._fields),
            verbose=False,
        )
    assert program is not None
    program.save(path)


@contextmanager
def _symbolic_positions(network: nn.Module) -> Iterator[None]:
    """Let timm's DINOv3 positions follow the size of the input while a network is traced.

    timm divides by `float(size)`, which the exporter takes for a constant, silently. Here the same
    numbers come from the size itself.
    """
    rope: Any = getattr(network, "rope", None)
    if type(rope).__name__ != "RotaryEmbeddingDinoV3" or rope.normalize_coords != "separate":
        yield
        return

    def embed(shape: Sequence[int], no_aug: bool = False) -> Tensor:
        axes = [(torch.arange(size, dtype=torch.float32) + 0.5) / size for size in shape]
        grid = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1).flatten(0, 1)
        return torch.cat(rope._get_pos_embed_from_coords(2 * grid - 1), dim=-1)

    rope._create_embed = embed
    try:
        yield
    finally:
        del rope._create_embed


def _difference(path: Path, encoder: Encoder, pixels: Tensor) -> float:
    """Return the largest difference of onnxruntime's tokens, of the largest coordinate.

    The batch is another than the one that was traced.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    worst = 0.0
    with torch.inference_mode():
        for shown in (pixels, pixels[:1]):
            found = session.run(list(Features._fields), {"pixels": shown.numpy()})
            for ours, theirs in zip(encoder(shown), found, strict=True):
                gap = (torch.from_numpy(theirs) - ours).abs().max()
                worst = max(worst, float(gap / ours.abs().max().clamp(min=1)))
    return worst
