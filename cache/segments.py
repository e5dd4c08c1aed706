"""Segments: Arrow files that are named by their content, written once and never changed.

<version>-<digest>.arrow   version of the HEAD that names it first (cache/heads.py)
"""

import hashlib
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from cache.errors import Corrupt, StoreError
from cache.files import atomic, place
from cache.files.mapped import MappedFile
from cache.format import arrow_tables, on_disk

DIGEST_DIGITS = 16
Columns: TypeAlias = pa.Schema | Callable[[pa.Schema], bool]
"""Columns of a segment, or what tells whether a schema is theirs."""
_NAME = re.compile(rf"(\d+)-[0-9a-f]{{{DIGEST_DIGITS}}}\.arrow")


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


def version_of(name: str) -> int | None:
    """Return the version in the name of a segment; None if the name is no segment's."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def write_segment(directory: Path, version: int, table: pa.Table, scratch: Path) -> Segment:
    """Write a segment that the next HEAD will name.

    Its name has a digest of its content: committers that meet write different files, or one and
    the same.

    Args:
        directory: the folder.
        version: of that HEAD.
        table: its rows.
        scratch: for the file while it is written.
    """
    segment, pieces = packed(version, on_disk.combined(table, scratch))
    atomic.write(directory / segment.name, pieces, scratch)
    return segment


def packed(version: int, table: pa.Table) -> tuple[Segment, list[memoryview]]:
    """Return a segment of the HEAD of a version as it will be named, and its file in pieces."""
    pieces, digest = arrow_tables.to_pieces(table), hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    sha256 = digest.hexdigest()
    name = f"{version:08d}-{sha256[:DIGEST_DIGITS]}.arrow"
    return Segment(name=name, rows=table.num_rows, sha256=sha256), pieces


def map_segment(directory: Path, segment: Segment, schema: Columns) -> pa.Table:
    """Map a segment; columns are views of the file. See `open_segment`."""
    return open_segment(directory, segment, schema)[0]


def open_segment(directory: Path, segment: Segment, schema: Columns) -> tuple[pa.Table, MappedFile]:
    """Map a segment; columns are views of the file, none of whose pages are in memory yet.

    Args:
        directory: the folder.
        segment: as HEAD names it.
        schema: its columns, or what tells whether they are.

    Raises:
        NotBuilt: there is no such file.
        Corrupt: it is not what HEAD names.
    """
    path = directory / segment.name

    def compared(local: Path) -> MappedFile:
        file = MappedFile(local)
        if hashlib.sha256(file.bytes.data).hexdigest() != segment.sha256:
            raise Corrupt(f"{local}: contents do not match the recorded sha256")
        return file

    file = place.using(path, compared, sha256=segment.sha256)
    table = arrow_tables.parse_table(pa.py_buffer(file.bytes), str(path))
    if table.num_rows != segment.rows or not _fits(table, schema):
        raise Corrupt(f"{path}: not the segment its HEAD describes")
    file.forget()
    return table, file


def _fits(table: pa.Table, schema: Columns) -> bool:
    return bool(schema(table.schema) if callable(schema) else table.schema == schema)


def whole_segments(
    directory: Path, named: Iterable[Segment], schema: Columns
) -> dict[str, tuple[Segment, pa.Table]]:
    """Return the segments that lie in a folder and are whole, named by a HEAD or not, by name.

    Args:
        directory: the folder.
        named: those of which a HEAD knows the checksum; of others their name tells it.
        schema: their columns, or what tells whether they are.
    """
    known = {segment.name: segment.sha256 for segment in named}
    whole = {}
    for path in sorted(directory.glob("*.arrow")):
        if version_of(path.name) is None:
            continue
        with suppress(StoreError, OSError):
            content = arrow_tables.map_file(path, sha256=known.get(path.name))
            sha256 = hashlib.sha256(content).hexdigest()
            table = arrow_tables.parse_table(content, str(path))
            digest = path.stem.partition("-")[2]
            if sha256.startswith(digest) and _fits(table, schema):
                segment = Segment(name=path.name, rows=table.num_rows, sha256=sha256)
                whole[path.name] = segment, table
    return whole


def check_pinned(path: Path, content: bytes | pa.Buffer, sha256: str) -> None:
    """Compare a file's contents with the checksum that HEAD pins.

    Raises:
        Corrupt: they are another file's.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Corrupt(f"{path}: contents do not match the sha256 in HEAD; restore the file")
