"""The table of samples as rows: what is given and handed out, and how narrow it is on disk.

    handed out    every column in full (GIVEN)
    on disk       text that repeats as a dictionary, integers as narrow as their values allow:
                  73 bytes a sample of ImageNet, 32 of them the digest

The `uri` of an image that is a file of its own mostly is its id and an extension: on disk it is
`{id}.JPEG`, one entry of the dictionary for a whole folder.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from cache.format import arrow_tables, on_disk
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
CHECKED_ROWS = 262_144
"""Hashes of ids that are compared at once."""
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
    column = given["sample_id"]
    if not any((each[1:] == each[:-1]).any() for each in _sorted_hashes(column)):
        return
    ids = pl.Series(column)
    twice = ids.filter(ids.is_duplicated())
    if len(twice):
        raise BadInput(f"sample table: sample_id {twice[0]!r} is there twice; ids must be unique")


def _sorted_hashes(ids: pa.ChunkedArray) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield hashes of ids, rising, some at a time; equal ones are of one time."""
    times = 1 << max(len(ids) // CHECKED_ROWS, 1).bit_length() - 1
    for time in range(times):
        found = []
        for first in range(0, len(ids), BLOCK_ROWS):
            hashes = pl.Series(ids.slice(first, BLOCK_ROWS)).hash().to_numpy()
            found.append(hashes[hashes % np.uint64(times) == time])
        yield np.sort(np.concatenate([np.empty(0, np.uint64), *found]))


def stored(given: pa.Table, start: int, scratch: Path) -> pa.Table:
    """Return samples (GIVEN) as a segment that begins at a row: equal samples, equal tables.

    Args:
        given: the samples; where they are many, they lie in files as well.
        start: that row.
        scratch: a folder for files without a name.
    """
    blocks = [given.slice(at, BLOCK_ROWS) for at in range(0, given.num_rows, BLOCK_ROWS)]
    highest = [pc.max(given[name]).as_py() or 0 for name in _INTEGERS]
    kinds = [next(kind for kind in _UNSIGNED if most < 2**kind.bit_width) for most in highest]
    integers = pa.schema(list(zip(_INTEGERS, kinds, strict=True)))
    kept = [_kept(block.select(_INTEGERS).cast(integers), scratch) for block in blocks]
    columns = {name: given[name] for name in GIVEN.names}
    columns |= {name: pa.concat_tables([integers.empty_table(), *kept])[name] for name in _INTEGERS}
    columns["uri"] = _dictionary(map(_uris_on_disk, blocks), scratch)
    columns["labels"] = _dictionary((block["labels"] for block in blocks), scratch)
    return pa.table(columns, metadata={_START: str(start)})


def _kept(block: pa.Table, scratch: Path | None) -> pa.Table:
    """Return a block of many as it lies in a file, another one as it is."""
    if scratch is None or block.num_rows < BLOCK_ROWS:
        return block
    return on_disk.kept(block, scratch)


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


def hash_table(dataset: str, sample_ids: pa.ChunkedArray, scratch: Path | None) -> pa.Table:
    """Return the table (HASHES) that finds the ids of a segment by their hashes.

    Args:
        dataset: whose ids.
        sample_ids: in the order of the segment.
        scratch: a folder for files without a name; None: all is in memory.
    """
    blocks, last, rising = [HASHES.empty_table()], np.uint64(0), True
    for first in range(0, len(sample_ids), BLOCK_ROWS):
        hashes = id_hashes(dataset, sample_ids.slice(first, BLOCK_ROWS))
        rising = rising and bool(hashes[0] >= last and (hashes[1:] >= hashes[:-1]).all())
        last, places = hashes[-1], np.arange(first, first + len(hashes), dtype=np.uint32)
        columns = [arrow_tables.from_numpy(hashes), arrow_tables.from_numpy(places)]
        blocks.append(_kept(pa.table(columns, schema=HASHES), scratch))
    table = pa.concat_tables(blocks)
    if rising:  # as indexing gives them
        return table
    hashes = arrow_tables.to_numpy(table["hash"])
    order = np.argsort(hashes, kind="stable")
    columns = [
        arrow_tables.from_numpy(hashes[order]),
        arrow_tables.from_numpy(order.astype(np.uint32)),
    ]
    return pa.table(columns, schema=HASHES)


def frame(table: pa.Table) -> pl.DataFrame:
    """Return an Arrow table as a polars frame, its memory shared."""
    shown = pl.from_arrow(table)
    assert isinstance(shown, pl.DataFrame)
    return shown


def _dictionary(blocks: Iterable[pa.ChunkedArray], scratch: Path) -> pa.DictionaryArray:
    """Encode text in the order in which it first appears, by indexes as narrow as will do."""
    none = pa.array([], pa.string()).dictionary_encode()
    indexes, own = [pa.table({"index": none.indices})], [none]
    for block in blocks:
        encoded = block.combine_chunks().dictionary_encode()
        indexes.append(_kept(pa.table({"index": encoded.indices}), scratch))
        entries = pa.array(np.arange(len(encoded.dictionary), dtype=np.int32))
        own.append(pa.DictionaryArray.from_arrays(entries, encoded.dictionary))
    shared = pa.chunked_array(own, none.type).unify_dictionaries()
    dictionary = shared.chunk(0).dictionary
    kind = next(each for each in _INDEXES if len(dictionary) <= 2 ** (each.bit_width - 1))
    narrow = [
        _kept(pa.table({"index": entries.indices.take(block["index"]).cast(kind)}), scratch)
        for entries, block in zip(shared.chunks, indexes, strict=True)
    ]
    whole = on_disk.joined(pa.concat_tables(narrow)["index"], scratch).combine_chunks()
    return pa.DictionaryArray.from_arrays(whole, dictionary)
