"""Tokens from the teachers themselves: what the caches are compared with."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from cache.samples import Samples
from cache.shard_ranges import ShardRanges
from eupe import views
from eupe.encoders import Features
from eupe.spec import AugmentedView, CentreView
from eupe.teachers import Teacher
from pipelines.features.sources import (
    FeatureSource,
    Fetched,
    Normalisers,
    Resolutions,
    Targets,
    check_normalisers,
    masked,
    normalised,
)
from pipelines.images.reader import ImageReader


@dataclass(frozen=True)
class FetchedPixels(Fetched):
    """The teachers' inputs, for teachers that run now.

    Attributes:
        pixels: teacher -> uint8 [B, R, R, 3], its input.
        source: whose teachers run.
    """

    pixels: Mapping[str, np.ndarray]
    source: "LiveSource"

    def decode(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Run the teachers and normalise (see `Fetched`)."""
        out = {}
        for name, pixels in self.pixels.items():
            summary, patches = self.source.features(name, pixels)
            normalisers = self.source.normalisers[name]
            out[name] = masked(
                normalised(summary.to(device), normalisers.summary),
                normalised(patches.to(device), normalisers.patches),
                self.valid,
            )
        return out


class LiveSource(FeatureSource):
    """Tokens from the teachers themselves, computed as the extraction computes them.

    Args:
        teachers: by name, each on the device it shall compute on.
        samples: the dataset's sample table.
        images: reads the samples' bytes.
        policy: of the views.
        normalisers: teacher -> what is done to its tokens.
        compute_batch: pictures a forward pass, padded; that of the cache for equal tokens.

    Raises:
        ValueError: a teacher without normalisers.
    """

    def __init__(
        self,
        teachers: Mapping[str, Teacher],
        samples: Samples,
        images: ImageReader,
        policy: CentreView | AugmentedView,
        normalisers: Mapping[str, Normalisers],
        compute_batch: int,
    ) -> None:
        check_normalisers(set(teachers), normalisers)
        self._teachers, self.normalisers = dict(teachers), dict(normalisers)
        self.samples, self._images, self._policy = samples, images, policy
        self._compute_batch = compute_batch

    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""
        return {
            name: (teacher.encoder.summary_dim, teacher.encoder.patch_dim)
            for name, teacher in self._teachers.items()
        }

    def shards(self) -> ShardRanges:
        """Return all shards of the dataset: a live teacher has every row."""
        return self.samples.shards()

    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        canvases: np.ndarray | None = None,
    ) -> FetchedPixels:
        """Draw the canvases, if need be, and resize them for each teacher (see `FeatureSource`)."""
        valid = np.ones(len(rows), bool)
        if canvases is None:
            canvases, digests = self._images.canvases(
                self.samples.take(rows), self._policy, view_numbers
            )
            valid = np.array([digest is not None for digest in digests])
        pixels = {
            teacher: np.stack([views.resize(canvas, resolution) for canvas in canvases])
            for teacher, resolution in resolutions.items()
        }
        return FetchedPixels(valid, None, pixels, self)

    def features(self, teacher: str, pixels: np.ndarray) -> Features:
        """Run a teacher over its input, uint8 [n, R, R, 3], as the extraction runs it."""
        return self._teachers[teacher].features(pixels, self._compute_batch)
