"""The image reader: an indexed sample's bytes again, and views drawn of them."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from cache.errors import NotBuilt
from cache.files import place
from cache.files.bucket import BucketPath
from eupe.errors import BadInput
from eupe.spec import AugmentedView, CentreView
from eupe.views import ImageError, make_view
from pipelines.images.parquet import ROW_GROUP_BYTES, RowGroups, file_name, is_row


class ImageReader:
    """Reads samples, their bytes or views of them; safe to share between threads.

    Args:
        row_group_bytes: of Parquet row groups to keep, see `RowGroups`.
    """

    def __init__(self, row_group_bytes: int = ROW_GROUP_BYTES):
        self._row_groups = RowGroups(row_group_bytes)

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
            if is_row(uri):
                data = self._row_groups.read(uri, offset)
            else:
                with place.opened(*_file_of(sample)) as file:
                    file.seek(offset)
                    data = file.read(size)
        except (OSError, pa.ArrowException, NotBuilt) as error:
            raise BadInput(
                f"sample {sample['sample_id']!r}: its image cannot be read again: {error}"
            ) from error
        changed = verify and hashlib.sha256(data).hexdigest() != sample["digest"]
        if changed or len(data) != size:
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
        """Return True if a sample lies in a bucket and is read through the mirror."""
        return isinstance(_file_of(sample)[0], BucketPath)

    def will_need(self, samples: Iterable[Mapping[str, Any]]) -> None:
        """Start mirroring the samples that lie in a bucket; returns at once."""
        place.will_need(_file_of(sample) for sample in samples)


def _file_of(sample: Mapping[str, Any]) -> tuple[Path, int | None, str | None]:
    """Return the file a sample lies in, with size and sha256 where it is the whole file."""
    uri, offset = str(sample["uri"]), int(sample["offset"])
    if is_row(uri):
        return place.root(file_name(uri)), None, None
    if offset:  # a tar's members have a header before them
        return place.root(uri), None, None
    return place.root(uri), int(sample["bytes"]), str(sample["digest"])
