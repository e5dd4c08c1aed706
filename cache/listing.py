"""What stores hold, as plain data: the bodies of `eupe cache ls` and `eupe cache inspect`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cache.errors import NotBuilt
from cache.files.bucket_path import BucketPath
from cache.format import layout
from cache.reader import Reader
from cache.store import Store, StoreInfo, find_stores, open_store

LEVELS_BELOW_ROOT = 4  # dataset / views / teacher / resolution


def store_lines(root: str | Path, only: Sequence[Store] | None = None) -> list[dict[str, object]]:
    """Describe each store of a cache root in one line of columns.

    Args:
        root: the cache root.
        only: the stores that are wanted; None: all.

    Raises:
        NotBuilt: there is no such folder.
        Corrupt: a store's spec or manifest cannot be read.
    """
    base = layout.cache_root(root).resolve()
    wanted = None if only is None else {store.directory.resolve() for store in only}
    return [
        {
            "dataset": info.spec.dataset.name,
            "views": f"{info.spec.views.kind} x {info.num_views}",
            "teacher": info.spec.teacher.name,
            "resolution": info.spec.resolution,
            "codec": info.spec.codec.name,
            "shards": info.num_shards,
            "rows": info.num_rows,
            "invalid": info.num_rows - info.num_valid,
            "bytes": info.num_bytes,
            "directory": str(info.directory.relative_to(base)),
        }
        for info in find_stores(base)
        if wanted is None or info.directory in wanted
    ]


def check_root(root: Path) -> None:
    """Refuse a local folder in or above a cache root: nothing of its stores would be found there.

    Raises:
        NotBuilt: naming the root.
    """
    heads = str(layout.samples_directory(Path(), "*") / layout.HEAD)
    if isinstance(root, BucketPath) or any(root.glob(heads)):
        return
    for above in root.parents[:LEVELS_BELOW_ROOT]:
        samples = layout.samples_directory(above, root.relative_to(above).parts[0])
        if (samples / layout.HEAD).is_file():
            raise NotBuilt(f"{root}: lies in the cache root {above}; wants that")
    for found in root.glob(f"*/{heads}"):
        raise NotBuilt(f"{root}: no cache root; {found.parents[2]} is one")


def describe(directory: Path) -> dict[str, object]:
    """Describe the store in a folder.

    Args:
        directory: of the store, as `eupe cache ls` names it; absolute or from the working folder.

    Returns:
        spec, codec, moments (counts and spread), manifest version, views with their shards and
        rows, reasons of invalid rows with their numbers, provenance.

    Raises:
        NotBuilt: there is no store.
        Corrupt: it cannot be read.
    """
    here = layout.cache_root(directory).resolve()
    deep_enough = len(here.parents) >= LEVELS_BELOW_ROOT and here.is_dir()
    root = here.parents[LEVELS_BELOW_ROOT - 1] if deep_enough else here
    stores = find_stores(root) if deep_enough else []
    info = next((info for info in stores if info.directory == here), None)
    if info is None:
        raise NotBuilt(f"{directory}: no store here; `eupe cache ls` names those of a cache root")
    store = open_store(root, info.spec)
    return {
        "directory": str(here),
        "fingerprint": info.spec.fingerprint(),
        "spec": info.spec.model_dump(mode="json"),
        "codec": store.codec.to_json_dict(),
        "row_shape": list(store.row_shape),
        "dtype": str(store.codec.storage_dtype),
        "moments": moments_of(store),
        "manifest_version": info.version,
        "rows": info.num_rows,
        "bytes": info.num_bytes,
        "views": views_of(store),
        "invalid": invalid_of(store, info),
        "provenance": store.provenance,
    }


def moments_of(store: Store) -> dict[str, dict[str, float | int]]:
    """Return, per token kind, the number of tokens measured and the spread of the channels."""
    found = {}
    for kind, (count, mean, scatter) in store.moments().items():
        std = np.sqrt(np.diag(scatter) / count)
        found[kind] = {
            "tokens": int(count),
            "channels": len(mean),
            "smallest_std": float(std.min()),
            "median_std": float(np.median(std)),
            "largest_std": float(std.max()),
        }
    return found


def views_of(store: Store) -> list[dict[str, int]]:
    """Return shards, rows and valid rows of each view."""
    return [
        {"view": view, "shards": own.num_shards, "rows": own.num_rows, "valid": own.num_valid}
        for view, own in store.manifest().totals().items()
    ]


def invalid_of(store: Store, info: StoreInfo) -> dict[str, int]:
    """Count invalid rows by reason, over all views."""
    if info.num_valid == info.num_rows:
        return {}
    reasons: Counter[str] = Counter()
    for record in store.manifest().records():
        if record.num_invalid:
            rows = np.arange(record.start, record.stop)
            found = Reader(store, [record.view]).select(rows, record.view).reasons
            reasons.update(reason for reason in found if reason)
    return dict(reasons.most_common())
