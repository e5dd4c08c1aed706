"""The index of an image source: its samples, each image's digest and header read once.

A source is a folder, WebDataset tars or Parquet files; the three forms of the same images give the
same sample ids. A sample is addressed by (`uri`, `offset`, `bytes`): for files and tars the span
of bytes in the file `uri`; for Parquet see `pipelines.images.parquet`. All of it is relative to the
source (`walks.base`), which may lie elsewhere tomorrow.

A source is walked piece by piece. A piece is recognised by its size and stamp: whoever has looked
at it needs not open it again.
"""

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow as pa
from PIL import UnidentifiedImageError

from cache.format.sample_table import GIVEN, SOURCES
from eupe.errors import BadInput
from eupe.profiles import other_than_srgb
from eupe.views import DECODER_ERRORS, ImageError, opened
from pipelines.images import folders, parquet, tars, warned
from pipelines.images.aside import PROFILES, Aside
from pipelines.images.classes import Classes
from pipelines.images.walks import Candidate, Piece, Walk
from pipelines.machines.progress import track
from pipelines.recipe.config import SourceConfig

WALKS: dict[str, Walk] = {
    "folder": Walk(None, lambda piece: piece.num_images, folders.candidates),
    "webdataset": Walk(tars.SUFFIX, lambda piece: None, tars.candidates),
    "parquet": Walk(parquet.SUFFIX, parquet.num_rows, parquet.candidates),
}
PART_IMAGES = 100_000
"""Images that are looked at before what was found is handed on: what a kill can cost."""
LATER_FIELDS = ("key", "image_member", "classes")
"""Of SourceConfig, added after format 1: at their defaults they change no stamp."""
WINDOW = 256  # candidates in memory at once while indexing
Failure = tuple[str, str, int, str]
"""An image that was left out: sample_id, uri, offset and the reason."""


@dataclass(frozen=True)
class Part:
    """What was found in some pieces of a source.

    Attributes:
        records: samples whose header reads as an image (GIVEN), in the source's order.
        sources: the pieces (SOURCES), with what was left out of each.
    """

    records: pa.Table
    sources: pa.Table


def check_there(config: SourceConfig) -> None:
    """Refuse a source that is not there; no folder is listed for it.

    Raises:
        BadInput: naming it.
    """
    folders.check_there(config, WALKS[config.kind].suffix)


def check_readable(config: SourceConfig) -> None:
    """Read one picture of a source, the first that is found, whichever are asked for (`where`).

    Raises:
        BadInput: there is none, or why it cannot be read.
    """
    suffix, aside = WALKS[config.kind].suffix, Aside()
    if suffix is None:
        piece = folders.first_piece(config, aside)
    else:
        piece = folders.file_pieces(config, suffix, aside)[0]
    anything = config.model_copy(update={"where": {}})
    candidates = WALKS[config.kind].candidates(anything, piece, aside)
    first = next(candidates, None)
    found = "no picture in it" if first is None else _inspect(first)
    if isinstance(found, str):
        raise BadInput(f"{config.path}: {piece.uri if first is None else first.uri}: {found}")


def pieces(config: SourceConfig, aside: Aside | None = None) -> list[Piece]:
    """List the pieces of a source, opening none.

    A stamp here is of the contents and of how they are read: asked for other labels, say, the
    same file is another piece.

    Args:
        config: where the images lie, and how they are named.
        aside: is told of what is no piece.

    Raises:
        BadInput: nothing is there.
    """
    suffix, aside = WALKS[config.kind].suffix, aside or Aside()
    if suffix is None:
        found = folders.pieces(config, aside)
    else:
        found = folders.file_pieces(config, suffix, aside)
    rule = _rule(config)
    return [
        piece._replace(stamp=hashlib.sha256(f"{rule}\n{piece.stamp}".encode()).hexdigest()[:32])
        for piece in found
    ]


