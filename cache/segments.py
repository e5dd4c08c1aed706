"""A folder of Arrow segments under a HEAD: how samples and manifests grow without being rewritten.

    <segment>.arrow, ...   written once, never changed
    HEAD                   JSON, a `Head`: names the segments that count, with their checksums, and
                           has its own; replaced last, by whoever has read the one that is there

What HEAD does not name does not exist: a killed writer leaves a segment that nobody sees.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from cache.errors import Corrupt
from cache.files import atomic
from cache.format import arrow_tables, layout

CHECKSUM, UNKNOWN = "head_sha256", "0" * 64
"""Field of a HEAD: the sha256 of the file as it is with zeros in this place."""
_CHECKSUM_LINE = re.compile(rb'"head_sha256":\s*"([0-9a-f]{64})"')


class Segment(BaseModel):
    """A segment as HEAD names it.

    Attributes:
        name: of its file.
        rows: in it.
        sha256: of its file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: int
    sha256: str


class Head(BaseModel):
    """What every HEAD says.

    Attributes:
        format: of the cache root.
        segments: those that count, oldest first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    segments: tuple[Segment, ...] = ()

    def to_bytes(self) -> bytes:
        """Return the HEAD file, its checksum in it: equal heads, equal bytes."""
        said = self.model_dump(mode="json") | {CHECKSUM: UNKNOWN}
        blank = json.dumps(said, indent=2, sort_keys=True).encode() + b"\n"
        place = _CHECKSUM_LINE.search(blank)
        assert place is not None
        return _with(blank, place, hashlib.sha256(blank).hexdigest())

    @model_validator(mode="before")
    @classmethod
    def _without_checksum(cls, said: object) -> object:
        """Leave out what is said of the file: heads that say the same are equal."""
        if not isinstance(said, dict):
            return said
        return {name: value for name, value in said.items() if name != CHECKSUM}


H = TypeVar("H", bound=Head)


class HeadFile(NamedTuple, Generic[H]):
    """A HEAD as read: what it says, and the bytes that its next writer expects to find."""

    head: H
    content: bytes


def read_head(directory: Path, kind: type[H]) -> HeadFile[H] | None:
    """Read the HEAD of a folder; None if it has none.

    Raises:
        Corrupt: it is no HEAD of that kind, or not as it was written.
    """
    path = directory / layout.HEAD
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        head = kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "all of it"
        raise Corrupt(f"{path}: no HEAD of format 1 ({where}: {first['msg']})") from error
    place = _CHECKSUM_LINE.search(content)
    blank = b"" if place is None else _with(content, place, UNKNOWN)
    if place is None or hashlib.sha256(blank).hexdigest() != place[1].decode():
        raise Corrupt(f"{path}: contents do not match the {CHECKSUM} in it; restore the file")
    return HeadFile(head, content)


def swap_head(directory: Path, head: H, there: HeadFile[H] | None, scratch: Path) -> HeadFile[H]:
    """Replace the HEAD that was read (None: there was none) and return the new one.

    Locally the caller holds `atomic.only_writer` since it has read HEAD; a bucket compares itself.

    Raises:
        Busy: another process has replaced it in the bucket.
        StoreError: it cannot be written.
    """
    content = head.to_bytes()
    expected = None if there is None else there.content
    atomic.swap(directory / layout.HEAD, content, expected, scratch)
    return HeadFile(head, content)


def write_segment(directory: Path, stem: str, table: pa.Table, scratch: Path) -> Segment:
    """Write a segment that the next HEAD will name.

    Args:
        directory: the folder.
        stem: of its name; it may get a number, see `atomic.write_new`.
        table: its rows.
        scratch: for the file while it is written.
    """
    content = arrow_tables.to_bytes(table)
    name, written = atomic.write_new(directory / f"{stem}.arrow", content, scratch)
    return Segment(name=name, rows=table.num_rows, sha256=written.sha256)


def map_segment(directory: Path, segment: Segment, schema: pa.Schema) -> pa.Table:
    """Map a segment; columns are views of the file.

    Args:
        directory: the folder.
        segment: as HEAD names it.
        schema: its columns.

    Raises:
        NotBuilt: there is no such file.
        Corrupt: it is not what HEAD names.
    """
    path = directory / segment.name
    buffer = arrow_tables.map_file(path, sha256=segment.sha256)
    table = arrow_tables.parse_table(buffer, str(path))
    if table.num_rows != segment.rows or table.schema != schema:
        raise Corrupt(f"{path}: not the segment its HEAD describes")
    return table


def _with(content: bytes, place: re.Match[bytes], checksum: str) -> bytes:
    """Return a HEAD file with another checksum in the place of its own."""
    return content[: place.start(1)] + checksum.encode() + content[place.end(1) :]


def files(directory: Path, head: Head) -> list[tuple[Path, str]]:
    """Return path and sha256 of every segment."""
    return [(directory / segment.name, segment.sha256) for segment in head.segments]


def check_pinned(path: Path, content: bytes | pa.Buffer, sha256: str) -> None:
    """Compare a file's contents with the checksum that HEAD pins.

    Raises:
        Corrupt: they are another file's.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Corrupt(f"{path}: contents do not match the sha256 in HEAD; restore the file")
