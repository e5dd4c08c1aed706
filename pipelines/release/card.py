"""The model card: what a student is, how it is used, where it comes from, what it is free for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from eupe.encoders import Encoder
from pipelines.records import made_by
from pipelines.records.checkpoint import Checkpoint
from pipelines.release.licences import Verdict, named_weights
from pipelines.release.models import Model

CARD = "README.md"
SUMMARY = "summary.json"
"""A run's figures, as `pipelines.evaluation.report` writes them."""


def render(
    encoder: Encoder,
    model: Model,
    saved: Checkpoint,
    *,
    folder: str,
    pooled: bool,
    files: Sequence[tuple[str, str]],
    licence: Verdict,
    weights: str,
) -> str:
    """Return the text of README.md.

    Args:
        encoder: the student.
        model: how pictures go in.
        saved: the checkpoint that is exported.
        folder: name of the folder.
        pooled: True if timm's forward gives the summary.
        files: each with what it is.
        licence: what follows of its sources.
        weights: digest of the network's tensors.
    """
    environment = Environment(
        loader=PackageLoader("pipelines", "release"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 (Markdown; no browser reads it as HTML from here)
        keep_trailing_newline=True,
    )
    recipe: Any = saved.recipe
    stage = saved.directory.parents[1].name
    return environment.get_template("card.md.j2").render(
        name=f"{recipe['name']}: {recipe['stages'][stage]['student']} of {stage}",
        model=model,
        parameters=sum(each.numel() for each in encoder.network.parameters()),
        summary_dim=encoder.summary_dim,
        patch_dim=encoder.patch_dim,
        stride=encoder.stride,
        tokens=encoder.patch_size is not None,
        resolutions=recipe["stages"][stage]["student_resolutions"],
        recipe=recipe,
        stage=stage,
        step=saved.step,
        figures=list(_figures(saved.directory.parents[2]))
        if stage == [*recipe["stages"]][-1]
        else [],
        origin=named_weights,
        made_by=saved.made_by,
        this_code=made_by.this_code(),
        folder=folder,
        pooled=pooled,
        files=files,
        licence=licence,
        weights=weights,
    )


def _figures(run: Path) -> Iterator[tuple[str, str]]:
    """Yield what a run's summary says of its encoders and of cosines, in words, value."""
    path = run / SUMMARY
    if not path.is_file():
        return
    summary = json.loads(path.read_text())
    titles = summary.get("titles", {})
    for name, found in summary.get("encoders", {}).items():
        probes = [
            f"{probe.replace('_', ' ')} {_interval(each)}"
            for probe, each in found.items()
            if isinstance(each, Mapping) and {"value", "low", "high"} <= set(each)
        ]
        if probes:
            yield f"{titles.get(name, name)}, {found['resolution']} px", "; ".join(probes)
    for kind, cosine in (summary.get("cosine") or {}).items():
        yield (
            f"cosine to the teachers' {kind}",
            f"{cosine['final']:.3f}; before training {cosine['init']:.3f}; ignoring the picture "
            f"{cosine['baseline']:.3f}",
        )


def _interval(found: Mapping[str, float]) -> str:
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"
