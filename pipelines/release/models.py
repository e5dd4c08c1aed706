"""Models as somebody names them: a run, an exported folder, a timm or an open_clip name.

Whatever the name, a model is a network, the URI of its weights and how pictures go in: what a
recipe says of a teacher. Nothing is loaded here.
"""

import difflib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import open_clip
import timm
from pydantic import Field, ValidationError

from cache.files import copies
from cache.files.bucket_path import is_uri
from eupe.encoders import native_resolution, shapes
from eupe.errors import BadInput
from eupe.preprocessing import centre_share, normalisation
from eupe.spec import CentreView, EncoderSpec, Library, Spec, SummaryKind
from pipelines.records import checkpoint
from pipelines.records.checkpoint import Checkpoint
from pipelines.training import outputs

RECORD, WEIGHTS = "encoder.json", "model.safetensors"
"""What an exported folder says of itself, and its tensors under the network's own names."""
FORMAT = 1
STAGES = ("stage3", "stage2", "stage1")
"""From the last: what a run is exported from where no stage is named."""
SUMMARIES: tuple[SummaryKind, ...] = (
    "class_token",
    "attention_pool",
    "average_pool",
    "mean_patches",
)
"""In the order in which a network that only has a name is asked for them."""


class Model(Spec):
    """A frozen encoder, where its weights are, and how pictures go in."""

    name: str = Field(description="as it was named")
    encoder: EncoderSpec
    weights: str = Field(description="a URI of eupe.weights")
    views: CentreView = Field(description="what is cut out of a picture")
    resolution: int = Field(description="side of the network's input, pixels")


def named(name: str, weights: str | None = None, stage: str | None = None) -> Model:
    """Return the model of that name.

    Args:
        name: a run directory, a folder that `eupe export` wrote, or timm's or open_clip's name of
            a network (`vit_small_patch16_dinov3.lvd1689m`, `ViT-B-32:openai`).
        weights: of a network of timm or open_clip; None: its own download.
        stage: of a run; None: the last that has a checkpoint.

    Raises:
        BadInput: there is no such thing, naming the nearest; or a stage or weights are named where
            they cannot be.
    """
    folder = outputs.here(name) if is_uri(name) else Path(name).expanduser()
    if folder.is_dir():
        if weights is not None:
            raise BadInput(f"--weights {weights}: {name} is a folder, which has its own")
        if (folder / RECORD).is_file():
            if stage is not None:
                raise BadInput(f"--stage {stage}: {name} is an exported student, of one stage")
            return _exported(name, folder)
        return of_run(name, trained(folder, stage))
    if stage is not None:
        raise BadInput(f"--stage {stage}: there is no run directory {name}")
    architecture, _, tag = name.partition(":")
    if timm.is_model(architecture) and not tag:
        return _known("timm", architecture, weights or "hub")
    if open_clip.get_model_config(architecture) is not None:
        return _known("open_clip", architecture, weights or (f"hub:{tag}" if tag else "hub"))
    near = difflib.get_close_matches(name, [*timm.list_models(), *open_clip.list_models()], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise BadInput(
        f"no model {name!r}: wants a run directory, a folder that `eupe export` wrote, or timm's "
        f"or open_clip's name of a network{hint}"
    )


def at(model: Model, resolution: int | None) -> Model:
    """Return a model that is read at another resolution (pixels), cutting pictures as large.

    Raises:
        BadInput: the network does not take it.
    """
    if resolution is None:
        return model
    shapes(model.encoder, resolution)
    views = model.views.model_copy(update={"canvas": max(resolution, model.views.canvas)})
    return model.model_copy(update={"resolution": resolution, "views": views})


def trained(run: Path, stage: str | None) -> Checkpoint:
    """Return the newest checkpoint of a stage of a run; None: of the last that has one.

    Raises:
        BadInput: there is none.
    """
    for name in STAGES if stage is None else (stage,):
        if (found := checkpoint.latest(run / name)) is not None:
            return found
    asked = "no checkpoint of any stage" if stage is None else f"no checkpoint of {stage}"
    raise BadInput(
        f"{copies.named(run)}: {asked} there; wants the run_directory of a recipe that was trained"
    )


def of_run(name: str, saved: Checkpoint) -> Model:
    """Return what a stage has trained, read as its run reads the held-out pictures."""
    recipe: Any = saved.recipe
    return Model(
        name=name,
        encoder=EncoderSpec.model_validate(saved.identity["student"]),
        weights=f"checkpoint:{saved.directory}",
        views=CentreView.model_validate(recipe["held_out_views"]),
        resolution=recipe["evaluation"]["resolution"],
    )


def _exported(name: str, folder: Path) -> Model:
    path = folder / RECORD
    try:
        said = json.loads(path.read_text())
        if said["format"] != FORMAT:
            raise BadInput(f"{path}: format {said['format']!r}; this version reads {FORMAT}")
        fields = {field: said[field] for field in ("encoder", "views", "resolution")}
        return Model(name=name, weights=f"file:{folder / WEIGHTS}", **fields)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: is no record of an exported student: {error}") from error


def _known(library: Library, architecture: str, weights: str) -> Model:
    """Return a network that a library knows, read as the record of its weights says."""
    bare = EncoderSpec(library=library, architecture=architecture)
    fields: dict[str, Any] = {"summary": _summary(bare)}
    if (pixels := normalisation(bare, weights)) is not None:
        fields |= {"pixel_mean": pixels[0], "pixel_std": pixels[1]}
    encoder = bare.model_copy(update=fields)
    side = native_resolution(encoder)
    views = CentreView(canvas=side, share=centre_share(encoder, weights))
    return Model(name=architecture, encoder=encoder, weights=weights, views=views, resolution=side)


def _summary(spec: EncoderSpec) -> SummaryKind:
    """Return the first of SUMMARIES that a network has.

    Raises:
        BadInput: it has none, or its tokens cannot be read.
    """
    for kind in SUMMARIES[:-1]:
        with suppress(BadInput):
            native_resolution(spec.model_copy(update={"summary": kind}))
            return kind
    native_resolution(spec.model_copy(update={"summary": SUMMARIES[-1]}))
    return SUMMARIES[-1]
