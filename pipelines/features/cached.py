"""Tokens from stores: read, copied, decoded and normalised on the device."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from cache.codec.encoded import Escapes
from cache.errors import StoreError
from cache.reader import Reader
from cache.samples import Samples
from cache.shard_ranges import ShardRanges
from eupe.normalise import Normaliser
from pipelines.features.buffers import Buffers, Crossing
from pipelines.features.codec_torch import Decoder
from pipelines.features.live_rows import LiveRows, Rows
from pipelines.features.marks import Marks, marks
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


class OpenStore(NamedTuple):
    """One teacher's store at one resolution, and what turns its rows into targets."""

    reader: Reader
    decoder: Decoder
    summary_normaliser: Normaliser
    cross: Crossing


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
            summaries = store.cross(torch.from_numpy(summary), device)
            out[teacher] = masked(
                normalised(summaries, store.summary_normaliser), tokens, self.valid
            )
        return out


def samples_pin(samples: Samples) -> str:
    """Return the name under which a run pins how many rows of a dataset it draws from."""
    return f"{samples.dataset.name}/samples"


class CachedSource(FeatureSource):
    """Tokens from the stores of one dataset and view policy.

    Args:
        readers: (teacher, resolution) -> reader of that store.
        normalisers: teacher -> what is done to its tokens.
        shards: of the dataset, of which the stores have what will be fetched; None: those that
            every store has whole.
        live: computes the rows that a store does not have; None: they are an error.
        rest: (teacher, resolution) -> reader of what that store lacks, summaries alone.
        tokens: False for a source that tells of rows which are valid, and brings no tokens.

    Raises:
        ValueError: no readers, or a teacher without normalisers.
    """

    def __init__(
        self,
        readers: Mapping[tuple[str, int], Reader],
        normalisers: Mapping[str, Normalisers],
        shards: ShardRanges | None = None,
        live: LiveRows | None = None,
        rest: Mapping[tuple[str, int], Reader] = MappingProxyType({}),
        tokens: bool = True,
    ) -> None:
        if not readers:
            raise ValueError("a cached source wants at least one store")
        self._named, self._normalisers = dict(readers), normalisers
        check_normalisers({teacher for teacher, _ in readers}, normalisers)
        self._stores = {
            (teacher, resolution): OpenStore(
                reader,
                Decoder(reader.store.codec, normalisers[teacher].patches),
                normalisers[teacher].summary,
                Crossing(),
            )
            for (teacher, resolution), reader in readers.items()
        }
        self._readers, self._shards, self._live = list(readers.values()), shards, live
        self._rest, self._tokens = dict(rest), tokens
        self._buffers = Buffers()
        self.samples: Samples = next(iter(readers.values())).store.samples

    def for_rows(self, num_rows: int) -> "CachedSource":
        """Return a source of the same for who will fetch so many rows: by range, if few."""
        readers, rest = (
            {name: reader.for_rows(num_rows) for name, reader in of.items()}
            for of in (self._named, self._rest)
        )
        if readers == self._named and rest == self._rest:
            return self
        shards = self.shards()
        return CachedSource(readers, self._normalisers, shards, None, rest, self._tokens)

    def without_tokens(self) -> "CachedSource":
        """Return a source that tells which rows are valid, and reads no patches."""
        settings = self._normalisers, self._shards, self._live, self._rest
        return CachedSource(self._named, *settings, tokens=False)

    def dims(self) -> dict[str, tuple[int, int]]:
        """Return teacher -> (summary width, patch width)."""
        specs = {teacher: each.reader.store.spec for (teacher, _), each in self._stores.items()}
        return {name: (spec.summary_dim, spec.patch_dim) for name, spec in specs.items()}

    def shards(self) -> ShardRanges:
        """Return the shards that rows are fetched from."""
        if self._shards is not None:
            return self._shards
        return reduce(ShardRanges.shared, map(self._shards_of, self._named))

    def _shards_of(self, name: tuple[str, int]) -> ShardRanges:
        reader, rest = self._named[name], self._rest.get(name)
        if rest is None:
            return reader.shards()
        there = reader.records.shared(reader.views) | rest.records.shared(rest.views)
        shards = self.samples.shards()
        return shards.where(there[shards.numbers])

    def with_tokens(self, rows: np.ndarray, resolutions: Resolutions) -> np.ndarray:
        """Return those of the rows, int64 [n], whose patches some teachers all have, in view 0."""
        absent = [self._store(*each).reader.records.absent(rows) for each in resolutions.items()]
        held: np.ndarray = rows[~np.logical_or.reduce(absent)]
        return held

    def versions(self) -> dict[str, int]:
        """Return store directory (below the cache root) -> manifest version that is read.

        With its shards given, also sample table -> one past the last row that is drawn from.
        """
        versions = {str(each.store.spec.directory()): each.version for each in self._readers}
        if self._shards is None:
            return versions
        return versions | {samples_pin(self.samples): int(self._shards.stops[-1])}

    def num_missing(
        self, rows: np.ndarray, view_numbers: np.ndarray, resolutions: Resolutions
    ) -> int:
        """Count the shards of stores that are not there yet (see `FeatureSource`)."""
        return sum(
            self._store(teacher, resolution).reader.records.num_absent(rows, view_numbers)
            for teacher, resolution in resolutions.items()
        )

    @property
    def mirrored(self) -> bool:
        """True if a store lies in a bucket: it then pays to say what will be fetched."""
        return self._tokens and any(reader.mirrored for reader in self._readers)

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
            if reader.mirrored and self._tokens:
                reader.will_need(rows, view_numbers)

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
            if not self._tokens:
                said = self._marks(teacher, resolution, rows, view_numbers)
                valid &= said.valid
                digests = said.digests if digests is None else _agreeing(digests, said[2], reader)
                continue
            absent = None if self._live is None else reader.records.absent(rows, view_numbers)
            if absent is not None and absent.any():
                found, of_store = self._partly_live(reader, rows, view_numbers, absent, canvases)
            else:
                selected = reader.select(rows, view_numbers)
                of_store = selected.digests
                buffer = self._buffers.take((len(rows), *reader.row_shape), reader.dtype)
                summaries = self._buffers.take(selected.summaries.shape, np.float32)
                summaries[:] = selected.summaries
                found = Rows(summaries, selected.patches(buffer), selected.escapes, selected.valid)
            valid &= found.valid
            digests = of_store if digests is None else _agreeing(digests, of_store, reader)
            tokens[teacher] = StoredTokens(found.summaries, found.patches, found.escapes, store)
        return FetchedTokens(valid, digests, tokens)

    def _partly_live(
        self,
        reader: Reader,
        rows: np.ndarray,
        view_numbers: np.ndarray,
        absent: np.ndarray,
        canvases: np.ndarray | None,
    ) -> tuple[Rows, list[str | None]]:
        """Read the rows [n] that a store has and compute those that it lacks, bool [n].

        Returns:
            rows in their order, and the digests of the canvases of those that were stored.
        """
        assert self._live is not None
        here, there = np.flatnonzero(absent), np.flatnonzero(~absent)
        drawn = None if canvases is None else canvases[here]
        made = self._live.compute(reader.store, rows[here], view_numbers[here], drawn)
        read = reader.select(rows[there], view_numbers[there])
        patches = self._buffers.take((len(rows), *reader.row_shape), reader.dtype)
        summaries = np.empty((len(rows), made.summaries.shape[1]), np.float32)
        valid, digests = np.empty(len(rows), bool), np.full(len(rows), None, object)
        patches[here], summaries[here], valid[here] = made.patches, made.summaries, made.valid
        patches[there], summaries[there], valid[there] = read.patches(), read.summaries, read.valid
        digests[there] = read.digests
        escapes = Escapes(
            np.concatenate([here[made.escapes.row], there[read.escapes.row]]),
            np.concatenate([made.escapes.token, read.escapes.token]),
            np.concatenate([made.escapes.values, read.escapes.values]),
        )
        return Rows(summaries, patches, escapes, valid), digests.tolist()

    def summaries(
        self, rows: np.ndarray, view_numbers: np.ndarray, teacher: str, resolution: int
    ) -> np.ndarray:
        """Return a teacher's summaries as stored, float32 [n, D]: nothing is read of its patches.

        Args:
            rows: int64 [n], of `samples`.
            view_numbers: int64 [n].
            teacher: whose.
            resolution: of its input, pixels.

        Raises:
            StoreError: a store, row or view that is not there.
        """
        return self._marks(teacher, resolution, rows, view_numbers).summaries

    def _marks(
        self, teacher: str, resolution: int, rows: np.ndarray, view_numbers: np.ndarray
    ) -> Marks:
        readers = [self._store(teacher, resolution).reader]
        if (rest := self._rest.get((teacher, resolution))) is not None:
            readers.append(rest)
        return marks(readers, rows, view_numbers, lenient=self._live is not None)

    def _store(self, teacher: str, resolution: int) -> OpenStore:
        store = self._stores.get((teacher, resolution))
        if store is None:
            have = ", ".join(f"{name} at {pixels}" for name, pixels in sorted(self._stores))
            raise StoreError(f"{teacher} at {resolution} px was not opened; there are: {have}")
        return store


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
