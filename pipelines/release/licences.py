"""What a student may be used for: it follows from its teachers' licences and its pictures'.

No legal advice. A licence is what a recipe says of a teacher, a network's first weights or a
data set, or what timm's record says of weights that it downloads itself; else it is not known.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eupe.preprocessing import licence
from eupe.spec import EncoderSpec
from pipelines.recipe.config import PROXY

PERMISSIVE = frozenset(
    [
        "apache-2.0",
        "bsd-2-clause",
        "bsd-3-clause",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc0-1.0",
        "isc",
        "mit",
        "mit-0",
        "pddl-1.0",
        "unlicense",
        "zlib",
    ]
)
"""SPDX names of licences that let anybody do anything, at most with a notice."""
NON_COMMERCIAL = re.compile(
    r"non-?\s?commercial|research[ -]only|(^|[ -])nc([ -]|$)", re.IGNORECASE
)
PICTURES = "pictures"
"""Role of a data set; any other is that of weights."""
OTHER = "other"
"""How model hubs call what is none of their names."""


class Source(NamedTuple):
    """Something that a student was made from, and its licence; None: not known."""

    role: str
    name: str
    licence: str | None


class Verdict(NamedTuple):
    """What follows for a student.

    Attributes:
        licence: a hub's word for it: an SPDX name in small letters, or OTHER.
        words: one sentence or two.
        sources: what it follows from.
    """

    licence: str
    words: str
    sources: tuple[Source, ...]


def sources(recipe: Mapping[str, Any]) -> tuple[Source, ...]:
    """List what the students of a recipe (plain data, as a checkpoint has it) are made from.

    The proxy hands on what its own teachers are; a teacher that no stage names is left out.
    """
    named = {name for stage in recipe["stages"].values() for name in stage["teachers"]} - {PROXY}
    taught = {name: teacher for name, teacher in recipe["teachers"].items() if name in named}
    found = [Source("teacher", name, _of_weights(teacher)) for name, teacher in taught.items()]
    begun = [(role, recipe.get(role)) for role in ("proxy", "student")]
    found += [
        Source(f"first weights of the {role}", named_weights(each["weights"]), _of_weights(each))
        for role, each in begun
        if each and each.get("weights")
    ]
    found += [
        Source(PICTURES, name, dataset.get("licence")) for name, dataset in recipe["train"].items()
    ]
    return tuple(found)


def follows(found: Sequence[Source]) -> Verdict:
    """Say what a student may be used for that was made from these."""
    barred = [each for each in found if each.licence and NON_COMMERCIAL.search(each.licence)]
    unknown = [each for each in found if each.licence is None]
    bound = [
        each
        for each in found
        if each.licence and each not in barred and each.licence.lower() not in PERMISSIVE
    ]
    words = []
    if barred:
        words.append(f"Not for commercial use: {_listed(barred)}.")
    if unknown:
        words.append(f"Not known: the licence of {_listed(unknown)}; ask before you rely on it.")
    if bound:
        words.append(f"Under conditions that are to be read: {_listed(bound)}.")
    if words:
        return Verdict(OTHER, " ".join(words), tuple(found))
    named = sorted({each.licence.lower() for each in found if each.licence})
    single = named[0] if len(named) == 1 else OTHER
    return Verdict(
        single,
        f"All that it was made from may be used commercially, with notices: {', '.join(named)}.",
        tuple(found),
    )


def named_weights(uri: str) -> str:
    """Return a URI of weights without the place on somebody's disk that it may name."""
    scheme, colon, place = uri.partition(":")
    return f"{scheme}{colon}{Path(place).name if scheme in ('file', 'checkpoint') else place}"


def _of_weights(network: Mapping[str, Any]) -> str | None:
    """Return what is said of a teacher's or a network's weights, else what timm has on record."""
    said: str | None = network.get("licence")
    return said or licence(EncoderSpec.model_validate(network["encoder"]), network["weights"])


def _listed(found: Sequence[Source]) -> str:
    return ", ".join(
        f"{each.role} {each.name}{f' ({each.licence})' if each.licence else ''}" for each in found
    )
