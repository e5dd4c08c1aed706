"""The index of an image source: its samples, each image's digest and size read once.

A source is a folder, WebDataset tars or Parquet files; the three forms of the same images give the
same sample ids. A sample is addressed by (`uri`, `offset`, `bytes`): for files and tars the span
of bytes in the file `uri`; for Parquet see `pipelines.images.parquet`.
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable, Collection, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import polars as pl
from PIL import Image, UnidentifiedImageError

from cache.files import place
from eupe.errors import BadInput
from eupe.views import DECODER_ERRORS, FORMATS, ImageError
from pipelines.images import parquet, walks
from pipelines.images.walks import Candidate, Walk
from pipelines.machines.progress import track
from pipelines.recipe.config import SourceConfig

WALKS: dict[str, Walk] = {
    "folder": walks.folder,
    "webdataset": walks.webdataset,
    "parquet": parquet.walk,
}
WINDOW = 256  # candidates in memory at once while indexing
_EXIF_ORIENTATION = 0x0112
_EXIF_TURNED = (5, 6, 7, 8)
RECORD_SCHEMA: dict[str, type[pl.DataType]] = {
    "sample_id": pl.String,
    "uri": pl.String,
    "offset": pl.Int64,
    "bytes": pl.Int64,
    "digest": pl.String,
    "width": pl.Int32,
    "height": pl.Int32,
    "labels": pl.String,
}
FAILURE_SCHEMA: dict[str, type[pl.DataType]] = {
    "sample_id": pl.String,
    "uri": pl.String,
    "offset": pl.Int64,
    "reason": pl.String,
}


@dataclass(frozen=True)
class Part:
    """Samples of a source that follow each other in its order.

    Attributes:
        records: samples whose header reads as an image (RECORD_SCHEMA), in the source's order;
            `digest` is the sha256 of the bytes, width and height are of the upright picture.
        failures: what was left out, each with its reason (FAILURE_SCHEMA).
        known: samples left out because the caller has them already.
    """

    records: pl.DataFrame
    failures: pl.DataFrame
    known: int

    def __len__(self) -> int:
        """Images looked at."""
        return len(self.records) + len(self.failures) + self.known


def index(
    config: SourceConfig,
    known: Collection[str] = frozenset(),
    threads: int = 4,
    part_rows: Callable[[int], int] = lambda there: sys.maxsize,
) -> Generator[Part, None, None]:
    """List the samples of a source, reading every image's bytes once for digest and header.

    Args:
        config: where the images lie, and which of them are wanted (`where`).
        known: sample ids to leave out, unread.
        threads: of reading and hashing.
        part_rows: samples there are -> records of the next part; the last one, which always comes,
            has fewer.

    Raises:
        BadInput: nothing is there, nothing in it is an image or is wanted, a file is not of its
            kind, a column is missing, or two images share a sample_id.
    """
    total, candidates = WALKS[config.kind](config, known)
    records: list[tuple[object, ...]] = []
    failures: list[tuple[object, ...]] = []
    seen: dict[str, str] = {}
    num_known, num_there = 0, len(known)
    wanted = (c for c in candidates if config.where.items() <= c.labels.items())
    with (
        track(total, f"Indexing {config.path}") as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        while window := list(islice(wanted, WINDOW)):
            for candidate in window:
                where = f"{candidate.uri} at {candidate.offset}"
                if candidate.sample_id in seen:
                    raise BadInput(
                        f"{config.path}: sample_id {candidate.sample_id!r} is both "
                        f"{seen[candidate.sample_id]} and {where}; the path without its extension "
                        "must be unique"
                    )
                seen[candidate.sample_id] = where
            fresh = [c for c in window if c.sample_id not in known]
            num_known += len(window) - len(fresh)
            for candidate, found in zip(fresh, pool.map(_inspect, fresh), strict=True):
                address = candidate.sample_id, candidate.uri, candidate.offset
                if isinstance(found, str):
                    failures.append((*address, found))
                else:
                    labels = json.dumps(candidate.labels, ensure_ascii=False, sort_keys=True)
                    records.append((*address, candidate.num_bytes, *found, labels))
            progress.advance(len(window))
            while len(records) >= (count := part_rows(num_there)):
                yield _part(records[:count], failures, num_known)
                records, failures, num_known = records[count:], [], 0
                num_there += count
    if not seen:
        kept = f" with {dict(config.where)}" if config.where else ""
        raise BadInput(f"{config.path}: no image{kept} in this {config.kind} source")
    yield _part(records, failures, num_known)


def _part(
    records: list[tuple[object, ...]], failures: list[tuple[object, ...]], known: int
) -> Part:
    return Part(
        pl.DataFrame(records, RECORD_SCHEMA, orient="row"),
        pl.DataFrame(failures, FAILURE_SCHEMA, orient="row"),
        known,
    )


def _inspect(candidate: Candidate) -> tuple[str, int, int] | str:
    """Return (digest, width, height) of a candidate, or why it is no usable image."""
    if candidate.fault:
        return candidate.fault
    try:
        data = candidate.data
        if data is None:
            data = place.root(candidate.uri).read_bytes()
        return (hashlib.sha256(data).hexdigest(), *_upright_size(data))
    except (ImageError, OSError) as error:
        return str(error)


def _upright_size(data: bytes) -> tuple[int, int]:
    """Read width and height, as displayed, from an image's header."""
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            # The base class's: PNG's own decodes all pixels in search of EXIF data after them.
            exif = Image.Image.getexif(image)
            turned = exif.get(_EXIF_ORIENTATION, 1) in _EXIF_TURNED
    except UnidentifiedImageError as error:
        raise ImageError(f"{len(data)} bytes are in no image format known here") from error
    except DECODER_ERRORS as error:
        raise ImageError(f"the image's header cannot be read: {error}") from error
    return (height, width) if turned else (width, height)
