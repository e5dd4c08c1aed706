"""The listing: what indexing has found, kept in scratch until all of it is, and then put in order.

    <sha256>.arrow    samples of some whole pieces of a source, in the order of their hashes

Nothing is a sample before the whole source was looked at: then all are added, in the order of the
hashes of their ids. A tar often holds a class or a day; by hash a shard holds a bit of everything.
Killed, indexing goes on with the parts that are there. In memory are a part and what is merged,
never all samples: what is in order already lies in a file without a name. Two builders may index at
once and share the folder: whoever is done first takes the parts away, and the other one keeps
those that it has mapped.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import NotBuilt
from cache.files import atomic
from cache.format import arrow_tables, on_disk
from cache.format.sample_table import GIVEN, SOURCES, id_hashes
from eupe.errors import BadInput
from pipelines.images.looker import Part
from pipelines.images.walks import Piece
from pipelines.recipe.config import ROW_KEY

MERGED_ROWS = 50_000
"""Samples that are merged at once, about."""
MERGED_PARTS = 256
"""Parts that are merged at once; of more, so many and so many become one first."""
TAKEN_ROWS = 16_384
"""Samples of a part that are put in their order at once."""
_SOURCES = b"sources"
_SCHEMA = GIVEN.append(pa.field("hash", pa.uint64()))


class Listing:
    """Parts of a listing, on disk.

    Args:
        directory: of the parts.
        dataset: whose samples they shall be.
        wanted: pieces of the source to be looked at; what is there of others is dropped.
        keep: False: in memory alone, where the cache root may only be read.

    Attributes:
        missing: of the pieces, those that no part has.
    """

    def __init__(self, directory: Path, dataset: str, wanted: Sequence[Piece], keep: bool = True):
        self._directory, self._dataset, self._keep = directory, dataset, keep
        keys = {_key(piece) for piece in wanted}
        self._parts: list[pa.Table] = []
        for path in sorted(directory.glob("*.arrow")) if keep else ():
            try:
                part = arrow_tables.map_table(path, sha256=path.stem)
            except NotBuilt:  # another builder is done with it
                continue
            if {(uri, size, stamp) for uri, size, stamp, _ in _sources(part)} <= keys:
                self._parts.append(part)
            else:
                path.unlink(missing_ok=True)
        done = {(uri, size, stamp) for uri, size, stamp, _ in self._all_sources()}
        self.missing = [piece for piece in wanted if _key(piece) not in done]

    def add(self, part: Part) -> None:
        """Keep a part.

        Raises:
            StoreError: it cannot be written.
        """
        hashes = id_hashes(self._dataset, part.records["sample_id"])
        table = part.records.append_column("hash", arrow_tables.from_numpy(hashes))
        table = self._taken(table, np.argsort(hashes, kind="stable"))
        rows = list(zip(*part.sources.to_pydict().values(), strict=True))
        said = json.dumps(rows, ensure_ascii=False).encode()
        table = table.replace_schema_metadata({_SOURCES: said})
        if not self._keep:
            self._parts.append(table)
            return
        pieces, digest = arrow_tables.to_pieces(table), hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        path = self._directory / f"{digest.hexdigest()}.arrow"
        atomic.write(path, pieces, self._directory.parent)
        try:
            kept = arrow_tables.map_table(path, sha256=path.stem)
        except NotBuilt:  # another builder is done with all parts, this one among them
            kept = arrow_tables.parse_table(pa.py_buffer(b"".join(pieces)), str(path))
        self._parts.append(kept)

    def _taken(self, table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
        """Take rows, in one piece; where they are many they lie in files, but for some of them."""
        if not self._keep or len(rows) <= TAKEN_ROWS:
            return table.take(arrow_tables.from_numpy(rows)).combine_chunks()
        whole, scratch = on_disk.combined(table, self._directory.parent), self._directory.parent
        taken = (
            whole.take(arrow_tables.from_numpy(rows[first : first + TAKEN_ROWS]))
            for first in range(0, len(rows), TAKEN_ROWS)
        )
        kept = on_disk.Kept(taken, whole.schema, scratch)
        return on_disk.combined(pa.concat_tables([whole.slice(0, 0), *kept]), scratch)

    def sources(self) -> pa.Table:
        """Return the pieces that were looked at (SOURCES)."""
        columns = list(zip(*self._all_sources(), strict=True)) or [()] * len(SOURCES)
        return pa.table([list(column) for column in columns], schema=SOURCES)

    @cached_property
    def in_order(self) -> Iterable[pa.Table]:
        """All samples (GIVEN) in the order of their hashes, some in each table; all on disk.

        Raises:
            BadInput: two have one id.
            StoreError: there is no room for them.
        """
        runs: list[_Run] = [_Run(part.num_rows, [part]) for part in self._parts]
        while len(runs) > MERGED_PARTS:
            some = [runs[at : at + MERGED_PARTS] for at in range(0, len(runs), MERGED_PARTS)]
            runs = [_Run(sum(map(len, each)), self._kept(_merged(each), _SCHEMA)) for each in some]
        return self._kept(map(_samples, _merged(runs)), GIVEN)

    def _kept(self, tables: Iterator[pa.Table], schema: pa.Schema) -> Iterable[pa.Table]:
        if not self._keep or not self._parts:  # nothing new: nothing is touched
            return list(tables)
        return on_disk.Kept(tables, schema, self._directory.parent)

    def remove(self) -> None:
        """Drop the parts: all of it is in the sample table. Another builder may use the folder."""
        for path in self._directory.glob("*.arrow") if self._keep else ():
            path.unlink(missing_ok=True)

    def _all_sources(self) -> list[tuple[str, int, str, str]]:
        return [row for part in self._parts for row in _sources(part)]


def _key(piece: Piece) -> tuple[str, int, str]:
    return piece.uri, piece.bytes, piece.stamp


def _sources(part: pa.Table) -> list[tuple[str, int, str, str]]:
    return [(*row,) for row in json.loads(part.schema.metadata[_SOURCES])]


class _Run:
    """Samples (_SCHEMA) in the order of their hashes, read once from the first to the last.

    Args:
        num_rows: of all tables.
        tables: one after another.
    """

    def __init__(self, num_rows: int, tables: Iterable[pa.Table]) -> None:
        self._num_rows, self._tables = num_rows, iter(tables)
        self._rest = _SCHEMA.empty_table()

    def __len__(self) -> int:
        return self._num_rows

    def up_to(self, last: int) -> Iterator[pa.Table]:
        """Yield what was not read yet, up to a hash."""
        while True:
            hashes = arrow_tables.to_numpy(self._rest["hash"])
            stop = int(np.searchsorted(hashes, np.uint64(last), side="right"))
            if stop:
                yield self._rest.slice(0, stop)
            self._rest = self._rest.slice(stop)
            if self._rest.num_rows or (following := next(self._tables, None)) is None:
                return
            self._rest = following


def _merged(runs: Sequence[_Run]) -> Iterator[pa.Table]:
    """Merge runs slice by slice; nothing here holds one while the next is made."""
    num_slices = max(sum(map(len, runs)) // MERGED_ROWS, 1)
    for number in range(1, num_slices + 1):
        last = (number << 64) // num_slices - 1
        pieces = [_SCHEMA.empty_table(), *(piece for run in runs for piece in run.up_to(last))]
        merged = pa.concat_tables(pieces).replace_schema_metadata()
        yield merged.sort_by([("hash", "ascending"), ("sample_id", "ascending")])


def _samples(merged: pa.Table) -> pa.Table:
    """Return what was merged as samples (GIVEN).

    Raises:
        BadInput: two have one id.
    """
    table = merged.select(GIVEN.names)
    _check_unique(table)
    return table


def _check_unique(table: pa.Table) -> None:
    """Refuse two samples of one id; they are neighbours.

    Raises:
        BadInput: naming both places.
    """
    ids = table["sample_id"].combine_chunks()
    if len(ids) < 2 or not pc.any(pc.equal(ids[1:], ids[:-1])).as_py():
        return
    first = pc.index(pc.equal(ids[1:], ids[:-1]), True).as_py()
    one, other = table.slice(first, 2).sort_by([("uri", "ascending")]).to_pylist()
    raise BadInput(
        f"sample_id {one['sample_id']!r} is both {one['uri']} at {one['offset']} and "
        f"{other['uri']} at {other['offset']}; ids must be unique. The path "
        "without its extension is the id; source.key=shard adds the name of a tar, "
        f"source.key_column={ROW_KEY} takes a Parquet file's name and row"
    )
