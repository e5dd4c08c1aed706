"""The sample table of a dataset: which rows exist, shared by all stores of the dataset.

A sample keeps its row for ever. Samples are added in segments; a segment starts at a shard
boundary, so the rows between the end of one segment and the start of the next belong to no sample:
gaps, the same in every store (docs/design.md, laws 4 and 12).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from pydantic import Field

from cache.errors import FingerprintMismatch, MissingSamples, NotBuilt
from cache.files import atomic
from cache.format import arrow_tables, layout
from cache.format.sample_table import SCHEMA, conform, frame, new_samples
from cache.segments import (
    Head,
    HeadFile,
    Segment,
    commit,
    files,
    map_segment,
    next_version,
    read_head,
    write_segment,
)
from eupe import fingerprint as fp
from eupe.errors import BadInput
from eupe.spec import DatasetSpec

Rows = npt.NDArray[np.int64]

SEGMENT_ROWS = 2_000_000
"""Samples of one segment at most: a column of its text has 2 GiB of room."""


@dataclass(frozen=True)
class ShardRange:
    """A shard and the rows [start, stop) it holds."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class SampleSegment(Segment):
    """A segment of samples.

    Attributes:
        start: row of its first sample, the first of a shard.
    """

    start: int


class SamplesHead(Head):
    """HEAD of a sample table.

    Attributes:
        dataset: name and key rule.
        rows_per_shard: fixed when the dataset got its first samples.
        segments: their rows rise.
    """

    dataset: DatasetSpec
    rows_per_shard: int = Field(ge=1)
    segments: tuple[SampleSegment, ...] = ()


