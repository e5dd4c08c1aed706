"""What weights have on record: timm's pretrained_cfg, open_clip's preprocessing."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from eupe.errors import BadInput
from eupe.spec import EncoderSpec, Triple

PUBLISHED = ("hub", "hf-hub", "file", "package", "sha256")
"""Kinds of weights that somebody trained as their architecture's record says; ours, or none of it,
are not among them."""


def normalisation(spec: EncoderSpec, weights: str) -> tuple[Triple, Triple] | None:
    """Return the pixel mean and std that an architecture's published weights were trained with.

    Args:
        spec: the network; what it says of pixels is not looked at.
        weights: their URI; `hub:<tag>` names one of several records, and a folder may hold its
            own.

    Returns:
        mean and std on the [0, 1] scale; None if there is no record.

    Raises:
        BadInput: a repository of the Hugging Face hub cannot be asked for its record.
    """
    record = on_record(spec, weights)
    if "mean" not in record or "std" not in record:
        return None
    return _triple(record["mean"]), _triple(record["std"])


def centre_share(spec: EncoderSpec, weights: str) -> float:
    """Return which share of a picture's shorter side published weights are shown: 1 if unsaid."""
    return min(1.0, float(on_record(spec, weights).get("crop_pct") or 1.0))


def licence(spec: EncoderSpec, weights: str) -> str | None:
    """Return the licence that timm's record states of published weights; None if it states none.

    Only of timm's own download: a file or a package may be anybody's.
    """
    if weights.partition(":")[0] != "hub":
        return None
    return on_record(spec, weights).get("license")


def on_record(spec: EncoderSpec, weights: str) -> dict[str, Any]:
    """Return what the library has on record of published weights; nothing: {}."""
    scheme, _, place = weights.partition(":")
    if scheme not in PUBLISHED:
        return {}
    if scheme == "file" and (own := _beside(Path(place))) is not None:
        return own
    if scheme == "hf-hub" and (own := _in_repository(place)) is not None:
        return own
    tag = place if scheme == "hub" else ""
    if spec.library == "open_clip":
        import open_clip  # seconds, see `eupe.networks`

        tags = open_clip.list_pretrained_tags_by_model(spec.architecture)
        chosen = tag or (tags[0] if tags else "")
        return dict(open_clip.pretrained.get_pretrained_cfg(spec.architecture, chosen))
    if spec.library != "timm":
        return {}
    architecture, own = timm.models.split_model_name_tag(spec.architecture)
    named = tag or own
    try:
        known = timm.get_pretrained_cfg(f"{architecture}.{named}" if named else architecture)
    except RuntimeError:  # no such tag: whoever loads it says so
        return {}
    return {} if known is None else dict(known.to_dict())


_RECORDS = (
    ("open_clip_config.json", "preprocess_cfg", "mean", "std"),
    ("config.json", "pretrained_cfg", "mean", "std"),
    ("preprocessor_config.json", None, "image_mean", "image_std"),
)
"""Where a snapshot of the Hugging Face hub says it: open_clip's, timm's and transformers' files."""


@cache
def _in_repository(place: str) -> dict[str, Any] | None:
    """Return what a repository of the hub has on record; None if it says nothing of pixels.

    Its weights may have been trained otherwise than the architecture's usual ones.
    """
    repository, _, revision = place.partition("@")
    out_of_reach = None
    for name, *_ in _RECORDS:
        try:
            file = huggingface_hub.hf_hub_download(repository, name, revision=revision or None)
        except (OSError, HFValidationError) as error:
            out_of_reach = error
        except EntryNotFoundError:
            continue
        else:
            if (own := _beside(Path(file).parent)) is not None:
                return own
    if out_of_reach is not None:
        raise BadInput(
            f"weights 'hf-hub:{place}': which pixel mean and std they were trained with cannot be "
            f"asked there ({type(out_of_reach).__name__}); name encoder.pixel_mean and "
            "encoder.pixel_std, or ask once where there is a network"
        ) from out_of_reach
    return None


def _beside(folder: Path) -> dict[str, Any] | None:
    """Return what a folder of weights itself has on record; None if it says nothing of pixels."""
    for name, inside, mean, std in _RECORDS:
        if not (folder / name).is_file():
            continue
        try:
            said = json.loads((folder / name).read_bytes())
            record = said if inside is None else said[inside]
            values = (tuple(float(value) for value in record[each]) for each in (mean, std))
            return {**record, "mean": _triple(next(values)), "std": _triple(next(values))}
        except (ValueError, KeyError, TypeError):  # of another kind: it says nothing of pixels
            continue
    return None


def _triple(values: tuple[float, ...]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
