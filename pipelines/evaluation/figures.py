"""Figures: loss curves as SVG that follows the page's colours, patch tokens as small PNGs."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from eupe.probes import pca_rgb
from pipelines.evaluation.frozen import FrozenStudent, evaluation_resolutions

TOKEN_IMAGES = 6
INK = "#010203"  # stands for the page's own text colour; no figure has it otherwise
COLOURS = ("#3b7dd8", "#e08a1e", "#2a9d6f", "#b0509e", "#8a8f98")
_STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "eupe",  # identifiers do not change from run to run
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
PANELS = (
    ("summary", "summary: 1 - cosine", "held_out/cosine_summary"),
    ("patch_cosine", "patches: 1 - cosine", "held_out/cosine_patches"),
)


@dataclass(frozen=True)
class TokenPicture:
    """Patch tokens of a few held-out images, shown by their first three principal components.

    Attributes:
        sample_ids: of the images.
        columns: title -> one PNG an image, as a data URI; the first is the image itself.
    """

    sample_ids: list[str]
    columns: dict[str, list[str]]


def loss_curves(lines: Sequence[Mapping[str, float]], teachers: Sequence[str]) -> str:
    """Draw the total loss and each teacher's cosine losses over the steps.

    Args:
        lines: of metrics.jsonl.
        teachers: in the order of their colours.

    Returns:
        an <svg> element, its text in the colour of its surroundings.
    """
    trained = [line for line in lines if "loss/total" in line]
    steps = [line["step"] for line in trained]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 3.1), layout="constrained")
        axes = figure.subplots(1, 3)
        _curve(axes[0], steps, [line["loss/total"] for line in trained], INK, "")
        axes[0].set_title("total loss", loc="left")
        for panel, (term, title, held_out) in zip(axes[1:], PANELS, strict=True):
            for name, colour in zip(teachers, _colours(len(teachers)), strict=True):
                _curve(
                    panel, steps, [line[f"loss/{name}/{term}"] for line in trained], colour, name
                )
            seen = [line for line in lines if held_out in line]
            if seen:
                panel.plot(
                    [line["step"] for line in seen],
                    [1 - line[held_out] for line in seen],
                    "o",
                    color=INK,
                    markersize=4,
                    label="held out, mean",
                )
            panel.set_title(title, loc="left")
            panel.legend(frameon=False, fontsize=9)
        for panel in axes:
            panel.set_xlabel("step")
            panel.grid(axis="y", alpha=0.15, color=INK)
        out = io.StringIO()
        # No metadata: a time would make equal runs differ, and the rest names addresses.
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def token_picture(student: FrozenStudent) -> TokenPicture:
    """Show what teachers and student make of a few held-out images, spread over the set.

    Each encoder has components of its own, fitted over these images together.

    Args:
        student: shown before training and after.

    Raises:
        BadInput: a checkpoint of another network.
        StoreError: a cache cannot be read.
    """
    device, images, held_out = student.device, student.images, student.recipe.held_out.name
    models = {"student before": student.initial, "student after": student.final}
    ids, shown = list[str](), list[Tensor]()
    maps: dict[str, list[Tensor]] = {}
    rows = images.rows(held_out, TOKEN_IMAGES)
    at = evaluation_resolutions(student.recipe, student.stage)
    with torch.inference_mode():
        for batch in images.batches(held_out, rows, at):
            good = torch.from_numpy(batch.valid)
            ids += [
                name for name, valid in zip(batch.sample_ids, batch.valid, strict=True) if valid
            ]
            shown += list(batch.pixels[good].permute(0, 2, 3, 1))
            for name, target in batch.targets(device).items():
                normaliser = student.normalisers[name].patches.to(device)
                patches = normaliser.inverse(target.patches[good.to(device)])
                maps.setdefault(f"teacher {name}", []).extend(patches.cpu())
            for title, model in models.items():
                features, _ = model(batch.pixels[good].to(device))
                maps.setdefault(title, []).extend(features.patches.float().cpu())
    columns = {"image": [_png(pixels.numpy()) for pixels in shown]}
    for title, grids in maps.items():
        columns[title] = [_png((rgb.numpy() * 255).round()) for rgb in pca_rgb(grids)]
    return TokenPicture(ids, columns)


def _curve(
    axes: Axes, steps: Sequence[float], values: Sequence[float], colour: str, name: str
) -> None:
    """Draw a noisy curve lightly and its running mean over it."""
    width = max(1, len(values) // 25)
    padded = np.pad(np.asarray(values, float), (width // 2, width - 1 - width // 2), mode="edge")
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    smooth = np.convolve(padded, np.full(width, 1 / width), mode="valid")
    axes.plot(steps, smooth, color=colour, linewidth=1.8, label=name)


def _colours(count: int) -> list[str]:
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _png(rgb: np.ndarray) -> str:
    """Return an RGB array [H, W, 3] as the data URI of a PNG."""
    out = io.BytesIO()
    Image.fromarray(rgb.astype(np.uint8)).save(out, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
