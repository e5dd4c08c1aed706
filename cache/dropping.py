"""Take samples out of a dataset: nothing of them stays in a store, nothing of them is built again.

First their rows are listed in the sample table, so that whoever computes or reads from then on
leaves them out. Then every shard that holds one is written anew, without these rows: the bytes that
a build would give which had never seen their images. All other rows keep theirs.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.codec.encoded import Escapes
from cache.errors import Corrupt
from cache.files import atomic
from cache.format import arrow_tables, layout, rows_table, zarr_shard
from cache.format.record_table import ShardRecord
from cache.format.sample_table import DROPPED
from cache.heads import HeadFile, commit, next_version
from cache.samples import DROPPED_REASON, Samples, SamplesHead
from cache.segments import write_segment
from cache.shard_ranges import Rows
from cache.store import Store, open_store, store_directories, store_info
from cache.verify import Progress, not_dropped, unseen


@dataclass(frozen=True)
class Dropped:
    """What taking samples out has changed.

    Attributes:
        num_samples: taken out of the dataset so far, those of before counted.
        num_shards: written anew now.
        num_rows: that lost their features now, each view and store counted.
    """

    num_samples: int
    num_shards: int
    num_rows: int


def drop(
    root: str | Path,
    dataset: str,
    sample_ids: Sequence[str],
    shown: Callable[[int], AbstractContextManager[Progress]] = unseen,
) -> Dropped:
    """Take samples out of a dataset and of all of its stores.

    Killed, the same call goes on; so does one for samples that are listed already. A builder that
    began before may still write a shard with them: verify names it, and the same call mends it.

    Args:
        root: cache root.
        dataset: its name.
        sample_ids: of the samples.
        shown: shows how far it is, in shards.

    Raises:
        NotBuilt: the dataset has no samples here.
        MissingSamples: naming the ids that are not in the dataset.
        Corrupt: a shard is damaged; others are done.
    """
    base = layout.cache_root(root)
    samples = listed(base, dataset, sample_ids)
    gone = samples.dropped
    shards = np.unique(gone // samples.rows_per_shard)
    work = [
        (store, record)
        for directory in store_directories(base)
        if directory.relative_to(base).parts[0] == dataset
        for store in [open_store(base, store_info(directory).spec)]
        for record in store.manifest().records()
        if np.isin(record.shard, shards)
    ]
    num_shards = num_rows = 0
    damaged: list[Corrupt] = []
    with shown(len(work)) as progress:
        for done, (store, record) in enumerate(work, 1):
            inside = gone[(gone >= record.start) & (gone < record.stop)] - record.start
            try:
                changed = _without(store, record, inside)
            except Corrupt as error:
                damaged.append(error)
                changed = None
            if changed is not None:
                new, rows = changed
                store.commit([new])
                num_shards, num_rows = num_shards + 1, num_rows + rows
            progress(done, len(work))
    if damaged:
        raise Corrupt(
            f"{damaged[0]}{f', and {len(damaged) - 1} more' if len(damaged) > 1 else ''}; "
            f"`eupe cache repair --yes` deletes such shards, and a build leaves the samples out"
        )
    return Dropped(len(gone), num_shards, num_rows)


def listed(root: str | Path, dataset: str, sample_ids: Sequence[str]) -> Samples:
    """List samples as taken out, so that nothing is computed for them, or read of them, any more.

    Their rows stay theirs, so that no sample comes back under its id.

    Raises:
        NotBuilt: the dataset has no samples.
        MissingSamples: naming the ids that are not in the dataset.
        Busy: another process is appending.
    """
    directory = layout.samples_directory(layout.cache_root(root), dataset)
    scratch = layout.scratch_directory(directory)
    rows = Samples.open(root, dataset).rows_of(sample_ids)

    def change(there: HeadFile[SamplesHead] | None) -> SamplesHead | None:
        assert there is not None
        before = Samples(directory, there.head).dropped
        dropped = np.union1d(before, rows)
        if len(dropped) == len(before):
            return None
        table = pa.table([arrow_tables.from_numpy(dropped)], schema=DROPPED)
        version = next_version(there)
        segment = write_segment(directory, version, table, scratch)
        return there.head.model_copy(update={"version": version, "dropped": segment})

    with atomic.only_writer(directory, scratch):
        commit(directory, SamplesHead, change, scratch)
    return Samples.open(root, dataset)


def _without(store: Store, record: ShardRecord, inside: Rows) -> tuple[ShardRecord, int] | None:
    """Write a shard anew without some of its rows; None if it is without them.

    Returns:
        Its new record, to be committed, and how many rows have lost their features.
    """
    patches = layout.patches_file(store.directory, record.view, record.shard)
    rows = layout.rows_file(store.directory, record.view, record.shard)
    table = arrow_tables.map_table(rows, record.rows_bytes, record.rows_sha256)
    here = inside[not_dropped(table, inside)]
    if not len(here):
        return None
    content = arrow_tables.map_file(patches, record.patches_bytes, record.patches_sha256)
    valid, sums = rows_table.valid(table), rows_table.checksums(table)
    row_bytes = store.row_bytes
    flat = np.zeros((len(valid), row_bytes), np.uint8)
    flat[valid] = zarr_shard.stored_rows(content, row_bytes, record.num_valid)[:, :row_bytes]
    num_rows = int(valid[here].sum())
    valid[here] = False
    anew = rows_table.with_checksums(_emptied(store, table, here), sums)
    scratch = layout.scratch_directory(store.directory)
    packed = zarr_shard.pack(flat, valid, sums, store.samples.rows_per_shard)
    patches_file = atomic.write(patches, packed, scratch)
    rows_file = atomic.write(rows, [arrow_tables.to_bytes(anew)], scratch)
    new = replace(
        record,
        num_valid=int(valid.sum()),
        num_escapes=rows_table.num_escapes(anew),
        patches_bytes=patches_file.num_bytes,
        patches_sha256=patches_file.sha256,
        rows_bytes=rows_file.num_bytes,
        rows_sha256=rows_file.sha256,
    )
    return new, num_rows


def _emptied(store: Store, table: pa.Table, here: Rows) -> pa.Table:
    """Return a shard's table without what it says of some rows, and without checksums."""
    reasons, digests, parameters = (
        table[name].to_pylist() for name in ("reason", "view_digest", "parameters")
    )
    for row in here.tolist():
        reasons[row], digests[row], parameters[row] = DROPPED_REASON, None, None
    summary = pc.list_flatten(table["summary"]).to_numpy().reshape(table.num_rows, -1)
    anew = rows_table.make(table["sample_id"].to_pylist(), reasons, digests, parameters, summary)
    if not store.codec.has_escapes:
        return anew
    counts = pc.list_value_length(table["escape_token"]).to_numpy()
    escapes = Escapes(
        row=np.repeat(np.arange(table.num_rows), counts),
        token=pc.list_flatten(table["escape_token"]).to_numpy(),
        values=pc.list_flatten(table["escape_values"]).to_numpy().reshape(-1, store.spec.patch_dim),
    )
    return rows_table.with_escapes(anew, escapes)
