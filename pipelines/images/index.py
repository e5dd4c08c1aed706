"""Image sources: folders, WebDataset tars and Parquet files, indexed to samples and read again.

The three forms of the same images give the same sample ids. A sample is addressed by
(`uri`, `offset`, `bytes`): for files and tars the span of bytes in the file `uri`; for Parquet
`uri` is `parquet:<column>:<file>` and `offset` the row's number in that file.
"""

import hashlib
import io
import json
import struct
import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cache.errors import NotBuilt
from cache.files import place
from cache.files.bucket import BucketPath
from eupe.errors import BadInput
from eupe.spec import AugmentedView, CentreView
from eupe.views import ImageError, make_view
from pipelines.images.walks import PARQUET_SCHEME, WALKS, Candidate, image_bytes
from pipelines.machines.progress import track
from pipelines.recipe.config import SourceConfig

WINDOW = 256  # candidates in memory at once while indexing
_EXIF_ORIENTATION = 0x0112
_EXIF_TURNED = (5, 6, 7, 8)
_HEADER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
ROW_GROUP_BYTES = 2 << 30
"""Of Parquet row groups that a reader keeps: about those of a shuffle buffer (cache.order)."""

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
) -> Iterator[Part]:
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


class ImageReader:
    """Reads samples, their bytes or views of them; safe to share between threads.

    Parquet row groups are kept, the most recently used up to so many bytes, since a row cannot be
    read alone.
    """

    def __init__(self, row_group_bytes: int = ROW_GROUP_BYTES):
        self._max_bytes, self._num_bytes = row_group_bytes, 0
        self._groups: OrderedDict[tuple[str, int], Future[pa.Array]] = OrderedDict()
        self._starts: dict[str, list[int]] = {}
        self._lock = threading.Lock()

    def read(self, sample: Mapping[str, Any], verify: bool = False) -> bytes:
        """Return the bytes of one sample.

        Args:
            sample: a row of the sample table: sample_id, uri, offset, bytes, digest.
            verify: compare the sha256 with the sample's digest.

        Raises:
            BadInput: the file is gone or no longer holds this image there.
        """
        uri, offset, size = str(sample["uri"]), int(sample["offset"]), int(sample["bytes"])
        try:
            if uri.startswith(f"{PARQUET_SCHEME}:"):
                data = self._read_row(uri, offset)
            else:
                with place.opened(*_file_of(sample)) as file:
                    file.seek(offset)
                    data = file.read(size)
        except (OSError, pa.ArrowException, NotBuilt) as error:
            raise BadInput(
                f"sample {sample['sample_id']!r}: its image cannot be read again: {error}"
            ) from error
        if len(data) != size or (verify and _sha256(data) != sample["digest"]):
            raise BadInput(
                f"sample {sample['sample_id']!r}: {uri} at {offset} no longer holds the image that "
                "was indexed; a changed image needs a new sample_id or a new dataset name"
            )
        return data

    def canvases(
        self,
        samples: pl.DataFrame,
        policy: CentreView | AugmentedView,
        view_numbers: np.ndarray,
        pool: ThreadPoolExecutor | None = None,
    ) -> tuple[np.ndarray, list[str | None]]:
        """Read, decode and draw one view of each sample.

        Args:
            samples: n rows of the sample table.
            policy: of the views.
            view_numbers: int64 [n].
            pool: threads that do it; None: this one alone.

        Returns:
            canvases uint8 [n, C, C, 3] and their digests; zeros and None for what is no image,
            which the build of a store records with its reason.

        Raises:
            BadInput: as `read`.
        """
        drawn = np.zeros((len(samples), policy.canvas, policy.canvas, 3), np.uint8)

        def draw(n: int, sample: dict[str, Any], number: int) -> str | None:
            data = self.read(sample)
            try:
                view = make_view(data, policy, sample["sample_id"], number)
            except ImageError:
                return None
            drawn[n] = view.canvas
            return view.digest

        in_order = pool.map if pool is not None else map
        rows = samples.iter_rows(named=True)
        digests = in_order(draw, range(len(samples)), rows, view_numbers.tolist())
        return drawn, list(digests)

    def mirrors(self, sample: Mapping[str, Any]) -> bool:
        """Whether a sample lies in a bucket and is read through the mirror."""
        return isinstance(_file_of(sample)[0], BucketPath)

    def will_need(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Start mirroring those that lie in a bucket: a hint that returns at once."""
        place.will_need(_file_of(sample) for sample in samples)

    def _read_row(self, uri: str, row: int) -> bytes:
        _, column, name = uri.split(":", 2)
        path = place.root(name)
        starts = self._starts.get(uri)
        if starts is None:
            metadata = place.using(path, pq.read_metadata)
            lengths = (metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))
            starts = self._starts[uri] = list(accumulate(lengths, initial=0))
        if row >= starts[-1]:
            return b""
        group = bisect_right(starts, row) - 1
        images = self._row_group(uri, path, unquote(column), group)
        return images[row - starts[group]].as_py() or b""

    def _row_group(self, uri: str, path: Path, column: str, group: int) -> pa.Array:
        """Return the images of a row group; of threads that want it at once one reads it."""
        key = uri, group
        with self._lock:
            wanted = self._groups.get(key)
            mine = wanted is None
            if wanted is None:
                wanted = self._groups[key] = Future()
            self._groups.move_to_end(key)
        if not mine:
            return wanted.result()
        try:
            with place.using(path, pq.ParquetFile) as file:
                images = image_bytes(file.read_row_group(group, [column]).column(0))
        except BaseException as error:
            with self._lock:
                del self._groups[key]
            wanted.set_exception(error)
            raise
        wanted.set_result(images)
        with self._lock:
            self._num_bytes += images.nbytes
            for old in [each for each, found in self._groups.items() if found.done()][:-1]:
                if self._num_bytes <= self._max_bytes:
                    break
                self._num_bytes -= self._groups.pop(old).result().nbytes
        return images


def _file_of(sample: Mapping[str, Any]) -> tuple[Path, int | None, str | None]:
    """Return the file a sample lies in, with size and sha256 where it is the whole file."""
    uri, offset = str(sample["uri"]), int(sample["offset"])
    if uri.startswith(f"{PARQUET_SCHEME}:"):
        return place.root(uri.split(":", 2)[2]), None, None
    if offset:  # a tar's members have a header before them
        return place.root(uri), None, None
    return place.root(uri), int(sample["bytes"]), str(sample["digest"])


def _inspect(candidate: Candidate) -> tuple[str, int, int] | str:
    """Return (digest, width, height) of a candidate, or why it is no usable image."""
    if candidate.fault:
        return candidate.fault
    try:
        data = candidate.data
        if data is None:
            data = place.root(candidate.uri).read_bytes()
        return (_sha256(data), *_upright_size(data))
    except (ImageError, OSError) as error:
        return str(error)


def _upright_size(data: bytes) -> tuple[int, int]:
    """Read width and height, as displayed, from an image's header."""
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            # The base class's: PNG's own decodes all pixels in search of EXIF data after them.
            exif = Image.Image.getexif(image)
            turned = exif.get(_EXIF_ORIENTATION, 1) in _EXIF_TURNED
    except Image.UnidentifiedImageError as error:
        raise ImageError(f"{len(data)} bytes are in no image format known here") from error
    except _HEADER_ERRORS as error:
        raise ImageError(f"the image's header cannot be read: {error}") from error
    return (height, width) if turned else (width, height)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
