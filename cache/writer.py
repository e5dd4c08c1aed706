"""Write one shard of one view: its patches and the table of its rows. Commits nothing.

Any process may do this, at any time and more than once: equal features give equal bytes, and
nothing exists before its record is committed (law 5).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cache.codec.encoded import Escapes
from cache.errors import StoreError
from cache.files import atomic
from cache.format import arrow_tables, layout, rows_table, zarr_shard
from cache.format.record_table import ShardRecord
from cache.shard_ranges import ShardRange
from cache.store import Store
from eupe import fingerprint as fp


def write_shard(
    store: Store,
    view: int,
    shard: ShardRange,
    patches: npt.NDArray[np.generic],
    rows: pa.Table | pl.DataFrame,
    provenance: Mapping[str, object],
    escapes: Escapes | None = None,
) -> ShardRecord:
    """Write the files of one shard and return the record to commit.

    Args:
        store: where to.
        view: view number.
        shard: which rows, as `store.todo` gave it.
        patches: encoded, [n, *store.row_shape] in the codec's storage dtype, n = len(shard);
            what invalid rows hold does not matter.
        rows: [n] in row order: sample_id, valid, reason, view_digest, parameters (JSON text),
            summary (list of float32). A summary that is not finite makes its row invalid.
        provenance: library versions, device, compute batch: plain data, kept in the manifest only.
        escapes: of `Encoded`, rows counted from the shard's first; a quantised codec wants them.

    Raises:
        ValueError: patches or rows of another shape, dtype or order than the store's.
        StoreError: a file cannot be written.
    """
    where = f"view {view}, shard {shard.shard}"
    if view < 0:
        raise ValueError(f"view = {view}: views are numbered from 0")
    if shard != store.samples.shard_range(shard.shard):
        raise StoreError(
            f"{where}: asked for rows {shard.start} to {shard.stop}, the dataset has "
            f"{store.samples.shard_range(shard.shard)}; the samples changed, ask todo again"
        )
    wanted_shape = (len(shard), *store.row_shape)
    if patches.shape != wanted_shape or patches.dtype != store.codec.storage_dtype:
        raise ValueError(
            f"{where}: patches are {patches.dtype}{list(patches.shape)}, "
            f"the store wants {store.codec.storage_dtype}{list(wanted_shape)}"
        )
    table = _conform(rows, store.spec.summary_dim, where)
    ids = store.samples.shard(shard.shard)["sample_id"].to_list()
    if table["sample_id"].to_pylist() != ids:
        raise ValueError(f"{where}: sample ids are not those of the dataset's rows, in their order")
    valid = rows_table.valid(table)
    num_escapes = 0
    if store.codec.has_escapes:
        if escapes is None:
            raise ValueError(f"{where}: codec {store.codec.name} wants the escapes of its tokens")
        table = rows_table.with_escapes(table, escapes)
        num_escapes = int(valid[escapes.row].sum())

    flat = zarr_shard.as_bytes(patches)
    sums = zarr_shard.checksums(flat)
    table = rows_table.with_checksums(table, sums)
    scratch = layout.scratch_directory(store.directory)
    patches_file = atomic.write(
        layout.patches_file(store.directory, view, shard.shard),
        zarr_shard.pack(flat, valid, sums, store.samples.rows_per_shard),
        scratch,
    )
    rows_file = atomic.write(
        layout.rows_file(store.directory, view, shard.shard),
        [arrow_tables.to_bytes(table)],
        scratch,
    )
    return ShardRecord(
        view=view,
        shard=shard.shard,
        start=shard.start,
        stop=shard.stop,
        num_valid=int(valid.sum()),
        num_escapes=num_escapes,
        samples_digest=store.samples.shard_digest(shard.shard),
        patches_bytes=patches_file.num_bytes,
        patches_sha256=patches_file.sha256,
        rows_bytes=rows_file.num_bytes,
        rows_sha256=rows_file.sha256,
        provenance=fp.canonical_json(dict(provenance)).decode(),
    )


def _conform(rows: pa.Table | pl.DataFrame, summary_dim: int, where: str) -> pa.Table:
    """Bring a table of rows, in any Arrow or polars flavour, to the one form that is stored."""
    table = rows.to_arrow() if isinstance(rows, pl.DataFrame) else rows
    names = rows_table.given_schema(summary_dim).names
    if set(table.schema.names) != set(names):
        raise ValueError(f"{where}: rows have columns {table.schema.names}, wants {names}")
    summary = np.full((table.num_rows, summary_dim), np.nan, np.float32)
    given = table["summary"].is_valid().to_numpy()
    lists = table["summary"].drop_null()
    lengths = set(pc.list_value_length(lists).unique().to_pylist())
    if lengths - {summary_dim}:
        raise ValueError(f"{where}: summaries are {lengths} wide, the spec wants {summary_dim}")
    if len(lists):
        values = pc.list_flatten(lists).to_numpy()
        summary[given] = values.reshape(-1, summary_dim)
    reasons = [
        None if fine else (reason or "marked invalid without a reason")
        for fine, reason in zip(
            table["valid"].to_pylist(), table["reason"].to_pylist(), strict=True
        )
    ]
    return rows_table.make(
        table["sample_id"].to_pylist(),
        reasons,
        table["view_digest"].to_pylist(),
        table["parameters"].to_pylist(),
        summary,
    )
