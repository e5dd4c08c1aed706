"""The image reader: an indexed sample's bytes again, and views drawn of them."""

import errno
import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from cache.errors import NotBuilt
from cache.files import place
from cache.files.bucket_path import BucketPath
from cache.samples import DROPPED_REASON
from eupe.errors import BadInput
from eupe.spec import AugmentedView, CentreView
from eupe.views import ImageError, make_view
from pipelines.images import warned
from pipelines.images.parquet import RowGroups, column_name, file_name, is_row

GONE = frozenset(
    [errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO]
)
"""What the system says of a picture that is lost; other errors are of this process, or pass."""
REASONS_SHOWN = 5


class LostImage(ImageError):
    """A picture that is not where it was indexed, or is another one."""


class ImageReader:
    """Reads a dataset's samples, their bytes or views of them; safe to share between threads.

    Args:
        base: folder that the samples' paths are relative to, `walks.base` of their source.
        row_groups: of Parquet files, that readers may share; None: of its own.
        max_lost: pictures that `canvases` may miss before it is an error; None: any number.
    """

    def __init__(
        self,
        base: str | Path,
        row_groups: RowGroups | None = None,
        max_lost: int | None = None,
    ):
        self._base = place.root(base)
        self._row_groups = row_groups or RowGroups()
        self._max_lost, self._lost = max_lost, dict[str, str]()

    def read(self, sample: Mapping[str, Any], verify: bool = False) -> bytes:
        """Return the bytes of one sample.

        Args:
            sample: a row of the sample table: sample_id, uri, offset, bytes, digest.
            verify: compare the sha256 with the sample's digest.

        Raises:
            ImageError: the sample was taken out of the dataset.
            LostImage: the file is gone or no longer holds this image there.
            BadInput: this process cannot open it now.
        """
        if sample["uri"] is None:
            raise ImageError(DROPPED_REASON)
        uri, offset, size = str(sample["uri"]), int(sample["offset"]), int(sample["bytes"])
        try:
            if is_row(uri):
                file_of_row = self._base / file_name(uri)
                data = self._row_groups.read(file_of_row, column_name(uri), offset)
            else:
                with place.opened(*self._file_of(sample)) as file:
                    file.seek(offset)
                    data = file.read(size)
        except (OSError, pa.ArrowException, NotBuilt) as error:
            if isinstance(error, OSError) and error.errno not in GONE:
                raise BadInput(f"sample {sample['sample_id']!r}: {uri}: {error}") from error
            raise LostImage(f"the image cannot be read again: {uri}: {_said(error)}") from error
        changed = verify and hashlib.sha256(data).digest() != sample["digest"]
        if changed or len(data) != size:
            raise LostImage(
                f"{uri} at {offset} no longer holds the image that was indexed; a changed image "
                "needs a new sample_id or a new dataset name"
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
            canvases uint8 [n, C, C, 3] and their digests; zeros and None for what is no image or
            is lost, which the build of a store records with its reason.

        Raises:
            BadInput: as `read`; or more pictures are lost than `max_lost`.
        """
        drawn = np.zeros((len(samples), policy.canvas, policy.canvas, 3), np.uint8)

        def draw(n: int, sample: dict[str, Any], number: int) -> str | None:
            try:
                with warned.about(sample["sample_id"]):
                    view = make_view(self.read(sample), policy, sample["sample_id"], number)
            except LostImage as error:
                self._lost[sample["sample_id"]] = str(error)
                return None
            except ImageError:
                return None
            drawn[n] = view.canvas
            return view.digest

        in_order = pool.map if pool is not None else map
        rows = samples.iter_rows(named=True)
        digests = list(in_order(draw, range(len(samples)), rows, view_numbers.tolist()))
        if self._max_lost is not None and len(self._lost) > self._max_lost:
            first = [f"{name}: {why}" for name, why in islice(self._lost.items(), REASONS_SHOWN)]
            raise BadInput(
                f"{len(self._lost)} images are lost since they were indexed, more than "
                f"max_failure_share allows ({'; '.join(first)}); bring them back, name where they "
                "are now and build again, or raise extraction.max_failure_share"
            )
        return drawn, digests

    @property
    def mirrored(self) -> bool:
        """True if the samples lie in a bucket and are read through the mirror."""
        return isinstance(self._base, BucketPath)

    def will_need(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Start mirroring the samples that lie in a bucket; returns at once."""
        place.will_need(self._file_of(sample) for sample in samples if sample["uri"] is not None)

    def _file_of(self, sample: Mapping[str, Any]) -> tuple[Path, int | None, str | None]:
        """Return the file a sample lies in, with size and sha256 where it is the whole file."""
        uri, offset = str(sample["uri"]), int(sample["offset"])
        if is_row(uri):
            return self._base / file_name(uri), None, None
        if offset:  # a tar's members have a header before them
            return self._base / uri, None, None
        return self._base / uri, int(sample["bytes"]), sample["digest"].hex()


def _said(error: Exception) -> str:
    """Say what was wrong with a file, without its path on this machine: data files keep it."""
    if isinstance(error, OSError):
        return str(error.strerror)
    return "no such object" if isinstance(error, NotBuilt) else "no whole Parquet file"
