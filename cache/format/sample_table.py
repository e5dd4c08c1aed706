"""The table of samples as rows: what is given and handed out, and how narrow it is on disk.

    handed out    every column in full (GIVEN)
    on disk       text that repeats as a dictionary, integers as narrow as their values allow:
                  73 bytes a sample of ImageNet, 32 of them the digest

The `uri` of an image that is a file of its own mostly is its id and an extension: on disk it is
`{id}.JPEG`, one entry of the dictionary for a whole folder.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cache.format import arrow_tables
from eupe.addressed import named
from eupe.errors import BadInput

DIGEST_BYTES = hashlib.sha256().digest_size
GIVEN = pa.schema(
    [
        ("sample_id", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("bytes", pa.int64()),
        ("digest", pa.binary(DIGEST_BYTES)),
        ("labels", pa.string()),
    ]
)
"""Columns of samples. `uri` is relative to the dataset's source, `offset` and `bytes` say where in
it the image lies; `digest` is the sha256 of the image's bytes, `labels` a JSON object."""
HASHES = pa.schema([("hash", pa.uint64()), ("place", pa.uint32())])
"""Columns of the table that finds ids: hashes, rising, and where in the segment each id is."""
SOURCES = pa.schema(
    [
        ("uri", pa.string()),
        ("bytes", pa.int64()),
        ("stamp", pa.string()),
        ("failures", pa.string()),
    ]
)
"""Columns of the table of sources that were indexed: tars, Parquet files, folders of images. A
source of the same size and stamp (of modification times or entity tags) is not looked at again;
`failures` is a JSON list of what was left out of it."""

BLOCK_ROWS = 65_536
"""Samples whose text is Python's or polars' at once: a segment has up to two million."""
ID = "{id}"
_START = b"start"
_DICTIONARIES = ("uri", "labels")
_INTEGERS = ("offset", "bytes")
_INDEXES = (pa.int8(), pa.int16(), pa.int32())
_UNSIGNED = (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())


DROPPED = pa.schema([("dropped", pa.int64())])
"""Columns of the table of rows that were taken out, rising."""


def conform(table: pl.DataFrame | pa.Table) -> pa.Table:
    """Check columns and ids of new samples and bring them to GIVEN's types.

    Raises:
        ValueError: other columns, a sample without id or digest, or an id that is there twice.
    """
    if isinstance(table, pa.Table) and table.schema.equals(GIVEN):
        _check_ids(table.select(["sample_id", "digest"]))
        return table
    given = frame(table) if isinstance(table, pa.Table) else table
    if set(given.columns) != set(GIVEN.names):
        lines = sorted(set(given.columns) ^ set(GIVEN.names))
        raise ValueError(f"sample table: columns {lines} differ; it wants exactly {GIVEN.names}")
    if isinstance(given.schema["labels"], pl.Struct):
        given = given.with_columns(pl.col("labels").struct.json_encode())
    if given.schema["digest"] not in (pl.Binary, pl.Null):  # null: there are no rows
        raise ValueError(f"sample table: digest is {given.schema['digest']}; it wants binary")
    _check_ids(given.select("sample_id", "digest").to_arrow())
    try:
        return given.select(GIVEN.names).to_arrow().cast(GIVEN)
    except pa.ArrowInvalid as error:
        raise ValueError(f"sample table: {error}; digests are {DIGEST_BYTES} bytes") from error


def _check_ids(given: pa.Table) -> None:
    """Refuse samples without id or digest, and an id that is there twice.

    Hashes are compared first: to compare the ids themselves takes ten times the memory.
    """
    if any(column.null_count for column in given.columns):
        raise ValueError("sample table: sample_id and digest must be given for every sample")
    ids = pl.Series(given["sample_id"])
    hashes = np.sort(ids.hash().to_numpy())
    if not (hashes[1:] == hashes[:-1]).any():
        return
    twice = ids.filter(ids.is_duplicated())
    if len(twice):
        raise BadInput(f"sample table: sample_id {twice[0]!r} is there twice; ids must be unique")


