"""How pixels go in, by the weights' own record: timm's pretrained_cfg, open_clip's preprocess."""

import open_clip
import timm

from eupe.spec import EncoderSpec, Triple

PUBLISHED = ("hub", "file", "package", "sha256")
"""Kinds of weights that somebody trained as their architecture's record says; ours, or none of it,
are not among them."""


def normalisation(spec: EncoderSpec, weights: str) -> tuple[Triple, Triple] | None:
    """Return the pixel mean and std that an architecture's published weights were trained with.

    Args:
        spec: the network; what it says of pixels is not looked at.
        weights: their URI; `hub:<tag>` names one of several records.

    Returns:
        mean and std on the [0, 1] scale; None if there is no record.
    """
    scheme, _, place = weights.partition(":")
    if scheme not in PUBLISHED:
        return None
    tag = place if scheme == "hub" else ""
    if spec.library == "open_clip":
        tags = open_clip.list_pretrained_tags_by_model(spec.architecture)
        chosen = tag or (tags[0] if tags else "")
        record = open_clip.pretrained.get_pretrained_cfg(spec.architecture, chosen)
        if "mean" not in record or "std" not in record:
            return None
        return _triple(record["mean"]), _triple(record["std"])
    if spec.library != "timm":
        return None
    architecture, own = timm.models.split_model_name_tag(spec.architecture)
    named = tag or own
    try:
        known = timm.get_pretrained_cfg(f"{architecture}.{named}" if named else architecture)
    except RuntimeError:  # no such tag: whoever loads it says so
        return None
    return None if known is None else (_triple(known.mean), _triple(known.std))


def _triple(values: tuple[float, ...]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
