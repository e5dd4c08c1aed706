"""The listing: what indexing has found, kept in scratch until all of it is, and then put in order.

    <sha256>.arrow    samples of some whole pieces of a source, in the order of their hashes

Nothing is a sample before the whole source was looked at: then all are added, in the order of the
hashes of their ids. A tar often holds a class or a day; by hash a shard holds a bit of everything.
Killed, indexing goes on with the parts that are there. In memory are a part and what is merged,
never all samples: what is in order already lies in files without a name. Two builders may index at
once and share the folder: whoever is done first takes the parts away, and the other one keeps
those that it has mapped.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
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
        table = table.take(arrow_tables.from_numpy(np.argsort(hashes, kind="stable")))
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

    def sources(self) -> pa.Table:
        """Return the pieces that were looked at (SOURCES)."""
        columns = list(zip(*self._all_sources(), strict=True)) or [()] * len(SOURCES)
        return pa.table([list(column) for column in columns], schema=SOURCES)

    @cached_property
    def in_order(self) -> list[pa.Table]:
        """All samples (GIVEN) in the order of their hashes, some in each table; all on disk.

        Raises:
            BadInput: two have one id.
            StoreError: there is no room for them.
        """
        return list(map(self._kept, self._merged()))

    def _kept(self, table: pa.Table) -> pa.Table:
        if not self._keep or not table.num_rows:
            return table
        return on_disk.kept(table, self._directory.parent)

    def _merged(self) -> Iterator[pa.Table]:
        """Merge slice by slice; nothing here holds one while the next is made."""
        hashes = [arrow_tables.to_numpy(part["hash"]) for part in self._parts]
        num_slices = max(sum(map(len, hashes)) // MERGED_ROWS, 1)
        bounds = [(number << 64) // num_slices for number in range(1, num_slices)]
        ends = np.array(bounds, np.uint64)
        cuts = [np.r_[0, np.searchsorted(each, ends), len(each)].tolist() for each in hashes]
        for number in range(num_slices):
            yield _in_order(
                part.slice(cut[number], cut[number + 1] - cut[number])
                for part, cut in zip(self._parts, cuts, strict=True)
            )

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


def _in_order(slices: Iterable[pa.Table]) -> pa.Table:
    """Return samples (GIVEN) of parts in the order of their hashes.

    Raises:
        BadInput: two have one id.
    """
    merged = pa.concat_tables([_SCHEMA.empty_table(), *slices])
    merged = merged.sort_by([("hash", "ascending"), ("sample_id", "ascending")])
    table = merged.select(GIVEN.names).replace_schema_metadata()
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
