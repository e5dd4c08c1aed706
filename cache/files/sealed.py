"""JSON files that hold a checksum of themselves: one bit that is not as it was written shows."""

import hashlib
import json
import re
from collections.abc import Mapping

UNKNOWN = "0" * 64


def seal(said: Mapping[str, object], name: str) -> bytes:
    """Return a JSON file with a field more: the sha256 of the file as it is with zeros there.

    Args:
        said: plain data; equal data, equal bytes.
        name: of the field.
    """
    text = json.dumps({**said, name: UNKNOWN}, indent=2, sort_keys=True)
    blank = text.encode() + b"\n"
    return _with(blank, _place(blank, name), hashlib.sha256(blank).hexdigest())


def is_whole(content: bytes, name: str) -> bool:
    """Return True if a JSON file is what its own checksum says, in whatever formatting."""
    place = _place(content, name)
    blank = _with(content, place, UNKNOWN)
    return place is not None and hashlib.sha256(blank).hexdigest() == place[1].decode()


def _place(content: bytes, name: str) -> "re.Match[bytes] | None":
    return re.search(rb'"%s":\s*"([0-9a-f]{64})"' % name.encode(), content)


def _with(content: bytes, place: "re.Match[bytes] | None", checksum: str) -> bytes:
    """Return a file with another checksum in the place of its own, if it has one."""
    if place is None:
        return content
    return content[: place.start(1)] + checksum.encode() + content[place.end(1) :]
