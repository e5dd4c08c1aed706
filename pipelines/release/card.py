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
    """Yield what a run's summary says of its encoders and stages, in words, value."""
    path = run / SUMMARY
    if not path.is_file():
        return
    summary = json.loads(path.read_text())
    for group in ("encoders", "knn_top1", "cosine"):
        yield from _leaves(summary.get(group), group)


def _leaves(value: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}, {key}")
    elif isinstance(value, float):
        yield path, f"{value:.4g}"
    elif value is not None:
        yield path, str(value)
