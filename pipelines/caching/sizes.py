"""Bytes of a store before there is one, by the arithmetic and the code that will write it."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from pydantic import TypeAdapter

from cache.codec.encoded import Codec, Escapes
from cache.codec.known import default_codec, kind, make_codec, row_bytes
from cache.format import arrow_tables, rows_table, zarr_shard
from cache.shard_ranges import ShardRanges
from cache.store import description, spec_bytes
from eupe import views
from eupe.encoders import shapes
from eupe.spec import DatasetSpec, StoreSpec, TeacherSpec, ViewPolicy
from pipelines.recipe.config import TeacherConfig
from pipelines.recipe.drawn import Mask
from pipelines.recipe.stores import CacheJob

EXAMPLES = 64
"""Rows of a table that is written to know what a row takes."""
POLICY: TypeAdapter[ViewPolicy] = TypeAdapter(ViewPolicy)
SIDES = 500, 375
"""Width and height of a usual picture of ImageNet: its views' parameters are written out."""
RECORD_BYTES = 400
"""Of a manifest, a shard: 190 in its columns, the rest in segments not yet merged."""


class Size(NamedTuple):
    """What a store takes on disk.

    Attributes:
        num_bytes: of all its files.
        fixed_bytes: of those that hold no shard, manifest included.
        row_bytes: of one row's patches in their file.
        num_files: objects in a bucket.
    """

    num_bytes: int
    fixed_bytes: int
    row_bytes: int
    num_files: int


def of_store(
    job: CacheJob,
    teacher: TeacherConfig,
    resolution: int,
    shards: ShardRanges,
    rows_per_shard: int,
    wanted: Mask,
    escapes: float,
    sample_ids: Sequence[str] = (),
) -> Size:
    """Return what a job's store takes once the wanted views of shards are there.

    Args:
        job: of the store.
        teacher: one of the job's.
        resolution: one of the teacher's, pixels.
        shards: of the dataset.
        rows_per_shard: of the dataset.
        wanted: bool [views, shards].
        escapes: share of tokens that the codec keeps in float32.
        sample_ids: some of the dataset's; none: ids as ImageNet-1k has them.
    """
    shape = shapes(teacher.encoder, resolution)
    num_tokens = shape.grid[0] * shape.grid[1]
    stored = zarr_shard.stored_bytes(row_bytes(teacher.codec, num_tokens, shape.patch_dim))
    num_rows = shards.count(wanted)
    num_shards = int(np.count_nonzero(wanted))
    lossy = kind(teacher.codec).lossy
    ids = tuple(sample_ids[:EXAMPLES]) or tuple(
        f"n01440764/n01440764_{number:05d}" for number in range(EXAMPLES)
    )
    table, per_row = _table_bytes(ids, job.views.model_dump_json(), shape.summary_dim, lossy)
    per_row += escapes * num_tokens * (4 * shape.patch_dim + 4) if lossy else 0
    num_views = int(wanted.any(axis=1).sum())
    fitted = 4 * shape.patch_dim**2 + 6 * num_tokens * shape.patch_dim  # basis, bits and spread
    spec, metadata = _description_bytes(job, teacher, resolution)
    moments = sum(8 * (dim * dim + dim) for dim in (shape.summary_dim, shape.patch_dim))
    fixed = num_shards * RECORD_BYTES + num_views * metadata + spec + moments + 1024
    if kind(teacher.codec).of_rows:
        fixed += fitted
    own = num_rows * (stored + per_row) + num_shards * (
        zarr_shard.index_bytes(rows_per_shard) + table
    )
    return Size(round(own) + fixed, fixed, stored, 2 * num_shards + num_views + 4)


@lru_cache(maxsize=64)
def _table_bytes(
    ids: tuple[str, ...], policy: str, summary_dim: int, escapes: bool
) -> tuple[float, float]:
    """Return what a table of rows takes, empty and each row more: it is written, twice."""
    rows = [_made(ids[: len(ids) // times], policy, summary_dim, escapes) for times in (1, 2)]
    more = (len(rows[0]) - len(rows[1])) / (len(ids) - len(ids) // 2) if len(ids) > 1 else 0.0
    return len(rows[0]) - more * len(ids), more


def _made(ids: tuple[str, ...], policy: str, summary_dim: int, escapes: bool) -> memoryview:
    own = POLICY.validate_json(policy)
    drawn = [
        json.dumps(views.draw(own, name, 0, *SIDES).to_json_dict(), sort_keys=True) for name in ids
    ]
    summary = np.zeros((len(ids), summary_dim), np.float32)
    table = rows_table.make(ids, [None] * len(ids), ["0" * 32] * len(ids), drawn, summary)
    if escapes:
        table = rows_table.with_escapes(table, Escapes.none(1))
    return arrow_tables.to_bytes(rows_table.with_checksums(table, np.zeros(len(ids), np.uint32)))


@lru_cache(maxsize=64)
def _codec(name: str, dim: int) -> Codec:
    """Return a codec fitted to something, for the length of its description."""
    random = np.random.default_rng(0)
    scatter = np.diag(random.uniform(1, 2, dim) * 1000)
    return make_codec(default_codec(name), (1000, random.normal(size=dim), scatter))


def _description_bytes(job: CacheJob, teacher: TeacherConfig, resolution: int) -> tuple[int, int]:
    """Return the bytes of spec.json, and of a view's zarr.json, which says all of it again."""
    shape = shapes(teacher.encoder, resolution)
    spec = StoreSpec(
        dataset=DatasetSpec(name=job.dataset.name),
        views=job.views,
        teacher=TeacherSpec(
            name=teacher.name, encoder=teacher.encoder, weights="0" * 64, dtype=teacher.dtype
        ),
        codec=default_codec(teacher.codec),
        resolution=resolution,
        grid=shape.grid,
        patch_dim=shape.patch_dim,
        summary_dim=shape.summary_dim,
    )
    of_rows = kind(teacher.codec).of_rows  # such a codec keeps what is fitted in a file of its own
    codec = _codec("float16" if of_rows else teacher.codec, shape.patch_dim)
    said = description(spec, codec.to_json_dict())
    row_shape = codec.storage_shape(shape.grid[0] * shape.grid[1], shape.patch_dim)
    metadata = zarr_shard.array_metadata(
        1, 1, row_shape, codec.storage_dtype, codec.fill_value, {"eupe": said}
    )
    return len(spec_bytes(said)), len(metadata)
