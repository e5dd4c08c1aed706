"""Figures: loss curves as SVG that follows the page's colours, patch tokens as small PNGs."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from eupe.probes import pca_rgb
from pipelines.evaluation.frozen import FrozenStudent, by_teachers, evaluation_resolutions
from pipelines.evaluation.networks import PIXELS
from pipelines.evaluation.tables import PROBE_TITLES

TOKEN_IMAGES = 6
INK = "#010203"  # stands for the page's own text colour; no figure has it otherwise
COLOURS = ("#3b7dd8", "#e08a1e", "#2a9d6f", "#b0509e", "#8a8f98", "#d2483f", "#5b4fc7", "#7a5c3a")
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
DOTTED = ("knn_paper", "knn_cosine", "linear")
"""Probes of the dot plot."""


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
        return _svg(figure)


def dot_plot(summary: Mapping[str, Any]) -> str:
    """Draw every encoder by every probe with its interval, one row an encoder and resolution.

    The line is at raw pixels, which any encoder has to pass.

    Args:
        summary: the contents of summary.json.

    Returns:
        an <svg> element, its text in the colour of its surroundings; empty without labels.
    """
    encoders, titles = summary["encoders"], summary["titles"]
    probes = [probe for probe in DOTTED if probe in encoders[PIXELS]]
    if not probes:
        return ""
    rows = [
        (f"{titles[name]}, {found['resolution']} px", titles[name], found)
        for name, found in encoders.items()
    ]
    return dots(
        [(words, kind, [found[probe] for probe in probes]) for words, kind, found in rows],
        [PROBE_TITLES[probe] for probe in probes],
        [encoders[PIXELS][probe]["value"] for probe in probes],
    )


def dots(
    rows: Sequence[tuple[str, str, Sequence[Mapping[str, float]]]],
    panels: Sequence[str],
    marks: Sequence[float],
) -> str:
    """Draw shares with their intervals, a row each, in panels side by side.

    Args:
        rows: from above; words, what it shares a colour with, and `value`, `low` and `high`, 0 to
            1, in each panel.
        panels: titles.
        marks: where each panel has a line, 0 to 1.

    Returns:
        an <svg> element, its text in the colour of its surroundings.
    """
    kinds = list(dict.fromkeys(kind for _, kind, _ in rows))
    colours = dict(zip(kinds, _colours(len(kinds)), strict=True))
    places = range(len(rows), 0, -1)  # the first on top
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(11, 0.9 + 0.23 * len(rows)), layout="constrained")
        for number, axes in enumerate(figure.subplots(1, len(panels), squeeze=False)[0]):
            axes.axvline(100 * marks[number], color=INK, alpha=0.35, lw=0.8)
            for place, (_, kind, found) in zip(places, rows, strict=True):
                value, low, high = (100 * found[number][key] for key in ("value", "low", "high"))
                axes.plot([low, high], [place, place], color=colours[kind], lw=1.4, alpha=0.7)
                axes.plot([value], [place], "o", color=colours[kind], markersize=4.5)
            words = [each for each, _, _ in rows]
            axes.set_yticks(places, words if number == 0 else [""] * len(rows))
            axes.tick_params(axis="y", length=0, labelsize=9)
            axes.set_ylim(0.4, len(rows) + 0.6)
            axes.set_title(panels[number], loc="left")
            axes.set_xlabel("right, per cent")
            axes.grid(axis="x", alpha=0.15, color=INK)
        return _svg(figure)


def token_picture(students: Sequence[FrozenStudent]) -> TokenPicture:
    """Show what teachers and the last student make of a few held-out images.

    The images are spread over the set. Each encoder has components of its own, fitted over these
    images together.

    Args:
        students: of a run's stages, in their order. Shown are the teachers of each, and the last
            student before training and after.

    Raises:
        BadInput: a checkpoint of another network.
        StoreError: a cache cannot be read.
    """
    last = students[-1]
    held_out = last.recipe.held_out.name
    rows = last.images.rows(held_out, TOKEN_IMAGES)
    models = {"student before": last.initial, "student after": last.final}
    shown: dict[str, np.ndarray] = {}
    taught: dict[str, list[Tensor]] = {}
    maps: dict[str, list[Tensor]] = {title: [] for title in models}
    with torch.inference_mode():
        for student in by_teachers(students):
            at = evaluation_resolutions(student.recipe, student.stage)
            for batch in student.images.batches(held_out, rows, at):
                for place, name in enumerate(batch.sample_ids):
                    if batch.valid[place]:
                        shown[name] = batch.pixels[place].permute(1, 2, 0).numpy()
                good = torch.from_numpy(batch.valid)
                for name, target in batch.targets(student.device).items():
                    normaliser = student.normalisers[name].patches.to(student.device)
                    patches = normaliser.inverse(target.patches[good.to(student.device)])
                    taught.setdefault(f"teacher {name}", []).extend(patches.cpu())
                if student is last:
                    for title, model in models.items():
                        features = model.encoder(batch.pixels[good].to(student.device))
                        maps[title].extend(features.patches.float().cpu())
    columns = {"image": [_png(pixels) for pixels in shown.values()]}
    for title, grids in (taught | maps).items():
        columns[title] = [_png((rgb.numpy() * 255).round()) for rgb in pca_rgb(grids)]
    return TokenPicture([*shown], columns)


def _svg(figure: Figure) -> str:
    """Return a figure as an <svg> element that follows the colour of its surroundings."""
    out = io.StringIO()
    # No metadata: a time would make equal runs differ, and the rest names addresses.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


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
