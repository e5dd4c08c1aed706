"""Mend a sample table: its HEAD, the last of its segments, the files that find ids.

Segments before the last are lost for good: nothing else holds their samples.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from cache.errors import StoreError
from cache.files import atomic
from cache.format import arrow_tables, layout
from cache.format.sample_table import DROPPED, first_row, hash_table, is_stored
from cache.heads import left_of, restore
from cache.mending import Mending
from cache.samples import DROPPED_REASON, Samples, SampleSegment, SamplesHead, segment_files
from cache.segments import packed, whole_segments, write_segment
from cache.shard_ranges import Rows
from eupe.spec import StoreSpec


def mend_samples(
    base: Path, directory: Path, stores: Sequence[Path], mending: Mending
) -> Samples | None:
    """Return a dataset's samples as they are once mended; None if they are lost."""
    dataset = directory.parent.name
    try:
        for path, sha256 in segment_files(base, dataset):
            arrow_tables.map_file(path, sha256=sha256)
        return Samples.open(base, dataset)
    except StoreError as error:
        fault = str(error).removeprefix(f"{directory / layout.HEAD}: ")
    left = left_of(directory, SamplesHead)
    head = left.newest or _told_by_stores(dataset, base, stores)
    if head is None:
        mending.lose(directory, f"{fault}; nothing tells what its HEAD said, restore it")
        return None
    whole = whole_segments(directory, head.segments, is_stored)
    kept: list[SampleSegment] = []
    for segment in head.segments:
        if segment.name not in whole:
            break
        kept.append(segment)
    gone = [segment.name for segment in head.segments[len(kept) :]]
    if (gone and not kept) or any(name in whole for name in gone):
        mending.lose(
            directory / gone[0],
            "damaged or lost, and nothing else holds its samples; restore it, or delete the "
            "dataset's folder and build again",
        )
        return None
    named = {segment.name for segment in head.segments}
    for name in sorted(set(whole) - named):
        if gone:
            break  # rows of samples that are lost come first
        per_shard = head.rows_per_shard
        end = kept[-1].start + kept[-1].rows if kept else 0
        start = -(-end // per_shard) * per_shard
        found, table = whole[name]
        if first_row(table) == start:
            hashes, _ = packed(int(name.partition("-")[0]), _hashes(head, table))
            kept.append(SampleSegment(**found.model_dump(), start=start, hashes=hashes))
    if not kept:
        mending.lose(directory, f"{fault}; no segment of its samples is left, index it anew")
        return None
    rows = _dropped(directory, head, [s for s in stores if s.is_relative_to(directory.parent)])
    said = {"version": left.next_version, "segments": tuple(kept), "sources": None, "dropped": None}
    mended = head.model_copy(update=said)
    what = f"{fault}; written anew, with {kept[-1].start + kept[-1].rows} rows"
    if gone:
        what += f" and without {', '.join(gone)}: `eupe cache build` indexes its images again"
    tables = [whole[segment.name][1] for segment in kept]
    restored = partial(_restore_samples, directory, mended, tables, rows)
    mending.mend(directory / layout.HEAD, what, restored)
    samples = Samples(directory, mended)
    samples.dropped = rows
    return samples


def _dropped(directory: Path, head: SamplesHead, stores: Sequence[Path]) -> Rows:
    """Return the rows that were ever taken out, as lists of them and tables of rows tell."""
    lists = whole_segments(directory, head.pinned(), DROPPED).values()
    found = [arrow_tables.to_numpy(table["dropped"]) for _, table in lists]
    for path in chain.from_iterable(store.glob("view-*/rows-*.arrow") for store in stores):
        with suppress(StoreError, OSError, LookupError, ValueError):
            reasons = arrow_tables.map_table(path)["reason"]
            inside = np.flatnonzero(pc.equal(reasons, DROPPED_REASON).fill_null(False).to_numpy())
            found.append(int(path.stem.partition("-")[2]) * head.rows_per_shard + inside)
    return np.unique(np.concatenate([np.empty(0, np.int64), *found]))


def _restore_samples(
    directory: Path, head: SamplesHead, tables: Sequence[pa.Table], dropped: Rows
) -> None:
    """Write the tables of hashes and of dropped rows anew, and then the HEAD that names all."""
    scratch = layout.scratch_directory(directory)
    if len(dropped):
        listed = pa.table([arrow_tables.from_numpy(dropped)], schema=DROPPED)
        segment = write_segment(directory, head.version, listed, scratch)
        head = head.model_copy(update={"dropped": segment})
    for segment, table in zip(head.segments, tables, strict=True):
        content = arrow_tables.to_bytes(_hashes(head, table))
        atomic.write(directory / segment.hashes.name, [content], scratch)
    restore(directory, head, scratch)


def _hashes(head: SamplesHead, table: pa.Table) -> pa.Table:
    """Return the table that finds the ids of a segment."""
    return hash_table(head.dataset.name, table["sample_id"], None)


def _told_by_stores(dataset: str, base: Path, stores: Sequence[Path]) -> SamplesHead | None:
    """Return what the arrays of a dataset's stores tell of its HEAD: all but its segments."""
    for store in stores:
        if store.relative_to(base).parts[0] != dataset:
            continue
        for path in sorted(store.glob("view-*/zarr.json")):
            try:
                metadata = json.loads(path.read_bytes())
                spec = StoreSpec.model_validate(metadata["attributes"]["eupe"]["spec"])
                chunk = metadata["chunk_grid"]["configuration"]["chunk_shape"]
                return SamplesHead(dataset=spec.dataset, rows_per_shard=int(chunk[0]))
            except (OSError, ValueError, LookupError, TypeError, ValidationError):
                continue
    return None