class Samples:
    """The sample table of one dataset, mapped from disk.

    Attributes:
        directory: where its segments lie.
        dataset: name and key rule.
        rows_per_shard: rows in a full shard, fixed when the dataset got its first samples.
        num_rows: one past the last row (gaps included); the length of every patches array.
    """

    def __init__(self, directory: Path, head: SamplesHead):
        """Use `Samples.open`."""
        self.directory = directory
        self.dataset = head.dataset
        self.rows_per_shard = head.rows_per_shard
        self._segments = [map_segment(directory, segment, SCHEMA) for segment in head.segments]
        self._starts = np.array([segment.start for segment in head.segments], np.int64)
        self._lengths = np.array([segment.rows for segment in head.segments], np.int64)
        self._offsets = np.concatenate(([0], np.cumsum(self._lengths)))
        self.num_rows = int(self._starts[-1] + self._lengths[-1])

    @classmethod
    def open(cls, root: str | Path, dataset: str) -> "Samples":
        """Open a dataset's samples.

        Raises:
            NotBuilt: the dataset has no samples in this root.
            Corrupt: a segment is missing or is no Arrow file.
        """
        directory = layout.samples_directory(layout.cache_root(root), dataset)
        return cls(directory, _head(directory, dataset))

    @classmethod
    def append(
        cls,
        root: str | Path,
        dataset: DatasetSpec,
        table: pl.DataFrame | pa.Table,
        rows_per_shard: int | None = None,
    ) -> "Samples":
        """Add the samples that are not there yet, in new segments; return the grown table.

        Args:
            root: cache root.
            dataset: name and key rule.
            table: columns sample_id, uri, offset, bytes, digest, width, height, labels (a JSON
                object as text, or a struct); other columns are refused. Order is kept.
            rows_per_shard: needed for a dataset's first samples; later it must be the same or None.

        Raises:
            ValueError: the table has other columns, no rows at all, or a sample_id twice.
            FingerprintMismatch: the dataset there has another key rule or rows_per_shard.
            StoreError: a sample_id is there with another image digest.
            Busy: another process is appending.
        """
        directory = layout.samples_directory(layout.cache_root(root), dataset.name)
        given = conform(table)
        there = read_head(directory, SamplesHead) if given.is_empty() else None
        if there is not None:  # nothing to add: neither a lock nor the right to write is wanted
            _check_same(directory, there.head, dataset, rows_per_shard)
            return cls.open(root, dataset.name)
        scratch = layout.scratch_directory(directory)
        with atomic.only_writer(directory, scratch):
            atomic.sweep(scratch)
            commit(
                directory,
                SamplesHead,
                lambda there: cls._grown(directory, there, dataset, given, rows_per_shard),
                scratch,
            )
        return cls.open(root, dataset.name)

    @classmethod
    def _grown(
        cls,
        directory: Path,
        there: HeadFile[SamplesHead] | None,
        dataset: DatasetSpec,
        given: pl.DataFrame,
        rows_per_shard: int | None,
    ) -> SamplesHead | None:
        """Write what is not there yet; return the HEAD that names it, or None if all is there."""
        start = 0
        if there is None:
            if rows_per_shard is None:
                raise ValueError(
                    f"rows_per_shard = None: the first samples of {dataset.name!r} fix it"
                )
            if rows_per_shard < 1:
                raise ValueError(f"rows_per_shard = {rows_per_shard}: wants at least 1")
            if given.is_empty():
                raise BadInput(f"no samples: dataset {dataset.name!r} needs at least one image")
            head = SamplesHead(dataset=dataset, rows_per_shard=rows_per_shard)
        else:
            head = there.head
            _check_same(directory, head, dataset, rows_per_shard)
            known = cls(directory, head)
            given = new_samples(given, known.table, str(directory))
            start = -(-known.num_rows // head.rows_per_shard) * head.rows_per_shard
        if given.is_empty():
            return None
        rows = pl.Series("row", np.arange(start, start + given.height, dtype=np.int64))
        numbered = given.with_columns(rows).select(SCHEMA.names)
        segments, version = list(head.segments), next_version(there)
        scratch = layout.scratch_directory(directory)
        most = max(SEGMENT_ROWS // head.rows_per_shard, 1) * head.rows_per_shard
        for first in range(0, given.height, most):
            part = numbered.slice(first, most).to_arrow().cast(SCHEMA)
            written = write_segment(directory, version, part, scratch)
            segments.append(SampleSegment(**written.model_dump(), start=start + first))
        return head.model_copy(update={"version": version, "segments": tuple(segments)})

    def __len__(self) -> int:
        """Number of samples (gaps left out)."""
        return int(self._offsets[-1])

    @cached_property
    def arrow(self) -> pa.Table:
        """The whole table, columns mapped from disk (SCHEMA)."""
        return pa.concat_tables(self._segments)

    @cached_property
    def table(self) -> pl.DataFrame:
        """The whole table in polars, `row` first; made on first use (it copies string headers)."""
        return frame(self.arrow)

    def shards(self) -> list[ShardRange]:
        """Every shard with its rows; a segment's last shard may be short."""
        per_shard = self.rows_per_shard
        return [
            ShardRange(row // per_shard, row, min(row + per_shard, start + length))
            for start, length in zip(self._starts.tolist(), self._lengths.tolist(), strict=True)
            for row in range(start, start + length, per_shard)
        ]

    def shard_stops(self) -> Rows:
        """One past the last row of every shard, int64 [shards]."""
        per_shard = self.rows_per_shard
        starts = np.arange(0, self.num_rows, per_shard)
        segment = np.searchsorted(self._starts, starts, side="right") - 1
        ends = self._starts[segment] + self._lengths[segment]
        return np.asarray(np.minimum(starts + per_shard, ends), np.int64)

    def shard_range(self, shard: int) -> ShardRange:
        """Return the rows of one shard.

        Raises:
            MissingSamples: no sample is in that shard.
        """
        start = shard * self.rows_per_shard
        segment = int(np.searchsorted(self._starts, start, side="right")) - 1
        end = int(self._starts[segment] + self._lengths[segment]) if segment >= 0 else 0
        if shard < 0 or start >= end:
            raise MissingSamples(f"{self.directory}: shard {shard} is beyond the last sample")
        return ShardRange(shard, start, min(start + self.rows_per_shard, end))

    def shard(self, shard: int) -> pl.DataFrame:
        """Return the samples of one shard (columns of SCHEMA), in row order."""
        return frame(self._slice(self.shard_range(shard)))

    def shard_digest(self, shard: int) -> str:
        """Digest of a shard's sample ids and image digests: what its features were made of."""
        part = self._slice(self.shard_range(shard))
        ids, digests = part["sample_id"].to_pylist(), part["digest"].to_pylist()
        text = json.dumps([ids, digests], separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the sample ids of rows, in the given order.

        Raises:
            MissingSamples: a row holds no sample.
        """
        return self.take(rows)["sample_id"].to_list()

    def take(self, rows: Sequence[int] | Rows) -> pl.DataFrame:
        """Return the samples of rows (columns of SCHEMA), in the given order.

        Raises:
            MissingSamples: a row holds no sample.
        """
        asked = np.asarray(rows, np.int64)
        segment = np.searchsorted(self._starts, asked, side="right") - 1
        inside = asked - self._starts[segment]
        wrong = (segment < 0) | (inside >= self._lengths[segment])
        if wrong.any():
            raise MissingSamples(f"{self.directory}: row {asked[wrong][0]} holds no sample")
        return frame(self._taken(segment, inside, SCHEMA.names))

    def at(self, places: Rows, columns: Sequence[str] = SCHEMA.names) -> pl.DataFrame:
        """Return samples by their place in the table, 0 to `len` - 1: gaps are not counted."""
        segment = np.searchsorted(self._offsets, places, side="right") - 1
        return frame(self._taken(segment, places - self._offsets[segment], columns))

    def _taken(self, segment: Rows, inside: Rows, columns: Sequence[str]) -> pa.Table:
        """Take rows segment by segment: of text in several pieces Arrow would join all first."""
        if len(self._segments) == 1:
            return self._segments[0].select(columns).take(arrow_tables.from_numpy(inside))
        order = np.argsort(segment, kind="stable")
        numbers, firsts = np.unique(segment[order], return_index=True)
        parts = [self._segments[0].select(columns).slice(0, 0)]
        for number, rows in zip(numbers, np.split(inside[order], firsts[1:]), strict=False):
            part = self._segments[number].select(columns)
            parts.append(part.take(arrow_tables.from_numpy(rows)))
        return pa.concat_tables(parts).take(arrow_tables.from_numpy(np.argsort(order)))

    def rows_of(self, sample_ids: Sequence[str]) -> Rows:
        """Return the row of each sample id, int64 [n], in the given order.

        Raises:
            MissingSamples: naming the ids that are not in the dataset.
        """
        asked = pl.Series("sample_id", sample_ids, dtype=pl.String)
        hashes, positions = self._index
        wanted = asked.hash().to_numpy()
        place = np.searchsorted(hashes, wanted)
        rows = np.full(len(asked), -1, np.int64)
        pending = np.arange(len(asked))
        while len(pending):  # a second round only where two ids share a 64-bit hash
            alive = place[pending] < len(hashes)
            alive[alive] = hashes[place[pending[alive]]] == wanted[pending[alive]]
            pending = pending[alive]
            at = positions[place[pending]]
            found = self.at(at, ["sample_id"])["sample_id"]
            same = (found == asked.gather(pending)).to_numpy()
            rows[pending[same]] = at[same]
            pending = pending[~same]
            place[pending] += 1
        if (rows < 0).any():
            missing = asked.filter(pl.Series(rows < 0)).to_list()
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            named = ", ".join(repr(name) for name in missing[:5])
            raise MissingSamples(
                f"{self.directory}: no sample {named}{more}; the dataset has {len(self)} samples"
            )
        segment = np.searchsorted(self._offsets, rows, side="right") - 1
        return np.asarray(self._starts[segment] + rows - self._offsets[segment], np.int64)

    @cached_property
    def _index(self) -> tuple[npt.NDArray[np.uint64], Rows]:
        """Sorted hashes of all sample ids and the table position of each: 16 bytes a sample."""
        hashes = pl.Series(self.arrow["sample_id"]).hash().to_numpy()
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _slice(self, shard: ShardRange) -> pa.Table:
        segment = int(np.searchsorted(self._starts, shard.start, side="right")) - 1
        return self._segments[segment].slice(shard.start - int(self._starts[segment]), len(shard))


def segment_files(root: str | Path, dataset: str) -> list[tuple[Path, str]]:
    """Return path and sha256 of every segment of a dataset, from its HEAD alone.

    Raises:
        NotBuilt: the dataset has no samples in this root.
    """
    directory = layout.samples_directory(layout.cache_root(root), dataset)
    return files(directory, _head(directory, dataset))


def num_rows_now(root: str | Path, dataset: str) -> int:
    """Return one past the last row of a dataset as it is now, from its HEAD alone.

    Raises:
        NotBuilt: the dataset has no samples in this root.
    """
    directory = layout.samples_directory(layout.cache_root(root), dataset)
    last = _head(directory, dataset).segments[-1]
    return last.start + last.rows


def _head(directory: Path, dataset: str) -> SamplesHead:
    found = read_head(directory, SamplesHead)
    if found is None:
        raise NotBuilt(f"{directory}: dataset {dataset!r} has no samples here; index it first")
    return found.head


def _check_same(
    directory: Path, head: SamplesHead, dataset: DatasetSpec, rows_per_shard: int | None
) -> None:
    """Refuse to add samples of another key rule, or with other shards."""
    there = head.model_dump(mode="json", include={"dataset", "rows_per_shard"})
    asked = there | {"dataset": dataset.model_dump(mode="json")}
    if rows_per_shard is not None:
        asked["rows_per_shard"] = rows_per_shard
    lines = fp.difference(asked, there)
    if lines:
        raise FingerprintMismatch(f"{directory}: asked != there", lines)
