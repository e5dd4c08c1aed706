"""The table of samples as rows: its columns, and what new ones must be to be added."""

import polars as pl
import pyarrow as pa

from cache.errors import StoreError
from eupe.errors import BadInput

SCHEMA = pa.schema(
    [
        ("row", pa.int64()),
        ("sample_id", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("digest", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("labels", pa.string()),
    ]
)
"""Columns of a segment. `labels` is a JSON object; `digest` the sha256 of the image's bytes."""


def conform(table: pl.DataFrame | pa.Table) -> pl.DataFrame:
    """Check columns and ids of new samples and bring them to SCHEMA's types, without `row`.

    Raises:
        ValueError: other columns, a sample without id or digest, or an id that is there twice.
    """
    given = frame(table) if isinstance(table, pa.Table) else table
    names = [name for name in SCHEMA.names if name != "row"]
    if set(given.columns) != set(names):
        lines = sorted(set(given.columns) ^ set(names))
        raise ValueError(f"sample table: columns {lines} differ; it wants exactly {names}")
    if isinstance(given.schema["labels"], pl.Struct):
        given = given.with_columns(pl.col("labels").struct.json_encode())
    given = given.select(
        pl.col(name).cast(pl.String if field.type == pa.string() else pl.Int64).alias(name)
        for name, field in zip(names, [SCHEMA.field(name) for name in names], strict=True)
    )
    empty = given.select("sample_id", "digest").null_count().row(0)
    if any(empty):
        raise ValueError("sample table: sample_id and digest must be given for every sample")
    twice = given.filter(pl.col("sample_id").is_duplicated())["sample_id"]
    if len(twice):
        raise BadInput(f"sample table: sample_id {twice[0]!r} is there twice; ids must be unique")
    return given


def new_samples(given: pl.DataFrame, there: pl.DataFrame, where: str) -> pl.DataFrame:
    """Leave out samples that are there.

    Raises:
        StoreError: one is there with another image digest.
    """
    known = there.select("sample_id", pl.col("digest").alias("digest_there"))
    joined = given.join(known, on="sample_id", how="left", maintain_order="left")
    changed = joined.filter(pl.col("digest_there") != pl.col("digest"))
    if changed.height:
        raise StoreError(
            f"{where}: sample {changed['sample_id'][0]!r} is there with another image digest; "
            f"a changed image needs a new sample_id or a new dataset name"
        )
    return joined.filter(pl.col("digest_there").is_null()).drop("digest_there")


def frame(table: pa.Table) -> pl.DataFrame:
    """Return an Arrow table as a polars frame, its memory shared."""
    shown = pl.from_arrow(table)
    assert isinstance(shown, pl.DataFrame)
    return shown
