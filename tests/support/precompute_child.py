"""A build to be killed: `python precompute_child.py ROOT IMAGES`, through Ray, in small shards."""

import sys
from pathlib import Path

from pipelines.caching import indexing, precompute
from pipelines.recipe.config import SourceConfig
from support.small_caches import job, teacher

VIEWS = 2
ROWS_PER_SHARD = 4
COUNT = 60
SHARDS = VIEWS * COUNT // ROWS_PER_SHARD


def killed_job(root: Path, images: Path):
    """Return the job that this script builds."""
    source = SourceConfig(kind="parquet", path=str(images), label_columns=("label",))
    return job(
        root,
        source,
        num_views=VIEWS,
        teachers=(teacher((64, 96)),),
        rows_per_shard=ROWS_PER_SHARD,
        decode_threads=1,
    )


def main(root: str, images: str) -> None:
    """Index, measure and extract."""
    work = killed_job(Path(root), Path(images))
    indexing.index_samples(work)
    with precompute.extractors(work) as pool:
        stores = precompute.resolve_stores(work, pool)
        print(precompute.extract_missing(work, stores, pool).num_shards)


if __name__ == "__main__":
    main(*sys.argv[1:])
