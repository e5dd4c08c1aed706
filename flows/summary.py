"""The closing table of a run: figures before and after training, beside others to compare."""

from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = ("figure", "before", "after", "compare")


def rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Turn a run's summary into rows of text with the columns FIGURES."""
    knn, cosine = summary["knn_top1"], summary["cosine"]
    closing = []
    if knn is not None:
        teachers = ", ".join(f"{name} {_percent(value)}" for name, value in knn["teacher"].items())
        closing.append(
            (
                f"kNN top-1 ({knn['label']}, k = {knn['k']}, {knn['queries']} held-out queries)",
                _percent(knn["student_init"]),
                _percent(knn["student_final"]),
                f"{teachers}; p = {knn['p_value']:.2g}",
            )
        )
    whole = {"stage2", "stage3"} <= summary.keys()
    whose = "the proxy's" if whole else "teachers'"
    closing += [
        (
            f"cosine to {whose} {kind}, held out",
            f"{cosine[kind]['init']:.3f}",
            f"{cosine[kind]['final']:.3f}",
            f"ignoring the image {cosine[kind]['baseline']:.3f}",
        )
        for kind in ("summary", "patches")
    ]
    if whole:
        second, third = summary["stage2"]["cosine"], summary["stage3"]["cosine"]
        closing += [
            (
                f"cosine to the proxy, both at {scale} px: summary, patches",
                _both(second[scale]),
                _both(third[scale]),
                "before: after stage 2",
            )
            for scale in third
        ]
    return [dict(zip(FIGURES, row, strict=True)) for row in closing]


def steps(summary: Mapping[str, Any]) -> str:
    """Say in one line what was done and how long each step took."""
    seconds: Sequence[str] = [f"{name} {value:.0f} s" for name, value in summary["seconds"].items()]
    return (
        f"{summary['images']:,} images, {summary['rows']:,} cached rows, "
        f"{summary['cache_bytes'] / 1e6:,.0f} MB; {', '.join(seconds)}"
    )


def _both(kinds: Mapping[str, float]) -> str:
    return f"{kinds['summary']:.3f}, {kinds['patches']:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
