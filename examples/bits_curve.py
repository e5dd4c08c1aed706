"""How many bits does a student need? The curve of docs/results.md, from a sweep's own table.

    eupe ablate recipes/ablations/results_bits.yaml
    python examples/bits_curve.py runs/results_bits/results.parquet bits.png

It shows how the results of a sweep are read: one polars table, a row a figure.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cache.codec.known import row_bytes

STUDENT, EXPERTS = "student_final", ("efficientnet_lite0", "efficientnet_lite2")
GRIDS = {"efficientnet_lite0": (8 * 8, 112), "efficientnet_lite2": (10 * 10, 120)}
"""Tokens and channels of what the experts' caches hold of a picture."""
PROBES = {"knn_paper": "kNN (paper)", "knn_cosine": "kNN (cosine)", "linear": "linear probe"}
FAMILIES = {"float16, int8": ("float16", "int8"), "rot": ("rot",), "grid": ("grid",)}


def bits(codec: str) -> float:
    """Return the bits that a codec takes of a value, all told, over both experts."""
    values = sum(tokens * width for tokens, width in GRIDS.values())
    return 8 * sum(row_bytes(codec, *shape) for shape in GRIDS.values()) / values


def of(table: pl.DataFrame, encoder: str, metric: str) -> pl.DataFrame:
    """Return a metric of an encoder in every setting: its values' mean over seeds and its spread.

    Returns:
        columns store, mean, low, high: per cent; low and high the least and the most of the seeds.
    """
    own = table.filter((pl.col("encoder") == encoder) & (pl.col("metric") == metric))
    value = 100 * pl.col("value")
    spread = own.group_by("store", maintain_order=True)
    return spread.agg(mean=value.mean(), low=value.min(), high=value.max())


def draw(axes: Axes, table: pl.DataFrame, metric: str) -> None:
    """Draw the students of one probe over their bits, beside raw pixels and the better expert."""
    best = max(of(table, encoder, metric)["mean"].max() for encoder in EXPERTS)
    axes.axhline(best, color="black", lw=0.8, ls="--")
    axes.annotate("the better expert", (16, best), fontsize=7, ha="right", va="bottom")
    pixels = of(table, "pixels", metric)["mean"][0]
    axes.axhline(pixels, color="tab:red", lw=0.8, ls="--")
    axes.annotate("raw pixels", (16, pixels), fontsize=7, ha="right", va="bottom", color="tab:red")
    found = {row["store"]: row for row in of(table, STUDENT, metric).iter_rows(named=True)}
    plain = {name: row for name, row in found.items() if "_view" not in name}
    for family, starts in FAMILIES.items():
        points(axes, {name: row for name, row in plain.items() if name.startswith(starts)}, family)
    equal = {name.partition("_")[0]: row for name, row in found.items() if "_view" in name}
    points(axes, equal, "equal bytes: more views", ":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 1, 2, 4, 8, 16], ["½", "1", "2", "4", "8", "16"])
    axes.set_xlabel("bits a value")
    axes.set_title(PROBES[metric], loc="left")


def points(axes: Axes, found: dict[str, dict[str, float]], label: str, style: str = "-") -> None:
    """Draw the settings of a family, codec -> row of `of`, with the spread of their seeds."""
    if not found:  # a sweep has the codecs that its file names
        return
    rows: Iterable[tuple[float, dict[str, float]]] = sorted(
        ((bits(codec), row) for codec, row in found.items()), key=lambda each: each[0]
    )
    x, low, mean, high = np.array([(b, row["low"], row["mean"], row["high"]) for b, row in rows]).T
    axes.errorbar(x, mean, (mean - low, high - mean), fmt="o" + style, ms=4, capsize=2, label=label)


def main() -> int:
    """Read the table, and write the figure."""
    if len(sys.argv) != 3:
        print("usage: python examples/bits_curve.py RESULTS.parquet FIGURE", file=sys.stderr)
        return 2
    table = pl.read_parquet(sys.argv[1])
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(PROBES)), PROBES, strict=True):
        draw(axes, table, metric)
    figure.axes[0].set_ylabel("held-out images told right, per cent")
    figure.axes[0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, 0.93))
    figure.savefig(Path(sys.argv[2]), dpi=110)
    print(sys.argv[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
