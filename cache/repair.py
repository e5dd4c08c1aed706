"""Mend a cache root from what is left of it; what cannot be mended is said.

    spec.json    from the attributes of an array's zarr.json
    zarr.json    from spec.json and the sample table
    HEAD         from an older HEAD, the segments, and what it pins
    segments     of a manifest: from other segments, or from shards with their tables of rows;
                 of samples: the last ones are left out, and indexing writes them again
    hashes       of sample ids: from the ids
    shards       that are damaged are deleted, so that a build computes just these

Lost for good are other segments of samples, and moments: nothing else holds what they hold.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from cache.format import layout
from cache.mending import Mended, Mending
from cache.repair_samples import mend_samples
from cache.repair_store import StoreMending
from cache.samples import Samples
from cache.verify import Progress, all_folders, unseen

Shown = Callable[[str, int], AbstractContextManager[Progress]]
"""(folder of a store below the root, its shards) -> what shows how far its check is."""


def repair_root(
    root: str | Path, write: bool, shown: Shown = unseen, compute_batch: int | None = None
) -> Iterator[tuple[str, Mended]]:
    """Mend all that a cache root holds. Reads every byte.

    Args:
        root: the cache root.
        write: False: only say what would be done.
        shown: shows progress.
        compute_batch: of stores that have lost what their first build recorded.

    Yields:
        What was looked at, `<dataset>/samples` or a store's folder below the root, and what was
        found there.

    Raises:
        NotBuilt: there is no such folder.
        StoreError: what is mended cannot be written.
    """
    base = layout.cache_root(root)
    tables, stores = all_folders(base)
    known: dict[str, Samples | None] = {}
    for directory in tables:
        mending = Mending(write)
        dataset = directory.parent.name
        with mending.alone(directory):
            known[dataset] = mend_samples(base, directory, stores, mending)
        yield str(directory.relative_to(base)), mending.result
    for directory in stores:
        mending = Mending(write)
        name = str(directory.relative_to(base))
        with mending.alone(directory):
            samples = known[directory.relative_to(base).parts[0]]
            store = StoreMending(base, directory, samples, mending, compute_batch)
            store.run(partial(shown, name))
        yield name, mending.result