def look(
    config: SourceConfig,
    wanted: Sequence[Piece],
    threads: int = 4,
    num_others: int = 0,
    aside: Aside | None = None,
) -> Generator[Part, None, None]:
    """List the samples of some pieces, reading every image's bytes once for digest and header.

    Args:
        config: where the images lie, and which of them are wanted (`where`).
        wanted: of `pieces`.
        threads: of reading and hashing.
        num_others: pieces of the source that were looked at before.
        aside: is told of what is no image.

    Yields:
        whole pieces, at least PART_IMAGES images together but for the last.

    Raises:
        BadInput: nothing in it is an image or is wanted, a file is not of its kind, or a column is
            missing.
    """
    walk, aside = WALKS[config.kind], aside or Aside()
    counts = [] if config.where else [walk.num_images(piece) for piece in wanted]
    total = None if config.where or None in counts else sum(filter(None, counts))
    records: list[pa.Table] = []
    sources: list[tuple[str, int, str, str]] = []
    classes, num_seen, num_waiting = Classes(), 0, 0
    with (
        track(total, f"Indexing {config.path}") as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        for piece in wanted:
            failures: list[Failure] = []
            rows = _inspected(walk.candidates(config, piece, aside), pool, failures, aside)
            while found := list(islice(rows, PART_IMAGES)):
                columns = zip(*found, strict=True)
                records.append(pa.table([*map(list, columns)], schema=GIVEN))
                classes.add(records[-1]["sample_id"])
                progress.advance(len(found))
                num_waiting += len(found)
            progress.advance(len(failures))
            left_out = json.dumps(failures, ensure_ascii=False) if failures else ""
            sources.append((piece.uri, piece.bytes, piece.stamp, left_out))
            num_waiting += len(failures)
            if num_waiting >= PART_IMAGES:
                yield _part(records, sources)
                num_seen, num_waiting, records, sources = num_seen + num_waiting, 0, [], []
    if not num_seen + num_waiting + num_others:
        kept = f" with {dict(config.where)}" if config.where else ""
        others = "".join(f"; {line}" for line in aside.lines())
        raise BadInput(f"{config.path}: no image{kept} in this {config.kind} source{others}")
    if not num_others:
        classes.doubt(config, aside)
    if sources:
        yield _part(records, sources)


def whole(config: SourceConfig) -> Part:
    """List the samples of a source at once.

    Raises:
        BadInput: as `look`.
    """
    aside = Aside()
    parts = list(look(config, pieces(config, aside), aside=aside))
    columns = ([part.records for part in parts], [part.sources for part in parts])
    return Part(*(pa.concat_tables(tables) for tables in columns))


def failures(sources: pa.Table) -> list[Failure]:
    """Return what was left out of pieces (SOURCES), by sample id."""
    texts = filter(None, sources["failures"].to_pylist())
    return sorted((*failure,) for text in texts for failure in json.loads(text))


def with_failures(sources: pa.Table, more: Sequence[Failure]) -> pa.Table:
    """Return pieces (SOURCES) with more that was left out of them."""
    if not more:
        return sources
    rows = {row["uri"]: row for row in sources.to_pylist()}
    for failure in more:
        uri = failure[1]
        file = parquet.file_name(uri) if parquet.is_row(uri) else uri
        folder = f"{PurePosixPath(file).parent}/"
        row = rows[file if file in rows else folder]
        there = json.loads(row["failures"]) if row["failures"] else []
        row["failures"] = json.dumps([*there, failure], ensure_ascii=False)
    return pa.Table.from_pylist(list(rows.values()), SOURCES)


def _rule(config: SourceConfig) -> str:
    """Return how a source is read, as text; what was not asked in earlier versions is left out."""
    later = {name for name in LATER_FIELDS if getattr(config, name) == _default(name)}
    return config.model_dump_json(exclude={"path", *later})


def _default(name: str) -> object:
    return SourceConfig.model_fields[name].default


def _part(records: Sequence[pa.Table], sources: Sequence[tuple[str, int, str, str]]) -> Part:
    columns = [list(column) for column in zip(*sources, strict=True)]
    return Part(
        pa.concat_tables([GIVEN.empty_table(), *records]), pa.table(columns, schema=SOURCES)
    )


def _inspected(
    candidates: Iterator[Candidate], pool: ThreadPoolExecutor, failures: list[Failure], aside: Aside
) -> Iterator[tuple[str, str, int, int, bytes, str]]:
    """Look at candidates: yield the rows of those that are images, list the others."""
    while window := list(islice(candidates, WINDOW)):
        for candidate, found in zip(window, pool.map(_inspect, window), strict=True):
            address = candidate.sample_id, candidate.uri, candidate.offset
            if isinstance(found, str):
                failures.append((*address, found))
            else:
                labels = json.dumps(candidate.labels, ensure_ascii=False, sort_keys=True)
                if found.profile is not None:
                    aside.count(PROFILES, found.profile)
                yield (*address, candidate.num_bytes, found.digest, labels)


class _Image(NamedTuple):
    """What was seen of an image: its digest, and its colour profile if that is not sRGB's."""

    digest: bytes
    profile: str | None


def _inspect(candidate: Candidate) -> _Image | str:
    """Return what a candidate is, or why it is no usable image."""
    if candidate.fault:
        return candidate.fault
    try:
        data = candidate.data
        if data is None:
            assert candidate.file is not None  # it has either
            data = candidate.file.read_bytes()
        with warned.about(candidate.sample_id):
            profile = _profile(data)
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"the image cannot be read: {error.strerror}"
    return _Image(hashlib.sha256(data).digest(), profile)


def _profile(data: bytes) -> str | None:
    """Return the name of an image's colour profile, None where it is sRGB or there is none.

    Raises:
        ImageError: the bytes do not begin as an image does; saying why.
    """
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with opened(data) as image:
            return other_than_srgb(image.info.get("icc_profile"))
    except UnidentifiedImageError as error:
        raise ImageError(f"{len(data)} bytes are in no image format known here") from error
    except DECODER_ERRORS as error:
        raise ImageError(f"the image's header cannot be read: {error}") from error
