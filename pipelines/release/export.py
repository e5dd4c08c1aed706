"""A student taken home: one folder that others can read, compared with the checkpoint it is of."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache.files import copies
from eupe.encoders import Encoder
from eupe.errors import BadInput
from eupe.students import build_student
from eupe.views import resize
from eupe.weights import state_digest
from pipelines.machines.progress import track
from pipelines.recipe.config import SourceConfig
from pipelines.records import made_by
from pipelines.records.checkpoint import HEADS, NORMALISERS, Checkpoint
from pipelines.release import card, graph, layouts, licences, models, pictures
from pipelines.release.models import Model
from pipelines.training import outputs

NUM_PICTURES = 4
"""That a student is compared with itself on."""
PLACES = ("path", "run_directory", "cache_root", "stage_root")
"""Fields of a recipe that name places on somebody's disk, and stay at home."""


class Exported(NamedTuple):
    """What was written.

    Attributes:
        folder: where it lies.
        files: each with what it is.
        left_out: what could not be written, with the reason.
        pooled: True if timm's forward pass gives the student's summary.
        licence: what it may be used for.
        graph: what its ONNX takes; None if there is none.
    """

    folder: Path
    files: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]
    pooled: bool
    licence: licences.Verdict
    graph: graph.Graph | None


def export(
    run: Path, to: Path, stage: str | None = None, images: str | None = None, onnx: bool = True
) -> Exported:
    """Write a run's student as a folder of its own; the folder appears whole or not at all.

    Args:
        run: a run directory.
        to: folder to write; none is there yet, or an empty one.
        stage: whose student; None: of the last stage that has a checkpoint.
        images: pictures to compare it on; None: the held-out ones of its recipe.
        onnx: True to write ONNX too.

    Raises:
        BadInput: no checkpoint, no pictures, or something is at `to`.
        RuntimeError: what was written is not the student.
    """
    if to.exists() and (not to.is_dir() or next(to.iterdir(), None) is not None):
        raise BadInput(f"--to {to}: something is there; wants a folder that is new or empty")
    folder = outputs.here(run)
    if not folder.is_dir():
        raise BadInput(f"{run}: no such folder; wants the run_directory of a recipe")
    saved = models.trained(folder, stage)
    model = models.of_run(str(copies.named(folder)), saved)
    encoder = build_student(model.encoder, model.weights).eval()
    shown = _pictures(saved, model, encoder, images)
    temporary = to.with_name(f".{to.name}.exporting")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        done = _write(temporary, saved, model, encoder, shown, onnx, to.name)
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes for its owner alone
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done._replace(folder=to)


def _write(
    folder: Path,
    saved: Checkpoint,
    model: Model,
    encoder: Encoder,
    shown: Sequence[Tensor],
    onnx: bool,
    name: str,
) -> Exported:
    """Write everything and compare it; `name` is the folder's, when it is whole."""
    recipe: Any = saved.recipe
    verdict = licences.follows(licences.sources(recipe))
    files, left_out = list[tuple[str, str]](), list[tuple[str, str]]()
    made, pooled = None, False
    with track(4, "Exporting", "parts") as progress:
        layouts.write_timm(folder, encoder, model, verdict.licence)
        pooled = layouts.check_timm(folder, encoder, shown[0])
        files += [
            (models.WEIGHTS, "the network under timm's names"),
            (layouts.CONFIG, "timm's record of it"),
        ]
        progress.advance()
        try:
            layouts.write_released(folder, encoder)
            files.append((layouts.RELEASED, "the same under the names of the released EUPE files"))
        except BadInput as error:
            left_out.append((layouts.RELEASED, str(error)))
        layouts.write_heads(folder, saved)
        files += [
            (HEADS, "adapter heads to each teacher's space, named <teacher>.<summary or patches>"),
            (NORMALISERS, "what the teachers' tokens went through before the loss"),
        ]
        progress.advance()
        if onnx:
            made = graph.write(folder, encoder, shown)
            files.append((graph.GRAPH, _takes(made)))
        progress.advance()
        files += [
            (models.RECORD, "how pictures go in, and the whole recipe"),
            (card.CARD, "this page"),
        ]
        weights = state_digest(encoder.network.state_dict())
        record = {
            "format": models.FORMAT,
            **model.model_dump(mode="json", exclude={"name", "weights"}),
            "stage": saved.directory.parents[1].name,
            "step": saved.step,
            "weights": weights,
            "graph": made and made._asdict(),
            "licence": verdict._asdict(),
            "made_by": saved.made_by,
            "exported_by": made_by.this_code(),
            "identity": saved.identity,
            "recipe": _without_places(recipe),
        }
        (folder / models.RECORD).write_text(json.dumps(record, indent=2) + "\n")
        text = card.render(
            encoder,
            model,
            saved,
            folder=name,
            pooled=pooled,
            files=files,
            licence=verdict,
            weights=weights,
        )
        (folder / card.CARD).write_text(text)
        progress.advance()
    return Exported(folder, tuple(files), tuple(left_out), pooled, verdict, made)


def _without_places(value: object) -> object:
    """Return plain data without what it says of somebody's disk."""
    if isinstance(value, Mapping):
        return {
            key: licences.named_weights(inner)
            if key == "weights" and inner
            else _without_places(inner)
            for key, inner in value.items()
            if key not in PLACES
        }
    return value


def _takes(made: graph.Graph) -> str:
    """Say what a graph takes, for its reader."""
    side = (
        f"any square of a multiple of {made.step} px"
        if made.step is not None
        else f"{made.resolution} px alone ({made.reason})"
    )
    at = ", ".join(map(str, made.resolutions))
    return (
        "ONNX: `pixels` (float32, 0 to 255, RGB, [batch, 3, side, side]) to `summary` and "
        f"`patches` [batch, rows, columns, width]; {side}; "
        f"at {at} px within {made.difference:.1g} of torch"
    )


def _pictures(
    saved: Checkpoint, model: Model, encoder: Encoder, images: str | None
) -> list[Tensor]:
    """Return real pictures at the student's sides, float32 [n, 3, R, R], its own first."""
    recipe: Any = saved.recipe
    if images is not None:
        source = pictures.source_of(images)
    else:
        source = SourceConfig.model_validate(recipe["held_out"]["source"])
    try:
        canvases = pictures.first(source, model.views, NUM_PICTURES)
    except BadInput as error:
        hint = "" if images is not None else "; name others with --images"
        raise BadInput(f"pictures to compare it on: {error}{hint}") from error
    stage = recipe["stages"][saved.directory.parents[1].name]
    wanted = [model.resolution, *stage["student_resolutions"], *_others(encoder, model.resolution)]
    return [
        torch.stack(
            [torch.from_numpy(resize(canvas, side)).permute(2, 0, 1).float() for canvas in canvases]
        )
        for side in dict.fromkeys(wanted)
    ]


def _others(encoder: Encoder, resolution: int) -> list[int]:
    """Return another side that a network takes, near a resolution; none where it takes one."""
    other = (resolution // encoder.stride + 1) * encoder.stride
    try:
        encoder.check_resolution(other)
    except BadInput:
        return []
    return [other]
