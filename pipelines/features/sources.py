"""Feature sources: normalised teacher tokens for (samples, views), from a cache or live (law 8)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cache.codec.encoded import Escapes
from cache.errors import StoreError
from cache.reader import Reader
from cache.samples import Samples, ShardRange
from eupe import views
from eupe.normalise import Normaliser
from eupe.spec import AugmentedView, CentreView
from eupe.teachers import Teacher
from pipelines.features.buffers import Buffers
from pipelines.features.codec_torch import Decoder
from pipelines.images.reader import ImageReader

Resolutions = Mapping[str, int]
"""teacher -> resolution of its input, pixels."""


class Normalisers(NamedTuple):
    """What is done to one teacher's tokens before the loss (EUPE, arXiv:2603.22387, Fig. 3)."""

    summary: Normaliser
    patches: Normaliser


class Targets(NamedTuple):
    """Normalised tokens of one teacher for a batch.

    Attributes:
        summary: float32 [B, D].
        patches: float32 [B, H, W, D2].
        valid: bool [B]; rows that are not hold zeros.
    """

    summary: Tensor
    patches: Tensor
    valid: Tensor


class StoredTokens(NamedTuple):
    """One teacher's tokens of a batch as a store has them: summary float32, patches encoded."""

    summary: np.ndarray
    patches: np.ndarray
    escapes: Escapes
    resolution: int


@dataclass(frozen=True)
class Raw:
    """What `fetch` brought for a batch, on the host.

    Attributes:
        valid: bool [B], rows that every teacher has.
        view_digests: of each row's canvas when it was cached; None where nothing was cached.
        tokens: teacher -> tokens as stored (cached source).
        pixels: teacher -> uint8 [B, R, R, 3], its input (live source).
    """

    valid: np.ndarray
    view_digests: Sequence[str | None] | None
    tokens: Mapping[str, StoredTokens]
    pixels: Mapping[str, np.ndarray]


