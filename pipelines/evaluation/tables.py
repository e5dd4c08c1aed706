"""What a run's summary says, in tables and sentences for people."""

from collections.abc import Mapping, Sequence
from typing import Any

PROBE_TITLES = {
    "knn_paper": "kNN (paper)",
    "knn_cosine": "kNN (cosine)",
    "knn_cosine_20": "kNN (cosine, k = 20)",
    "linear": "linear probe",
}
TRIVIAL = {"pixels": "raw 16 x 16 pixels", "init": "its own initialisation"}
"""What a student is compared with: key in `versus` -> words."""
FIGURES = ("figure", "before", "after", "compare")
"""Columns of the table of cosines."""


def encoder_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of encoders: each with its figures and their intervals, per cent.

    Args:
        summary: the contents of summary.json.
    """
    rows = []
    for name, found in summary["encoders"].items():
        row = {"encoder": summary["titles"][name], "px": str(found["resolution"])}
        row |= {
            words: interval(found[probe]) for probe, words in PROBE_TITLES.items() if probe in found
        }
        row |= {
            f"near {teacher}": f"{percent(found['neighbours'][teacher]['value'])}, "
            f"{found['cka'][teacher]:.2f}"
            for teacher in found["neighbours"]
        }
        rows.append(row)
    return rows


def closing_rows(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of cosines to teachers: rows of text with the columns FIGURES.

    Args:
        summary: the contents of summary.json.
    """
    closing = [
        (
            f"{stage}: cosine to {teacher}'s {kind}, held out",
            f"{cosine['init']:.3f}",
            f"{cosine['final']:.3f}",
            f"ignoring the image {cosine['baseline']:.3f}",
        )
        for stage, teachers in summary["agreement"].items()
        for teacher, kinds in teachers.items()
        for kind, cosine in kinds.items()
    ]
    if {"stage2", "stage3"} <= summary.keys():
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


def verdicts(summary: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the student beside each trivial encoder, by each probe.

    Args:
        summary: the contents of summary.json.
    """
    encoders, student = summary["encoders"], summary["student"]
    others = {"pixels": encoders["pixels"], "init": encoders[student["initial"]]}
    sentences = []
    for probe, against in summary["versus"].items():
        ours = encoders[student["final"]][probe]["value"]
        for other, words in TRIVIAL.items():
            theirs = others[other][probe]["value"]
            place = "above" if ours > theirs else "BELOW" if ours < theirs else "level with"
            sentences.append(
                f"By {PROBE_TITLES[probe]} the student is {place} {words}: {percent(ours)} and "
                f"{percent(theirs)}, p = {against[other]['p_value']:.2g}"
            )
    return sentences


def table_line(summary: Mapping[str, Any]) -> str:
    """Return in one line what the table of encoders shows.

    Args:
        summary: the contents of summary.json.
    """
    if summary["label"] is None:
        return "Near a teacher: shared ten nearest neighbours, linear CKA"
    return (
        f"Right about {summary['label']} of {summary['queries']:,} held-out images, "
        f"{summary['bank']:,} to learn from, k = {summary['k']}, 95 % bootstrap intervals; near a "
        "teacher: shared ten nearest neighbours, linear CKA"
    )


def steps_line(summary: Mapping[str, Any]) -> str:
    """Return in one line what was done and how long each step took.

    Args:
        summary: the contents of summary.json.
    """
    seconds: Sequence[str] = [f"{name} {value:.0f} s" for name, value in summary["seconds"].items()]
    return (
        f"{summary['images']:,} images, {summary['rows']:,} cached rows, "
        f"{summary['cache_bytes'] / 1e6:,.0f} MB; {', '.join(seconds)}"
    )


def percent(share: float) -> str:
    """Return a share as per cent."""
    return f"{100 * share:.1f} %"


def interval(found: Mapping[str, float]) -> str:
    """Return a share and its interval as per cent: 54.3 (49.8 to 58.7)."""
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _both(kinds: Mapping[str, float]) -> str:
    return f"{kinds['summary']:.3f}, {kinds['patches']:.3f}"