def stored(given: pa.Table, start: int) -> pa.Table:
    """Return samples (GIVEN) as a segment that begins at a row: equal samples, equal tables."""
    blocks = range(0, given.num_rows, BLOCK_ROWS)
    uris = [_uris_on_disk(given.slice(first, BLOCK_ROWS)) for first in blocks]
    text = {
        "uri": pa.chunked_array([chunk for uri in uris for chunk in uri.chunks], pa.string()),
        "labels": given["labels"],
    }
    columns = {name: given[name] for name in GIVEN.names}
    for name in _DICTIONARIES:
        columns[name] = _dictionary(text[name])
    for name in _INTEGERS:
        highest = pc.max(given[name]).as_py() or 0
        columns[name] = given[name].cast(next(t for t in _UNSIGNED if highest < 2**t.bit_width))
    return pa.table(columns, metadata={_START: str(start)})


def _uris_on_disk(given: pa.Table) -> pa.ChunkedArray:
    """Return where samples lie as it is on disk: of a file of its own the extension alone."""
    shown = frame(given.select(["sample_id", "uri"]))
    suffix = pl.col("uri").str.strip_prefix(pl.col("sample_id"))
    own_file = suffix.str.starts_with(".") & (suffix != pl.col("uri"))
    literal = pl.col("uri").str.starts_with(ID)
    uri = (
        pl.when(literal)
        .then(pl.lit("./") + pl.col("uri"))
        .when(own_file & ~suffix.str.contains("/", literal=True))
        .then(pl.lit(ID) + suffix)
        .otherwise(pl.col("uri"))
    )
    return shown.select(uri=uri).to_arrow()["uri"].cast(pa.string())


def first_row(table: pa.Table) -> int:
    """Return the row at which a segment begins."""
    return int(table.schema.metadata[_START])


def is_stored(schema: pa.Schema) -> bool:
    """Return True if a table's columns are those of a segment."""
    kinds = {name: GIVEN.field(name).type for name in GIVEN.names}
    return schema.names == GIVEN.names and all(
        field.type in _UNSIGNED
        if field.name in _INTEGERS
        else field.type in [pa.dictionary(index, pa.string()) for index in _INDEXES]
        if field.name in _DICTIONARIES
        else field.type == kinds[field.name]
        for field in schema
    )


def in_full(table: pa.Table) -> pa.Table:
    """Return rows of a segment with every column in full (GIVEN)."""
    columns = {name: table[name].cast(GIVEN.field(name).type) for name in GIVEN.names}
    uri, ids = columns["uri"], columns["sample_id"]
    template = pc.starts_with(uri, ID)
    own = pc.binary_join_element_wise(ids, pc.utf8_slice_codeunits(uri, len(ID)), "")
    columns["uri"] = pc.if_else(template, own, uri)
    return pa.table(columns, schema=GIVEN)


def id_hashes(dataset: str, sample_ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """Return a hash of each sample id, uint64 [n]: by it ids are found, and samples ordered."""
    address = f"cache.samples/{dataset}/"
    blocks = range(0, len(sample_ids), BLOCK_ROWS)
    hashes = [named(sample_ids.slice(at, BLOCK_ROWS).to_pylist(), address) for at in blocks]
    return np.concatenate([np.empty(0, np.uint64), *hashes])


def hash_table(hashes: npt.NDArray[np.uint64]) -> pa.Table:
    """Return the table (HASHES) that finds the ids of a segment by their hashes, uint64 [n]."""
    places = np.argsort(hashes, kind="stable")
    columns = [
        arrow_tables.from_numpy(hashes[places]),
        arrow_tables.from_numpy(places.astype(np.uint32)),
    ]
    return pa.table(columns, schema=HASHES)


def frame(table: pa.Table) -> pl.DataFrame:
    """Return an Arrow table as a polars frame, its memory shared."""
    shown = pl.from_arrow(table)
    assert isinstance(shown, pl.DataFrame)
    return shown


def _dictionary(column: pa.ChunkedArray) -> pa.DictionaryArray:
    """Encode text in the order in which it first appears, by indexes as narrow as will do."""
    encoded = column.dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):  # of no rows
        encoded = pa.array([], pa.string()).dictionary_encode()
    most = len(encoded.dictionary)
    index = next(each for each in _INDEXES if most <= 2 ** (each.bit_width - 1))
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(index), encoded.dictionary)