class FeatureSource(Protocol):
    """Gives normalised teacher tokens for samples of one dataset.

    `fetch` does what the host does (read, copy, resize) and may be called from any thread;
    `decode` does what the device does. Both sources share everything after the tokens are float32.

    Attributes:
        samples: the dataset's sample table: what a row of `fetch` is.
    """

    samples: Samples

    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""
        ...

    def shards(self) -> list[ShardRange]:
        """Return the shards whose rows can be fetched."""
        ...

    def versions(self) -> dict[str, int]:
        """Return store directory (below the cache root) -> manifest version that is read."""
        return {}

    @property
    def mirrored(self) -> bool:
        """Whether a store lies in a bucket, so that it pays to say what will be fetched."""
        return False

    def will_need(self, rows: np.ndarray, views: np.ndarray, resolutions: Resolutions) -> None:
        """Start mirroring the shards of rows that will be fetched soon; returns at once.

        Args:
            rows: int64 [n].
            views: int64 [n].
            resolutions: as they will be fetched.
        """

    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        canvases: np.ndarray | None = None,
    ) -> Raw:
        """Bring what is needed to the host.

        Args:
            rows: int64 [B], of `samples`.
            view_numbers: int64 [B].
            resolutions: the teachers wanted, each with its resolution.
            canvases: uint8 [B, C, C, 3], the views' pixels where the caller has drawn them; the
                caller then says which of them are valid.
        """
        ...

    def decode(self, raw: Raw, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Turn what `fetch` brought into normalised tokens on the device."""
        ...

    def targets(
        self,
        sample_ids: Sequence[str],
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        device: str | torch.device = "cpu",
    ) -> dict[str, Targets]:
        """Find samples by their ids, fetch and decode.

        Finding them keeps 16 bytes a sample of the dataset in memory; `fetch` does not.

        Raises:
            MissingSamples: naming ids that are not in the dataset.
        """
        rows = self.samples.rows_of(sample_ids)
        return self.decode(self.fetch(rows, view_numbers, resolutions), device)


class CachedSource(FeatureSource):
    """Tokens from the stores of one dataset and view policy.

    Args:
        readers: (teacher, resolution) -> reader of that store.
        normalisers: teacher -> what is done to its tokens.

    Raises:
        ValueError: no readers, or a teacher without normalisers.
    """

    def __init__(
        self, readers: Mapping[tuple[str, int], Reader], normalisers: Mapping[str, Normalisers]
    ) -> None:
        if not readers:
            raise ValueError("a cached source wants at least one store")
        _check_normalisers({teacher for teacher, _ in readers}, normalisers)
        self._readers, self._normalisers = dict(readers), dict(normalisers)
        self._decoders = {
            (teacher, resolution): Decoder(reader.store.codec, normalisers[teacher].patches)
            for (teacher, resolution), reader in readers.items()
        }
        self._buffers = Buffers()
        self.samples: Samples = next(iter(readers.values())).store.samples

    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""
        specs = {teacher: reader.store.spec for (teacher, _), reader in self._readers.items()}
        return {name: (spec.summary_dim, spec.patch_dim) for name, spec in specs.items()}

    def shards(self) -> list[ShardRange]:
        """Return the shards that every store has, with their rows."""
        held = [reader.shards() for reader in self._readers.values()]
        everywhere = set(held[0]).intersection(*held[1:])
        return [shard for shard in held[0] if shard in everywhere]

    def versions(self) -> dict[str, int]:
        """Return store directory (below the cache root) -> manifest version that is read."""
        return {
            str(reader.store.spec.directory()): reader.version for reader in self._readers.values()
        }

    @property
    def mirrored(self) -> bool:
        """Whether a store lies in a bucket, so that it pays to say what will be fetched."""
        return any(reader.mirrored for reader in self._readers.values())

    def will_need(self, rows: np.ndarray, views: np.ndarray, resolutions: Resolutions) -> None:
        """Start mirroring the shards of rows that will be fetched soon; returns at once.

        Args:
            rows: int64 [n].
            views: int64 [n].
            resolutions: as they will be fetched.
        """
        for teacher, resolution in resolutions.items():
            reader = self._reader(teacher, resolution)
            if reader.mirrored:
                reader.select(rows, views).read_ahead()

    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        canvases: np.ndarray | None = None,
    ) -> Raw:
        """Copy the rows out of the mapped stores (see `FeatureSource`).

        Raises:
            StoreError: a store, row or view that is not there, or stores of different views.
        """
        valid = np.ones(len(rows), bool)
        digests: list[str | None] | None = None
        tokens = {}
        for teacher, resolution in resolutions.items():
            reader = self._reader(teacher, resolution)
            selected = reader.select(rows, view_numbers)
            valid &= selected.valid
            of_store = selected.digests
            digests = of_store if digests is None else _agreeing(digests, of_store, reader)
            buffer = self._buffers.take((len(rows), *reader.row_shape), reader.dtype)
            tokens[teacher] = StoredTokens(
                selected.summaries,
                selected.patches(buffer),
                selected.escapes,
                resolution,
            )
        return Raw(valid, digests, tokens, {})

    def decode(self, raw: Raw, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Decode and normalise on the device (see `FeatureSource`)."""
        out = {}
        for teacher, stored in raw.tokens.items():
            decode = self._decoders[teacher, stored.resolution]
            grid = self._reader(teacher, stored.resolution).store.spec.grid
            patches = decode(stored.patches, stored.escapes, device)
            summary = _normalised(
                torch.from_numpy(stored.summary).to(device), self._normalisers[teacher].summary
            )
            out[teacher] = _masked(summary, patches.unflatten(1, grid), raw.valid)
        return out

    def _reader(self, teacher: str, resolution: int) -> Reader:
        reader = self._readers.get((teacher, resolution))
        if reader is None:
            have = ", ".join(f"{name} at {side}" for name, side in sorted(self._readers))
            raise StoreError(f"{teacher} at {resolution} px was not opened; there are: {have}")
        return reader


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
        _check_normalisers(set(teachers), normalisers)
        self._teachers, self._normalisers = dict(teachers), dict(normalisers)
        self.samples, self._images, self._policy = samples, images, policy
        self._compute_batch = compute_batch

    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""
        return {
            name: (teacher.encoder.summary_dim, teacher.encoder.patch_dim)
            for name, teacher in self._teachers.items()
        }

    def shards(self) -> list[ShardRange]:
        """Return all shards of the dataset: a live teacher has every row."""
        return self.samples.shards()

    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        canvases: np.ndarray | None = None,
    ) -> Raw:
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
        return Raw(valid, None, {}, pixels)

    def decode(self, raw: Raw, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Run the teachers and normalise (see `FeatureSource`)."""
        out = {}
        for name, pixels in raw.pixels.items():
            summary, patches = self._teachers[name].features(pixels, self._compute_batch)
            normalisers = self._normalisers[name]
            out[name] = _masked(
                _normalised(summary.to(device), normalisers.summary),
                _normalised(patches.to(device), normalisers.patches),
                raw.valid,
            )
        return out


def _normalised(tokens: Tensor, normaliser: Normaliser) -> Tensor:
    with torch.no_grad():
        normalised: Tensor = normaliser.to(tokens.device)(tokens)
    return normalised


def _masked(summary: Tensor, patches: Tensor, valid: np.ndarray) -> Targets:
    """Make targets of normalised tokens; rows that are not valid become zeros, as NaN * 0 = NaN."""
    keep = torch.from_numpy(valid).to(summary.device)
    if not valid.all():
        summary = torch.where(keep[:, None], summary, 0)
        patches = torch.where(keep[:, None, None, None], patches, 0)
    return Targets(summary, patches, keep)


def _check_normalisers(teachers: set[str], normalisers: Mapping[str, Normalisers]) -> None:
    missing = teachers - set(normalisers)
    if missing:
        raise ValueError(f"no normalisers of teacher {', '.join(sorted(missing))}")


def _agreeing(
    ours: list[str | None], theirs: Sequence[str | None], reader: Reader
) -> list[str | None]:
    """Join the digests of two stores; where both know a canvas it must be the same one."""
    for a, b in zip(ours, theirs, strict=True):
        if a is not None and b is not None and a != b:
            raise StoreError(
                f"{reader.store.directory}: a view there was rendered otherwise than in the other "
                "teachers' stores (another version of the image libraries); rebuild one of them"
            )
    return [a if a is not None else b for a, b in zip(ours, theirs, strict=True)]
