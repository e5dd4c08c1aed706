"""The table of one shard's rows: ids, validity, digests, view parameters and summaries.

One record a row of the shard, in row order:

    sample_id    string
    valid        bool                   false: no patches, summary is NaN
    reason       string, null if valid  why it is not
    view_digest  string                 of the view's canvas pixels; null if there was no canvas
    parameters   string                 of the view, JSON; null likewise
    summary      float32 [D]            always full precision

then, in stores of a quantised codec, the tokens it serves badly (cache/codec/quantised.py):

    escape_token   list of int32        places of the row's escaped tokens, rising
    escape_values  list of float32      their features, one token after the other

and last

    crc32c       uint32, null where not valid   of the row's patches, as its shard has it
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.codec.encoded import Escapes
from cache.format import arrow_tables

Floats = npt.NDArray[np.float32]


ESCAPE_FIELDS = (
    ("escape_token", pa.list_(pa.int32())),
    ("escape_values", pa.list_(pa.float32())),
)


CHECKSUM_FIELD = pa.field("crc32c", pa.uint32())


def given_schema(summary_dim: int) -> pa.Schema:
    """Return the columns that a row's maker knows, for summaries of that width."""
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("valid", pa.bool_()),
            ("reason", pa.string()),
            ("view_digest", pa.string()),
            ("parameters", pa.string()),
            ("summary", pa.list_(pa.float32(), summary_dim)),
        ]
    )


def schema(summary_dim: int, escapes: bool = False) -> pa.Schema:
    """Return the columns that are stored, with or without those of escapes."""
    added = [*(pa.field(*field) for field in ESCAPE_FIELDS if escapes), CHECKSUM_FIELD]
    return pa.schema([*given_schema(summary_dim), *added])


def make(
    sample_ids: Sequence[str],
    reasons: Sequence[str | None],
    view_digests: Sequence[str | None],
    parameters: Sequence[str | None],
    summary: Floats,
) -> pa.Table:
    """Build the table; a row with a reason, or with a summary that is not finite, is invalid.

    Args:
        sample_ids: [n], in row order.
        reasons: [n], None for rows that are fine.
        view_digests: [n].
        parameters: [n], JSON.
        summary: float32 [n, D]; what invalid rows hold does not matter.

    Raises:
        ValueError: a column has another length, or a fine row has no view digest.
    """
    num_rows = len(sample_ids)
    summary = np.array(summary, np.float32, order="C")
    lengths = {
        "reasons": len(reasons),
        "view_digests": len(view_digests),
        "parameters": len(parameters),
        "summary": len(summary),
    }
    for name, length in lengths.items():
        if length != num_rows:
            raise ValueError(f"{name}: {length} entries for {num_rows} rows")
    finite = np.asarray(np.isfinite(summary).all(axis=1))
    told = [
        reason or (None if fine else "summary is not finite")
        for reason, fine in zip(reasons, finite.tolist(), strict=True)
    ]
    for row, (reason, digest) in enumerate(zip(told, view_digests, strict=True)):
        if reason is None and not digest:
            raise ValueError(f"row of {sample_ids[row]!r}: valid, but without a view digest")
    valid = np.array([reason is None for reason in told], bool)
    summary[~valid] = np.nan
    values = arrow_tables.from_numpy(summary.reshape(-1))
    return pa.table(
        [
            pa.array(sample_ids, pa.string()),
            pa.array(valid.tolist(), pa.bool_()),
            pa.array(told, pa.string()),
            pa.array(view_digests, pa.string()),
            pa.array(parameters, pa.string()),
            pa.FixedSizeListArray.from_arrays(values, summary.shape[1]),
        ],
        schema=given_schema(summary.shape[1]),
    )


def with_escapes(table: pa.Table, escapes: Escapes) -> pa.Table:
    """Return a table with the columns of escapes; those of invalid rows are left out."""
    kept = valid(table)[escapes.row]
    rows, dim = escapes.row[kept], escapes.values.shape[1]
    counts = np.bincount(rows, minlength=table.num_rows)
    offsets = np.concatenate(([0], np.cumsum(counts)))
    lists = (
        (offsets, escapes.token[kept].astype(np.int32)),
        (offsets * dim, escapes.values[kept].reshape(-1)),
    )
    for (name, kind), (starts, values) in zip(ESCAPE_FIELDS, lists, strict=True):
        column = pa.ListArray.from_arrays(
            arrow_tables.from_numpy(starts.astype(np.int32)), arrow_tables.from_numpy(values)
        )
        table = table.append_column(pa.field(name, kind), column.cast(kind))
    return table


def with_checksums(table: pa.Table, sums: npt.NDArray[np.uint32]) -> pa.Table:
    """Return a table with the crc32c of each row's patches, uint32 [n]; null where not valid.

    The table's own digest is in the manifest: by this column a shard that was exchanged for another
    one, each sound in itself, is noticed.
    """
    fine = valid(table)
    known = np.where(fine, sums, np.uint32(0))  # what is null leaves no trace in the file
    return table.append_column(CHECKSUM_FIELD, pa.array(known, pa.uint32(), mask=~fine))


def checksums(table: pa.Table) -> npt.NDArray[np.uint32]:
    """Return the crc32c of each row's patches, uint32 [n]; 0 where there are none."""
    found: npt.NDArray[np.uint32] = table["crc32c"].fill_null(0).to_numpy()
    return found


def escapes_of(table: pa.Table, row: int, dim: int) -> tuple[npt.NDArray[np.int32], Floats]:
    """Return the escaped tokens of one row: places [k] and values [k, D]."""
    tokens = arrow_tables.to_numpy(table["escape_token"][row].values)
    return tokens, arrow_tables.to_numpy(table["escape_values"][row].values).reshape(-1, dim)


def summaries(table: pa.Table) -> Floats:
    """Return the summaries as float32 [n, D], a view of the table's memory."""
    column = table["summary"]  # `combine_chunks` would copy it, of one chunk too
    column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return arrow_tables.to_numpy(column.flatten()).reshape(table.num_rows, -1)


def num_escapes(table: pa.Table) -> int:
    """Count the tokens that are stored at higher precision."""
    if "escape_token" not in table.schema.names:
        return 0
    return int(pc.sum(pc.list_value_length(table["escape_token"])).as_py() or 0)


def valid(table: pa.Table) -> npt.NDArray[np.bool_]:
    """Return validity as bool [n]."""
    return np.array(table["valid"].to_pylist(), bool)
