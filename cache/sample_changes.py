"""What changes in a sample table: which samples are new, and which lie elsewhere than they did."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from cache.format import arrow_tables, on_disk
from cache.format.sample_table import BLOCK_ROWS, GIVEN, frame, in_full

if TYPE_CHECKING:
    from cache.samples import Samples

_RENEWED = ("uri", "offset", "bytes", "labels")


class Compared(NamedTuple):
    """Samples that were given, beside those that are there.

    Attributes:
        new: not there yet (GIVEN), in the order given.
        moved: there, and now elsewhere in the source or with more labels (GIVEN).
        rows: of those, int64 [n].
        changed: another image is there under the same id: (sample_id, uri, offset, what is said).
    """

    new: pa.Table
    moved: pa.Table
    rows: npt.NDArray[np.int64]
    changed: list[tuple[str, str, int, str]]


def compare(samples: "Samples", given: pa.Table) -> Compared:
    """Tell new samples (GIVEN) from those that are there; those taken out are neither."""
    rows = samples.find(given["sample_id"])
    if (rows < 0).all():  # as they are: taken they would be copied
        return Compared(given, given.slice(0, 0), rows[:0], [])
    known = np.flatnonzero((rows >= 0) & ~np.isin(rows, samples.dropped))
    new = given.take(arrow_tables.from_numpy(np.flatnonzero(rows < 0)))
    theirs = samples.take(rows[known])
    ours = frame(given.take(arrow_tables.from_numpy(known)))
    equal = (ours["digest"] == theirs["digest"]).to_numpy()
    changed = [
        _said(ours.row(place, named=True), theirs.row(place, named=True))
        for place in np.flatnonzero(~equal).tolist()
    ]
    known, ours, theirs = known[equal], ours.filter(equal), theirs.filter(equal)
    pairs = zip(theirs["labels"], ours["labels"], strict=True)
    ours = ours.with_columns(
        labels=pl.Series("labels", [_joined(*pair) for pair in pairs], pl.String)
    )
    differ = np.zeros(len(known), bool)
    for name in _RENEWED:
        differ |= ours[name].ne_missing(theirs[name]).to_numpy()
    moved = ours.filter(pl.Series("differ", differ)).to_arrow().cast(GIVEN)
    return Compared(new, moved, rows[known[differ]], changed)


def _said(here: dict[str, Any], there: dict[str, Any]) -> tuple[str, str, int, str]:
    """Say of an image that another one was indexed under its id."""
    said = (
        f"is there with another image: {here['uri']} at {here['offset']} has sha256 "
        f"{here['digest'].hex()}, what was indexed ({there['uri']} at {there['offset']}) had "
        f"{there['digest'].hex()}; a changed image needs a new sample_id or a new dataset name"
    )
    return here["sample_id"], here["uri"], here["offset"], said


def renewed(
    samples: "Samples", moved: pa.Table, rows: npt.NDArray[np.int64], scratch: Path
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the segments (number, GIVEN) in which rows are replaced by moved samples.

    Args:
        samples: as they are.
        moved: the samples that replace them.
        rows: of those.
        scratch: a folder for files without a name: a segment in full is many times its file.
    """
    segment = np.searchsorted(samples.starts, rows, side="right") - 1
    for number in np.unique(segment).tolist():
        whole, blocks = samples.segment(number), list[pa.Table]()
        for first in range(0, whole.num_rows, BLOCK_ROWS):
            block = in_full(whole.slice(first, BLOCK_ROWS))
            places = rows - samples.starts[number] - first
            mine = np.flatnonzero((places >= 0) & (places < block.num_rows))
            order = np.arange(block.num_rows)
            order[places[mine]] = block.num_rows + np.arange(len(mine))
            both = pa.concat_tables([block, moved.take(arrow_tables.from_numpy(mine))])
            blocks.append(on_disk.kept(both.take(arrow_tables.from_numpy(order)), scratch))
        yield number, pa.concat_tables(blocks)


def _joined(there: str, given: str) -> str:
    """Return labels, JSON objects, with those given in the place of those that are there."""
    if there == given:
        return there
    before = json.loads(there)
    both = before | json.loads(given)
    return there if both == before else json.dumps(both, ensure_ascii=False, sort_keys=True)
