"""Looking at pieces of a source: each image's bytes are read once, for its digest and header."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import pyarrow as pa
from PIL import UnidentifiedImageError

from cache.format.sample_table import GIVEN, SOURCES
from eupe.errors import BadInput
from eupe.profiles import other_than_srgb
from eupe.views import DECODER_ERRORS, ImageError, opened
from pipelines.images import folders, parquet, tars, warned
from pipelines.images.aside import PROFILES, Aside
from pipelines.images.walks import Candidate, Piece, Walk
from pipelines.recipe.config import SourceConfig

WALKS: dict[str, Walk] = {
    "folder": Walk(None, lambda piece: piece.num_images, folders.candidates),
    "webdataset": Walk(tars.SUFFIX, lambda piece: None, tars.candidates),
    "parquet": Walk(parquet.SUFFIX, parquet.num_rows, parquet.candidates),
}
WINDOW = 256  # candidates in memory at once
BLOCK_IMAGES = 10_000
"""Images whose rows are Python objects at once."""
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


class Looked(NamedTuple):
    """A part, how many images were looked at for it, and what is no image."""

    part: Part
    num_images: int
    aside: Aside


class Looker:
    """Looks at pieces of a source; in other processes, too.

    Args:
        config: where the images lie, and which of them are wanted (`where`).
        threads: that read images which are files of their own; of others the walk over their file
            has read the bytes, and what is left to do for them one thread does fastest.
    """

    def __init__(self, config: SourceConfig, threads: int) -> None:
        self._config, self._threads = config, threads

    def look(self, pieces: Sequence[Piece]) -> Looked:
        """List the samples of some pieces.

        Raises:
            BadInput: a file is not of its kind or cannot be read, or a column is missing.
        """
        aside, walk = Aside(), WALKS[self._config.kind]
        records, sources, num_images = [GIVEN.empty_table()], [], 0
        with ThreadPoolExecutor(self._threads) as pool:
            for piece in pieces:
                failures: list[Failure] = []
                candidates = walk.candidates(self._config, piece, aside)
                rows = _inspected(candidates, pool, failures, aside)
                try:
                    while found := list(islice(rows, BLOCK_IMAGES)):
                        columns = [list(column) for column in zip(*found, strict=True)]
                        records.append(pa.table(columns, schema=GIVEN))
                        num_images += len(found)
                except OSError as error:
                    raise BadInput(
                        f"{piece.path}: it cannot be read ({error.strerror or error})"
                    ) from error
                num_images += len(failures)
                left_out = json.dumps(failures, ensure_ascii=False) if failures else ""
                sources.append((piece.uri, piece.bytes, piece.stamp, left_out))
        told = pa.table([list(column) for column in zip(*sources, strict=True)], schema=SOURCES)
        return Looked(Part(pa.concat_tables(records), told), num_images, aside)


def inspect(candidate: Candidate) -> "_Image | str":
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


class _Image(NamedTuple):
    """What was seen of an image: its digest, and its colour profile if that is not sRGB's."""

    digest: bytes
    profile: str | None


def _inspected(
    candidates: Iterator[Candidate], pool: ThreadPoolExecutor, failures: list[Failure], aside: Aside
) -> Iterator[tuple[str, str, int, int, bytes, str]]:
    """Look at candidates: yield the rows of those that are images, list the others."""
    while window := list(islice(candidates, WINDOW)):
        own_files = any(candidate.file is not None for candidate in window)
        seen = pool.map(inspect, window) if own_files else map(inspect, window)
        for candidate, found in zip(window, seen, strict=True):
            address = candidate.sample_id, candidate.uri, candidate.offset
            if isinstance(found, str):
                failures.append((*address, found))
            else:
                labels = json.dumps(candidate.labels, ensure_ascii=False, sort_keys=True)
                if found.profile is not None:
                    aside.count(PROFILES, found.profile)
                yield (*address, candidate.num_bytes, found.digest, labels)


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
