"""Fingerprints: sha256 over a spec's canonical JSON, and the difference between two specs."""

import hashlib
import json
import math
from collections.abc import Mapping

from eupe.errors import BadInput

SHORT_LENGTH = 12


def canonical_json(value: object) -> bytes:
    """Encode plain data as JSON in the one form that is hashed: sorted keys, no spaces, UTF-8.

    Args:
        value: nested mappings with string keys, lists, tuples, strings, ints, floats, bools, None.

    Raises:
        BadInput: a float that is not finite, a key that is no string, or a type whose text form
            is not stable (sets, objects).
    """
    _refuse_unstable(value, "$")
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fingerprint(value: object) -> str:
    """Return the sha256 of the canonical JSON of plain data, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def short(full: str) -> str:
    """Return the part of a fingerprint that names directories."""
    return full[:SHORT_LENGTH]


def difference(ours: object, theirs: object, path: str = "") -> list[str]:
    """List the fields in which two plain-data specs differ, one `path: ours != theirs` each.

    In the order in which they are declared: a codec's name comes before what follows from it.
    """
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        lines = []
        for key in dict.fromkeys([*ours, *theirs]):
            where = f"{path}.{key}" if path else str(key)
            if key not in ours or key not in theirs:
                side = "only there" if key not in ours else "only here"
                lines.append(f"{where}: {side}")
            else:
                lines += difference(ours[key], theirs[key], where)
        return lines
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        same = len(ours) == len(theirs) and not any(
            difference(a, b) for a, b in zip(ours, theirs, strict=True)
        )
    else:
        same = type(ours) is type(theirs) and ours == theirs
    return [] if same else [f"{path or '$'}: {ours!r} != {theirs!r}"]


def _refuse_unstable(value: object, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise BadInput(f"{path}: key {key!r} is not a string, so it has no stable form")
            _refuse_unstable(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _refuse_unstable(item, f"{path}[{index}]")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise BadInput(f"{path}: {value} is not finite and has no JSON form")
    elif not isinstance(value, str | int | bool | None):
        raise BadInput(f"{path}: {type(value).__name__} has no stable JSON form")
