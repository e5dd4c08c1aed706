"""The sample table of a dataset: which rows exist, shared by all stores of the dataset.

A sample keeps its row for ever. Samples are added in segments; a segment starts at a shard
boundary, so the rows between the end of one segment and the start of the next belong to no sample:
gaps, the same in every store (docs/design.md, laws 4 and 12).
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from cache.errors import FingerprintMismatch, MissingSamples, NotBuilt, StoreError
from cache.files import atomic
from cache.format import arrow_tables, layout
from cache.format.sample_table import (
    BLOCK_ROWS,
    DROPPED,
    GIVEN,
    HASHES,
    SOURCES,
    conform,
    frame,
    hash_table,
    id_hashes,
    in_full,
    is_stored,
    stored,
)
from cache.heads import Head, HeadFile, commit, files, next_version, read_head
from cache.sample_changes import compare, renewed
from cache.segments import Segment, map_segment, write_segment
from cache.shard_ranges import Rows, ShardRange, ShardRanges
from eupe import fingerprint as fp
from eupe.errors import BadInput
from eupe.spec import DatasetSpec

DROPPED_REASON = "dropped"
"""Why a row of a sample that was taken out has no features."""
SEGMENT_ROWS = 2_000_000
"""Samples of one segment at most: a column of its text has 2 GiB of room."""


class SampleSegment(Segment):
    """A segment of samples.

    Attributes:
        start: row of its first sample, the first of a shard.
        hashes: the table that finds its ids.
    """

    start: int
    hashes: Segment


class SamplesHead(Head):
    """HEAD of a sample table.

    Attributes:
        dataset: name and key rule.
        rows_per_shard: fixed when the dataset got its first samples.
        segments: their rows rise.
        sources: the table of what was indexed; None where nothing is to be recognised.
        dropped: the table of rows that were taken out; None: none were.
    """

    dataset: DatasetSpec
    rows_per_shard: int = Field(ge=1)
    segments: tuple[SampleSegment, ...] = ()
    sources: Segment | None = None
    dropped: Segment | None = None

    def pinned(self) -> list[Segment]:
        """Return every file that it names."""
        rest = [segment.hashes for segment in self.segments]
        rest += [each for each in (self.sources, self.dropped) if each is not None]
        return [*self.segments, *rest]


class Samples:
    """The sample table of one dataset, mapped from disk segment by segment as it is asked for.

    A segment is compared with its checksum when it is first touched.

    Attributes:
        directory: where its segments lie.
        dataset: name and key rule.
        rows_per_shard: rows in a full shard, fixed when the dataset got its first samples.
        num_rows: one past the last row (gaps included); the length of every patches array.
        starts: first row of each segment, int64 [segments].
        segment: number of a segment -> its table, as it is on disk.
    """

    def __init__(self, directory: Path, head: SamplesHead):
        """Use `Samples.open`."""
        self.directory = directory
        self.dataset = head.dataset
        self.rows_per_shard = head.rows_per_shard
        self._head = head
        self.starts = np.array([segment.start for segment in head.segments], np.int64)
        self._lengths = np.array([segment.rows for segment in head.segments], np.int64)
        self._offsets = np.concatenate(([0], np.cumsum(self._lengths)))
        self.num_rows = int(self.starts[-1] + self._lengths[-1])
        self.segment = cache(self._map_segment)
        self._hashes = cache(self._map_hashes)

    @classmethod
    def open(cls, root: str | Path, dataset: str) -> "Samples":
        """Open a dataset's samples.

        Raises:
            NotBuilt: the dataset has no samples in this root.
            Corrupt: its HEAD is damaged.
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
        sources: pa.Table | None = None,
    ) -> "Samples":
        """Add the samples that are not there yet, in new segments; return the grown table.

        Those that are there keep their rows. Where an equal image lies elsewhere now, or has
        other labels, that is renewed: the segment is written anew, under another name.

        Args:
            root: cache root.
            dataset: name and key rule.
            table: columns sample_id, uri, offset, bytes, digest, labels (a JSON object as text, or
                a struct); other columns are refused. Order is kept.
            rows_per_shard: needed for a dataset's first samples; later it must be the same or None.
            sources: what was indexed, all of it (SOURCES); None leaves what is there.

        Raises:
            ValueError: the table has other columns, no rows at all, or a sample_id twice.
            FingerprintMismatch: the dataset there has another key rule or rows_per_shard.
            StoreError: a sample_id is there with another image digest.
            Busy: another process is appending.
        """
        directory = layout.samples_directory(layout.cache_root(root), dataset.name)
        given = conform(table)
        there = read_head(directory, SamplesHead)
        if there is not None and not given.num_rows:
            _check_same(directory, there.head, dataset, rows_per_shard)
            opened = cls(directory, there.head)
            if sources is None or sources.equals(opened.sources()):
                return opened  # neither a lock nor the right to write is wanted
        scratch = layout.scratch_directory(directory)
        with atomic.only_writer(directory, scratch):
            atomic.sweep(scratch)
            commit(
                directory,
                SamplesHead,
                lambda there: _grown(directory, there, dataset, given, rows_per_shard, sources),
                scratch,
            )
        return cls.open(root, dataset.name)

    @cached_property
    def dropped(self) -> Rows:
        """Rows that were taken out (`dropping.listed`), int64, rising."""
        if self._head.dropped is None:
            return np.empty(0, np.int64)
        table = map_segment(self.directory, self._head.dropped, DROPPED)
        return np.asarray(arrow_tables.to_numpy(table["dropped"]), np.int64)

    def __len__(self) -> int:
        """Number of samples (gaps left out)."""
        return int(self._offsets[-1])

    @cached_property
    def table(self) -> pl.DataFrame:
        """The whole table in memory (GIVEN), `row` before it; for tables that are small."""
        rows = [np.arange(s.start, s.start + s.rows) for s in self._head.segments]
        return self.at(np.arange(len(self))).insert_column(
            0, pl.Series("row", np.concatenate(rows))
        )

    def sources(self) -> pa.Table:
        """Return what was indexed (SOURCES), mapped from disk."""
        if self._head.sources is None:
            return SOURCES.empty_table()
        return map_segment(self.directory, self._head.sources, SOURCES)

    def shards(self) -> ShardRanges:
        """Every shard with its rows; a segment's last shard may be short."""
        per_shard, ends = self.rows_per_shard, self.starts + self._lengths
        starts = np.concatenate(
            [np.arange(*span, per_shard) for span in zip(self.starts, ends, strict=True)]
        )
        numbers = starts // per_shard
        return ShardRanges(numbers, starts, self.shard_stops(numbers))

    def shard_stops(self, shards: npt.NDArray[np.integer]) -> Rows:
        """Return one past the last row of shards, int64 [n]; -1 where no sample is in one."""
        starts = np.asarray(shards, np.int64) * self.rows_per_shard
        segment = np.searchsorted(self.starts, starts, side="right") - 1
        ends = self.starts[segment] + self._lengths[segment]
        there = (segment >= 0) & (starts < ends)
        return np.where(there, np.minimum(starts + self.rows_per_shard, ends), -1)

    def shard_range(self, shard: int) -> ShardRange:
        """Return the rows of one shard.

        Raises:
            MissingSamples: no sample is in that shard.
        """
        start = shard * self.rows_per_shard
        segment = int(np.searchsorted(self.starts, start, side="right")) - 1
        end = int(self.starts[segment] + self._lengths[segment]) if segment >= 0 else 0
        if shard < 0 or start >= end:
            raise MissingSamples(f"{self.directory}: shard {shard} is beyond the last sample")
        return ShardRange(shard, start, min(start + self.rows_per_shard, end))

    def shard(self, shard: int) -> pl.DataFrame:
        """Return the samples of one shard (columns of GIVEN), in row order; see `take`."""
        span = self.shard_range(shard)
        return self.take(np.arange(span.start, span.stop))

    def shard_digest(self, shard: int) -> str:
        """Digest of a shard's sample ids and image digests: what its features were made of."""
        span = self.shard_range(shard)
        number = int(np.searchsorted(self.starts, span.start, side="right")) - 1
        part = self.segment(number).slice(span.start - self.starts[number], len(span))
        ids = part["sample_id"].to_pylist()
        digests = [digest.hex() for digest in part["digest"].to_pylist()]
        text = json.dumps([ids, digests], separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def sample_ids(self, rows: Sequence[int] | Rows) -> list[str]:
        """Return the sample ids of rows, in the given order.

        Raises:
            MissingSamples: a row holds no sample.
        """
        return self.take(rows)["sample_id"].to_list()

    def take(self, rows: Sequence[int] | Rows) -> pl.DataFrame:
        """Return the samples of rows (columns of GIVEN), in the given order.

        The `uri` of samples that were taken out is null.

        Raises:
            MissingSamples: a row holds no sample.
        """
        asked = np.asarray(rows, np.int64)
        segment = np.searchsorted(self.starts, asked, side="right") - 1
        inside = asked - self.starts[segment]
        wrong = (segment < 0) | (inside >= self._lengths[segment])
        if wrong.any():
            raise MissingSamples(f"{self.directory}: row {asked[wrong][0]} holds no sample")
        return _shown(self._taken(segment, inside), asked, self.dropped)

    def at(self, places: Rows) -> pl.DataFrame:
        """Return samples by their place in the table, 0 to `len` - 1: gaps are not counted."""
        segment = np.searchsorted(self._offsets, places, side="right") - 1
        inside = places - self._offsets[segment]
        return _shown(self._taken(segment, inside), self.starts[segment] + inside, self.dropped)

    def _taken(self, segment: Rows, inside: Rows) -> pa.Table:
        """Take rows segment by segment: of text in several pieces Arrow would join all first."""
        order = np.argsort(segment, kind="stable")
        numbers, firsts = np.unique(segment[order], return_index=True)
        parts = [GIVEN.empty_table()]
        for number, rows in zip(
            numbers.tolist(), np.split(inside[order], firsts[1:]), strict=False
        ):
            taken = self.segment(number).take(arrow_tables.from_numpy(rows))
            parts.append(in_full(taken))
        return pa.concat_tables(parts).take(arrow_tables.from_numpy(np.argsort(order)))

    def rows_of(self, sample_ids: Sequence[str]) -> Rows:
        """Return the row of each sample id, int64 [n], in the given order.

        Raises:
            MissingSamples: naming the ids that are not in the dataset.
        """
        asked = pa.array(sample_ids, pa.string())
        rows = self.find(asked)
        if missing := [name for name, row in zip(sample_ids, rows, strict=True) if row < 0]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            named = ", ".join(repr(name) for name in missing[:5])
            raise MissingSamples(
                f"{self.directory}: no sample {named}{more}; the dataset has {len(self)} samples"
            )
        return rows

    def find(self, sample_ids: pa.Array | pa.ChunkedArray) -> Rows:
        """Return the row of each sample id, int64 [n]; -1 where the dataset has no such sample."""
        if len(sample_ids) > BLOCK_ROWS:
            blocks = range(0, len(sample_ids), BLOCK_ROWS)
            return np.concatenate([self.find(sample_ids.slice(at, BLOCK_ROWS)) for at in blocks])
        rows = np.full(len(sample_ids), -1, np.int64)
        if not len(rows):
            return rows
        hashes = id_hashes(self.dataset.name, sample_ids)
        lowest, highest = int(hashes.min()), int(hashes.max())
        for number, segment in enumerate(self._head.segments):
            first, last = _hash_range(self.directory, segment.hashes)
            if highest < first or last < lowest:
                continue
            there, places = self._hashes(number)
            pending = np.flatnonzero((rows < 0) & (hashes >= there[0]) & (hashes <= there[-1]))
            at = np.searchsorted(there, hashes[pending])
            while len(pending):  # a second round only where two ids share a 64-bit hash
                alive = at < len(there)
                alive[alive] = there[at[alive]] == hashes[pending[alive]]
                pending, at = pending[alive], at[alive]
                if not len(pending):
                    break
                inside = arrow_tables.from_numpy(places[at].astype(np.int64))
                found = self.segment(number)["sample_id"].take(inside)
                wanted = sample_ids.take(arrow_tables.from_numpy(pending))
                same = np.asarray(pc.equal(found, wanted))
                rows[pending[same]] = segment.start + places[at[same]]
                pending, at = pending[~same], at[~same] + 1
        return rows

    def _map_segment(self, number: int) -> pa.Table:
        segment = self._head.segments[number]
        try:
            return map_segment(self.directory, segment, is_stored)
        except NotBuilt:
            # A builder has noted where its images are now: the same rows, in another file.
            now = read_head(self.directory, SamplesHead)
            for other in () if now is None else now.head.segments:
                if (other.start, other.hashes) == (segment.start, segment.hashes):
                    return map_segment(self.directory, other, is_stored)
            raise

    def _map_hashes(self, number: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
        table = map_segment(self.directory, self._head.segments[number].hashes, HASHES)
        return arrow_tables.to_numpy(table["hash"]), arrow_tables.to_numpy(table["place"])


@lru_cache(maxsize=1 << 16)
def _hash_range(directory: Path, hashes: Segment) -> tuple[int, int]:
    """Return the lowest and the highest hash of a segment's ids.

    Kept for the process: indexing adds segments in the order of hashes, each to a table that it
    opens anew, and would compare all earlier ones with their checksums for each.
    """
    there = arrow_tables.to_numpy(map_segment(directory, hashes, HASHES)["hash"])
    return int(there[0]), int(there[-1])


def _grown(
    directory: Path,
    there: HeadFile[SamplesHead] | None,
    dataset: DatasetSpec,
    given: pa.Table,
    rows_per_shard: int | None,
    sources: pa.Table | None,
) -> SamplesHead | None:
    """Write what is not there yet; return the HEAD that names it, or None if all is there."""
    version, scratch = next_version(there), layout.scratch_directory(directory)

    def written(table: pa.Table) -> Segment:
        return write_segment(directory, version, table, scratch)

    start, new = 0, given
    if there is None:
        head = _first_head(dataset, given, rows_per_shard)
        sources_there = SOURCES.empty_table()
    else:
        head = there.head
        _check_same(directory, head, dataset, rows_per_shard)
        opened = Samples(directory, head)
        new, moved, rows, changed = compare(opened, given)
        if changed:
            name, *_, said = changed[0]
            raise StoreError(f"{directory}: sample {name!r} {said}")
        segments = list(head.segments)
        for number, whole in renewed(opened, moved, rows, scratch):
            before = segments[number]
            file = written(stored(whole, before.start, scratch)).model_dump()
            segments[number] = before.model_copy(update=file)
        head = head.model_copy(update={"segments": tuple(segments)})
        start = -(-opened.num_rows // head.rows_per_shard) * head.rows_per_shard
        sources_there = opened.sources()
    most = max(SEGMENT_ROWS // head.rows_per_shard, 1) * head.rows_per_shard
    for first in range(0, new.num_rows, most):
        part = new.slice(first, most)
        hashes = written(hash_table(dataset.name, part["sample_id"], scratch))
        file = written(stored(part, start + first, scratch)).model_dump()
        segment = SampleSegment(**file, start=start + first, hashes=hashes)
        head = head.model_copy(update={"segments": (*head.segments, segment)})
    if sources is not None and not sources.equals(sources_there):
        head = head.model_copy(update={"sources": written(sources)})
    if there is not None and head == there.head:
        return None
    return head.model_copy(update={"version": version})


def _first_head(dataset: DatasetSpec, given: pa.Table, rows_per_shard: int | None) -> SamplesHead:
    if rows_per_shard is None:
        raise ValueError(f"rows_per_shard = None: the first samples of {dataset.name!r} fix it")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard = {rows_per_shard}: wants at least 1")
    if not given.num_rows:
        raise BadInput(f"no samples: dataset {dataset.name!r} needs at least one image")
    return SamplesHead(dataset=dataset, rows_per_shard=rows_per_shard)


def _shown(table: pa.Table, rows: Rows, dropped: Rows) -> pl.DataFrame:
    """Return samples of rows as a frame; of those that were taken out, `uri` is null."""
    shown = frame(table)
    if not len(dropped):
        return shown
    there = pl.Series(~np.isin(rows, dropped))
    return shown.with_columns(pl.when(there).then(pl.col("uri")).alias("uri"))


def segment_files(root: str | Path, dataset: str) -> list[tuple[Path, str]]:
    """Return path and sha256 of every file that a dataset's HEAD names.

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
