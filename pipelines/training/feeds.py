"""One dataset as batches read it: teacher tokens, and the student's pixels of the same views."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import PIL

from cache.errors import StoreError
from cache.reader import Reader
from eupe import views
from eupe.spec import AugmentedView, CentreView
from pipelines.features.sources import FeatureSource, Fetched
from pipelines.images.reader import ImageReader
from pipelines.recipe.resolutions import Resolutions


@dataclass(frozen=True)
class Part:
    """The rows of a batch that one feed serves.

    Attributes:
        places: int64 [n], their places in the batch.
        fetched: what that feed's source brought for them.
    """

    places: np.ndarray
    fetched: Fetched


@dataclass(frozen=True)
class Served:
    """What a feed brings to a batch.

    Attributes:
        part: the rows' teacher tokens, and which rows are valid.
        sample_ids: [n].
        pixels: uint8 [n, R, R, 3], the student's.
    """

    part: Part
    sample_ids: list[str]
    pixels: np.ndarray


@dataclass(frozen=True)
class Feed:
    """One dataset as batches read it.

    Attributes:
        source: of its teacher tokens; its `samples` say where the images lie.
        images: reads their bytes.
        policy: of the views, the one the features were made of.
        pixels: student's scale -> reader of the views' own pixels; at other scales images are
            decoded and views drawn again.
    """

    source: FeatureSource
    images: ImageReader
    policy: CentreView | AugmentedView
    pixels: Mapping[int, Reader] = field(default_factory=dict)

    def versions(self) -> dict[str, int]:
        """Return store directory (below the cache root) -> manifest version that is read."""
        own = {
            str(reader.store.spec.directory()): reader.version for reader in self.pixels.values()
        }
        return self.source.versions() | own

    def num_missing(
        self, rows: np.ndarray, view_numbers: np.ndarray, resolutions: Resolutions
    ) -> int:
        """Count the shards that a batch will want and that are not there yet.

        Args:
            rows: int64 [n], of the dataset.
            view_numbers: int64 [n].
            resolutions: of the batch.
        """
        missing = self.source.num_missing(rows, view_numbers, resolutions.teachers)
        stored = self.pixels.get(resolutions.student)
        return (
            missing if stored is None else missing + stored.records.num_absent(rows, view_numbers)
        )

    def for_rows(self, num_rows: int) -> "Feed":
        """Return a feed of the same for who will want so many rows (see `Reader.for_rows`)."""
        pixels = {scale: reader.for_rows(num_rows) for scale, reader in self.pixels.items()}
        return replace(self, source=self.source.for_rows(num_rows), pixels=pixels)

    @cached_property
    def mirrored(self) -> bool:
        """True if its features or its images lie in a bucket."""
        return self.source.mirrored or self.images.mirrored

    def will_need(
        self, rows: np.ndarray, view_numbers: np.ndarray, resolutions: Resolutions
    ) -> None:
        """Start mirroring what a batch will want; returns at once.

        Args:
            rows: int64 [n], of the dataset.
            view_numbers: int64 [n].
            resolutions: of the batch.
        """
        self.source.will_need(rows, view_numbers, resolutions.teachers)
        if (stored := self.pixels.get(resolutions.student)) is not None:
            stored.will_need(rows, view_numbers)
        elif self.images.mirrored:
            self.images.will_need(self.source.samples.take(rows).iter_rows(named=True))

    def serve(
        self,
        places: np.ndarray,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        drawers: ThreadPoolExecutor,
    ) -> Served:
        """Fetch the student's pixels and the teachers' tokens of some rows.

        Args:
            places: int64 [n], of the rows in their batch.
            rows: int64 [n], of the dataset.
            view_numbers: int64 [n].
            resolutions: of the batch.
            drawers: decode images and draw views, where these are not stored.

        Raises:
            StoreError: a view is not the one that its cached tokens were made of.
        """
        table = self.source.samples.take(rows)
        ids = table["sample_id"].to_list()
        stored = self.pixels.get(resolutions.student)
        if stored is not None:
            pixels, digests = _stored(stored, rows, view_numbers, resolutions.student)
            fetched = self.source.fetch(rows, view_numbers, resolutions.teachers)
        else:
            canvases, digests = self.images.canvases(table, self.policy, view_numbers, drawers)
            pixels = np.stack(
                list(drawers.map(partial(views.resize, resolution=resolutions.student), canvases))
            )
            fetched = self.source.fetch(rows, view_numbers, resolutions.teachers, canvases)
        valid = fetched.valid & np.array([digest is not None for digest in digests])
        if fetched.view_digests is not None:
            _check_digests(ids, view_numbers, digests, fetched.view_digests)
        return Served(Part(places, replace(fetched, valid=valid)), ids, pixels)


def _stored(
    reader: Reader, rows: np.ndarray, view_numbers: np.ndarray, resolution: int
) -> tuple[np.ndarray, list[str | None]]:
    """Read cached pixels, uint8 [n, R, R, 3], and the digests of the canvases they came from."""
    selected = reader.select(rows, view_numbers)
    return selected.patches().reshape(len(rows), resolution, resolution, 3), selected.digests


def _check_digests(
    ids: list[str],
    view_numbers: np.ndarray,
    here: list[str | None],
    cached: Sequence[str | None],
) -> None:
    """Refuse to pair a teacher's tokens with pixels that the teacher did not see (law 3)."""
    for sample_id, view, ours, theirs in zip(ids, view_numbers, here, cached, strict=True):
        # Without a canvas, here or when it was cached, the row is not valid and pairs nothing.
        if ours is not None and theirs is not None and ours != theirs:
            raise StoreError(
                f"view {view} of sample {sample_id!r} renders as {ours} here and was "
                f"{theirs} when cached: the image changed, or the image libraries differ (Pillow "
                f"{PIL.__version__} here; `eupe cache inspect` shows the store's); use the same "
                "libraries, or rebuild the cache"
            )
