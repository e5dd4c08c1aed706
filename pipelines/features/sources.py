"""Feature sources: normalised teacher tokens for (samples, views), from a cache or live (law 8)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.codec.encoded import Escapes
from cache.errors import StoreError
from cache.reader import Reader
from cache.samples import Samples, ShardRange
from eupe import views
from eupe.encoders import Features
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


@dataclass(frozen=True)
class Fetched(ABC):
    """What a source brought to the host for a batch.

    Attributes:
        valid: bool [B], rows that every teacher has.
        view_digests: of each row's canvas when it was cached; None where nothing was cached.
    """

    valid: np.ndarray
    view_digests: Sequence[str | None] | None

    @abstractmethod
    def decode(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Do the device's part: return teacher -> normalised tokens, on the device."""


class FeatureSource(ABC):
    """Gives normalised teacher tokens for samples of one dataset.

    `fetch` does what the host does (read, copy, resize) and may be called from any thread; what it
    returns does what the device does. Sources share everything after the tokens are float32.

    Attributes:
        samples: the dataset's sample table: what a row of `fetch` is.
    """

    samples: Samples

    @abstractmethod
    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""

    @abstractmethod
    def shards(self) -> list[ShardRange]:
        """Return the shards whose rows can be fetched."""

    def versions(self) -> dict[str, int]:
        """Return store directory (below the cache root) -> manifest version that is read."""
        return {}

    @property
    def mirrored(self) -> bool:
        """True if a store lies in a bucket: it then pays to say what will be fetched."""
        return False

    def will_need(  # noqa: B027 (where nothing is mirrored there is nothing to start)
        self, rows: np.ndarray, view_numbers: np.ndarray, resolutions: Resolutions
    ) -> None:
        """Start mirroring the shards of rows that will be fetched soon; returns at once.

        Args:
            rows: int64 [n].
            view_numbers: int64 [n].
            resolutions: as they will be fetched.
        """

    @abstractmethod
    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        canvases: np.ndarray | None = None,
    ) -> Fetched:
        """Bring what is needed to the host.

        Args:
            rows: int64 [B], of `samples`.
            view_numbers: int64 [B].
            resolutions: the teachers wanted, each with its resolution.
            canvases: uint8 [B, C, C, 3], the views' pixels where the caller has drawn them; the
                caller then says which of them are valid.
        """

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
        return self.fetch(rows, view_numbers, resolutions).decode(device)


class OpenStore(NamedTuple):
    """One teacher's store at one resolution, and what turns its rows into targets."""

    reader: Reader
    decoder: Decoder
    summary_normaliser: Normaliser


class StoredTokens(NamedTuple):
    """One teacher's tokens of a batch as its store has them: summary float32, patches encoded."""

    summary: np.ndarray
    patches: np.ndarray
    escapes: Escapes
    store: OpenStore


@dataclass(frozen=True)
class FetchedTokens(Fetched):
    """Tokens as stored.

    Attributes:
        tokens: teacher -> its tokens.
    """

    tokens: Mapping[str, StoredTokens]

    def decode(self, device: str | torch.device = "cpu") -> dict[str, Targets]:
        """Decode and normalise (see `Fetched`)."""
        out = {}
        for teacher, (summary, patches, escapes, store) in self.tokens.items():
            grid = store.reader.store.spec.grid
            tokens = store.decoder(patches, escapes, device).unflatten(1, grid)
            summaries = torch.from_numpy(summary).to(device)
            out[teacher] = _masked(
                _normalised(summaries, store.summary_normaliser), tokens, self.valid
            )
        return out


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
        self._stores = {
            (teacher, resolution): OpenStore(
                reader,
                Decoder(reader.store.codec, normalisers[teacher].patches),
                normalisers[teacher].summary,
            )
            for (teacher, resolution), reader in readers.items()
        }
        self._readers = list(readers.values())
        self._buffers = Buffers()
        self.samples: Samples = next(iter(readers.values())).store.samples

    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""
        specs = {teacher: each.reader.store.spec for (teacher, _), each in self._stores.items()}
        return {name: (spec.summary_dim, spec.patch_dim) for name, spec in specs.items()}

    def shards(self) -> list[ShardRange]:
        """Return the shards that every store has, with their rows."""
        held = [reader.shards() for reader in self._readers]
        everywhere = set(held[0]).intersection(*held[1:])
        return [shard for shard in held[0] if shard in everywhere]

    def versions(self) -> dict[str, int]:
        """Return store directory (below the cache root) -> manifest version that is read."""
        return {str(reader.store.spec.directory()): reader.version for reader in self._readers}

    @property
    def mirrored(self) -> bool:
        """True if a store lies in a bucket: it then pays to say what will be fetched."""
        return any(reader.mirrored for reader in self._readers)

    def will_need(
        self, rows: np.ndarray, view_numbers: np.ndarray, resolutions: Resolutions
    ) -> None:
        """Start mirroring the shards of rows that will be fetched soon; returns at once.

        Args:
            rows: int64 [n].
            view_numbers: int64 [n].
            resolutions: as they will be fetched.
        """
        for teacher, resolution in resolutions.items():
            reader = self._store(teacher, resolution).reader
            if reader.mirrored:
                reader.select(rows, view_numbers).read_ahead()

    def fetch(
        self,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        resolutions: Resolutions,
        canvases: np.ndarray | None = None,
    ) -> FetchedTokens:
        """Copy the rows out of the mapped stores (see `FeatureSource`).

        Raises:
            StoreError: a store, row or view that is not there, or stores of different views.
        """
        valid = np.ones(len(rows), bool)
        digests: list[str | None] | None = None
        tokens = {}
        for teacher, resolution in resolutions.items():
            store = self._store(teacher, resolution)
            reader = store.reader
            selected = reader.select(rows, view_numbers)
            valid &= selected.valid
            of_store = selected.digests
            digests = of_store if digests is None else _agreeing(digests, of_store, reader)
            buffer = self._buffers.take((len(rows), *reader.row_shape), reader.dtype)
            tokens[teacher] = StoredTokens(
                selected.summaries, selected.patches(buffer), selected.escapes, store
            )
        return FetchedTokens(valid, digests, tokens)

    def _store(self, teacher: str, resolution: int) -> OpenStore:
        store = self._stores.get((teacher, resolution))
        if store is None:
            have = ", ".join(f"{name} at {pixels}" for name, pixels in sorted(self._stores))
            raise StoreError(f"{teacher} at {resolution} px was not opened; there are: {have}")
        return store


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
            out[name] = _masked(
                _normalised(summary.to(device), normalisers.summary),
                _normalised(patches.to(device), normalisers.patches),
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
        _check_normalisers(set(teachers), normalisers)
        self._teachers, self.normalisers = dict(teachers), dict(normalisers)
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
