"""Sorted runs of shard records: looked up, streamed and merged without ever being held whole.

    run     the records of a commit, or of several that were merged, sorted by view, shard, version
    part    a file of at most PART_RECORDS of them; only those that are touched are mapped

Runs may overlap; the later one has the later records.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import pyarrow as pa

from cache.format.record_table import (
    END_KEY,
    FIRST_KEY,
    SCHEMA,
    Key,
    ShardRecord,
    SortedRecords,
    joined,
    latest,
)
from cache.segments import Segment, open_segment, write_segment

PART_RECORDS = 16_384
"""Of 150 bytes: checking a part when it is first touched takes 3 ms, and HEAD names few."""
MERGE_AT = 8
"""So many runs of about one size become one: n commits make O(log n) runs."""


class Part(Segment):
    """A part as HEAD names it.

    Attributes:
        run: version of the commit that wrote its run.
        first: view and shard of its first record.
        last: view and shard of its last record.
    """

    run: int
    first: Key
    last: Key


class Runs:
    """The runs that a HEAD names; parts are mapped when first touched, and stay so."""

    def __init__(self, directory: Path, parts: Sequence[Part]):
        """Open nothing yet.

        Args:
            directory: where the parts lie.
            parts: run after run, in each by key.
        """
        self._directory = directory
        self._runs = [tuple(run) for _, run in groupby(parts, lambda part: part.run)]
        self._lasts = {id(run): [part.last for part in run] for run in self._runs}
        self._open: dict[str, SortedRecords] = {}

    def find(self, view: int, shard: int, version: int) -> ShardRecord | None:
        """Return a shard's record as of a version; None if there is none.

        Raises:
            NotBuilt: a part is gone.
            Corrupt: a part is not what HEAD names.
        """
        found = (
            records.find(view, shard, version)
            for records in self._holding((view, shard), reversed(self._runs))
        )
        return next((record for record in found if record is not None), None)

    def find_after(self, view: int, shard: int, version: int) -> ShardRecord | None:
        """Return a shard's earliest record after a version; None if there is none.

        Raises:
            NotBuilt: a part is gone.
            Corrupt: a part is not what HEAD names.
        """
        found = (
            records.find_after(view, shard, version)
            for records in self._holding((view, shard), self._runs)
        )
        return next((record for record in found if record is not None), None)

    def latest(
        self, version: int, low: Key = FIRST_KEY, high: Key = END_KEY
    ) -> Iterator[tuple[Key, pa.Table]]:
        """Yield the records as of a version with low <= key < high, sorted, about a part at a time.

        Yields:
            where the next table begins, and a table (SCHEMA) of one record a (view, shard).

        Raises:
            NotBuilt: a part is gone.
            Corrupt: a part is not what HEAD names.
        """
        for end, table in self._joined(self._runs, low, high):
            yield end, latest(table, version)

    def appended(self, table: pa.Table, version: int, scratch: Path) -> tuple[Part, ...]:
        """Write a commit's records as a run, merged with the last ones if they are no larger.

        So each record is rewritten at most log_MERGE_AT(n) times.

        Args:
            table: the records (SCHEMA), sorted.
            version: of the commit.
            scratch: for files while they are written.

        Returns:
            The parts that the next HEAD names.

        Raises:
            NotBuilt: a part is gone.
            Corrupt: a part is not what HEAD names.
            StoreError: a part cannot be written.
        """
        kept, rows = len(self._runs), table.num_rows
        while kept >= MERGE_AT - 1:
            sizes = [_num_rows(run) for run in self._runs[kept - MERGE_AT + 1 : kept]]
            if max(sizes) > rows:
                break
            kept, rows = kept - MERGE_AT + 1, rows + sum(sizes)
        merged = self._runs[kept:]
        tables = (table for _, table in self._joined(merged, FIRST_KEY, END_KEY, table))
        named = tuple(part for run in self._runs[:kept] for part in run)
        return named + write_run(self._directory, tables, version, scratch)

    def _joined(
        self,
        runs: Sequence[tuple[Part, ...]],
        low: Key,
        high: Key,
        more: pa.Table | None = None,
    ) -> Iterator[tuple[Key, pa.Table]]:
        """Yield all records of runs, and more that are sorted, range after range of keys.

        A range ends where a part of any run begins: it holds no more than one part of each.
        """
        edges = {part.first for run in runs for part in run if low < part.first < high}
        own = None if more is None else SortedRecords(more)
        for begin, end in pairwise([low, *sorted(edges), high]):
            touched = [records for run in runs for records in self._touched(run, begin, end)]
            pieces = [records.between(begin, end) for records in touched]
            if own is not None:
                pieces.append(own.between(begin, end))
            pieces = [piece for piece in pieces if piece.num_rows]
            if pieces:
                yield end, joined(pieces)
            for records in touched:
                records.forget()

    def _holding(self, key: Key, runs: Iterable[tuple[Part, ...]]) -> Iterator[SortedRecords]:
        """Yield the part of each run that may hold records of a shard."""
        for run in runs:
            place = bisect_left(self._lasts[id(run)], key)
            if place < len(run) and run[place].first <= key:
                records = self._records(run[place])
                try:
                    yield records
                finally:
                    records.forget()

    def _touched(self, run: tuple[Part, ...], low: Key, high: Key) -> Iterator[SortedRecords]:
        """Yield the parts of a run that may hold records with low <= key < high."""
        for part in run[bisect_left(self._lasts[id(run)], low) :]:
            if part.first >= high:
                break
            yield self._records(part)

    def _records(self, part: Part) -> SortedRecords:
        found = self._open.get(part.name)
        if found is None:
            table, file = open_segment(self._directory, part, SCHEMA)
            found = self._open[part.name] = SortedRecords(table, file.forget)
        return found


def write_run(
    directory: Path, tables: Iterable[pa.Table], version: int, scratch: Path
) -> tuple[Part, ...]:
    """Write sorted records as the parts of one run; a (view, shard) lies in one part.

    Args:
        directory: where parts lie.
        tables: the records (SCHEMA), all in order.
        version: of the commit.
        scratch: for files while they are written.
    """
    parts: list[Part] = []
    pending = SCHEMA.empty_table()

    def write(table: pa.Table) -> None:
        written = write_segment(directory, version, table, scratch)
        first, last = ((table["view"][row].as_py(), table["shard"][row].as_py()) for row in (0, -1))
        parts.append(Part(**written.model_dump(), run=version, first=first, last=last))

    for table in tables:
        pending = _in_one_piece([pending, table])
        while pending.num_rows > PART_RECORDS:
            cut = SortedRecords(pending).cut(PART_RECORDS)
            write(pending.slice(0, cut))
            pending = pending.slice(cut)
    if pending.num_rows:
        write(pending)
    return tuple(parts)


def _in_one_piece(tables: Sequence[pa.Table]) -> pa.Table:
    tables = [table for table in tables if table.num_rows]
    if len(tables) < 2:
        return tables[0] if tables else SCHEMA.empty_table()
    return pa.concat_tables(tables).combine_chunks()


def _num_rows(run: tuple[Part, ...]) -> int:
    return sum(part.rows for part in run)
