"""The table of a manifest's records: one a committed shard, a digest in 32 bytes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cache.format import arrow_tables

Key = tuple[int, int]
"""View and shard: what records are sorted by, then by version."""
FIRST_KEY, END_KEY = (-1, -1), (2**31 - 1, 2**31 - 1)
"""Before and beyond all keys."""


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What a committed shard is.

    Attributes:
        view: view number.
        shard: shard number.
        start: first row.
        stop: one past the last row.
        num_valid: rows whose features are there.
        num_escapes: tokens stored at higher precision.
        samples_digest: of the sample ids and image digests the features were made of.
        patches_bytes: size of the Zarr shard file.
        patches_sha256: its checksum.
        rows_bytes: size of the table of rows.
        rows_sha256: its checksum.
        provenance: library versions, device, compute batch; canonical JSON. Never identity.
    """

    view: int
    shard: int
    start: int
    stop: int
    num_valid: int
    num_escapes: int
    samples_digest: str
    patches_bytes: int
    patches_sha256: str
    rows_bytes: int
    rows_sha256: str
    provenance: str

    @property
    def num_invalid(self) -> int:
        """Rows recorded as invalid, with their reason in the table of rows."""
        return self.stop - self.start - self.num_valid


SCHEMA = pa.schema(
    {
        "version": pa.int32(),
        "view": pa.int32(),
        "shard": pa.int32(),
        "start": pa.int64(),
        "stop": pa.int64(),
        "num_valid": pa.int32(),
        "num_escapes": pa.int32(),
        "samples_digest": pa.binary(32),
        "patches_bytes": pa.int64(),
        "patches_sha256": pa.binary(32),
        "rows_bytes": pa.int64(),
        "rows_sha256": pa.binary(32),
        "provenance": pa.dictionary(pa.int32(), pa.string()),
    }
)
"""Columns of a part; `version` is that of the commit that made the record."""
DIGESTS = "samples_digest", "patches_sha256", "rows_sha256"


def table_of(records: Sequence[ShardRecord], versions: Sequence[int]) -> pa.Table:
    """Return records as a table (SCHEMA), in the given order.

    Args:
        records: one a committed shard.
        versions: of the commit that made each.
    """
    rows = [asdict(record) for record in records]
    columns: dict[str, pa.Array] = {"version": pa.array(versions, pa.int32())}
    for field in list(SCHEMA)[1:]:
        values = [row[field.name] for row in rows]
        if field.name in DIGESTS:
            values = [bytes.fromhex(value) for value in values]
        columns[field.name] = (
            pa.array(values, pa.string()).dictionary_encode()
            if pa.types.is_dictionary(field.type)
            else pa.array(values, field.type)
        )
    return pa.table(columns, schema=SCHEMA)


def records_of(table: pa.Table) -> list[ShardRecord]:
    """Return the rows of a table (SCHEMA) as records: the opposite of `table_of`."""
    rows = table.drop_columns(["version"]).to_pylist()
    for row in rows:
        for name in DIGESTS:
            row[name] = row[name].hex()
    return [ShardRecord(**row) for row in rows]


def joined(tables: Sequence[pa.Table]) -> pa.Table:
    """Return tables of sorted records as one, sorted by view, shard and version."""
    if len(tables) == 1:
        return tables[0]
    table = pa.concat_tables(tables).combine_chunks()
    version, view, shard = (arrow_tables.to_numpy(table[n]) for n in ("version", "view", "shard"))
    order = np.lexsort((version, shard, view))
    if (np.diff(order) == 1).all():
        return table
    return table.take(arrow_tables.from_numpy(order))


def latest(table: pa.Table, version: int) -> pa.Table:
    """Return of sorted records those of at most a version, the last one a (view, shard)."""
    committed, view, shard = (arrow_tables.to_numpy(table[n]) for n in ("version", "view", "shard"))
    known = np.flatnonzero(committed <= version)
    view, shard = view[known], shard[known]
    last = np.ones(len(known), bool)
    last[:-1] = (view[1:] != view[:-1]) | (shard[1:] != shard[:-1])
    if last.all() and len(known) == table.num_rows:
        return table  # stays mapped
    return table.take(arrow_tables.from_numpy(known[last]))


class SortedRecords:
    """A table of records (SCHEMA) sorted by view, shard and version, searched without a copy."""

    def __init__(self, table: pa.Table, forget: Callable[[], None] = lambda: None):
        """Keep the columns that are searched as arrays.

        Args:
            table: in one piece.
            forget: lets go of the pages that are in memory, if it is mapped.
        """
        self.table, self.forget = table, forget
        self._version: npt.NDArray[np.int32] = arrow_tables.to_numpy(table["version"])
        self._view: npt.NDArray[np.int32] = arrow_tables.to_numpy(table["view"])
        self._shard: npt.NDArray[np.int32] = arrow_tables.to_numpy(table["shard"])

    def position(self, key: Key) -> int:
        """Return the first row whose key is not before this one."""
        view, shard = np.array(key, np.int32)  # of the columns' type: another would copy them
        begin = int(self._view.searchsorted(view))
        end = int(self._view.searchsorted(view, "right"))
        return begin + int(self._shard[begin:end].searchsorted(shard))

    def find(self, view: int, shard: int, version: int) -> ShardRecord | None:
        """Return a shard's latest record of at most a version; None if there is none."""
        begin, end = self.position((view, shard)), self.position((view, shard + 1))
        known = int((self._version[begin:end] <= version).sum())
        if not known:
            return None
        return records_of(self.table.slice(begin + known - 1, 1))[0]

    def find_after(self, view: int, shard: int, version: int) -> ShardRecord | None:
        """Return a shard's earliest record after a version; None if there is none."""
        begin, end = self.position((view, shard)), self.position((view, shard + 1))
        first = begin + int((self._version[begin:end] <= version).sum())
        return records_of(self.table.slice(first, 1))[0] if first < end else None

    def between(self, low: Key, high: Key) -> pa.Table:
        """Return the records with low <= key < high."""
        begin, end = self.position(low), self.position(high)
        return self.table.slice(begin, end - begin)

    def cut(self, num_rows: int) -> int:
        """Return the last row at or before one where a key begins, or the first after it."""
        same = (np.diff(self._view) == 0) & (np.diff(self._shard) == 0)
        begins = np.concatenate(([0], np.flatnonzero(~same) + 1, [self.table.num_rows]))
        before = begins[(begins > 0) & (begins <= num_rows)]
        return int(before[-1] if len(before) else begins[1])
