"""An index to be interrupted: `python indexing_child.py ROOT TARS`, by actors from the start."""

import sys
from pathlib import Path

from pipelines.caching import indexing
from pipelines.images import index
from pipelines.machines import interrupt
from pipelines.recipe.config import SourceConfig
from support.small_caches import job


def main(root: str, tars: str) -> None:
    """Index."""
    index.ALONE_SECONDS, index.PART_IMAGES, index.TASK_BYTES = 0.0, 1, 1
    source = SourceConfig(kind="webdataset", path=tars, key="shard")
    work = job(Path(root), source, cpus_per_actor=2)
    with interrupt.at_once(), indexing.lookers(work) as pool:
        indexing.index_samples(work, pool)


if __name__ == "__main__":
    main(*sys.argv[1:])
