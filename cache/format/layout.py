"""Where everything lies inside a cache root (docs/store_format.md)."""

import re
from pathlib import Path

from cache.files import place
from eupe.spec import StoreSpec

HEAD = "HEAD"
SAMPLES = "samples"
SCRATCH = ".tmp"
_VIEW, _PATCHES, _ROWS = (
    re.compile(name) for name in (r"view-(\d+)", r"c\.(\d+)\.0\.0", r"rows-(\d{8,})\.arrow")
)


def cache_root(root: str | Path) -> Path:
    """Return the cache root, a folder or `s3://bucket/prefix`, as an absolute path.

    Raises:
        ValueError: a URI of another kind.
    """
    return place.root(root)


def samples_directory(root: Path, dataset: str) -> Path:
    """Folder of a dataset's sample table."""
    return root / dataset / SAMPLES


def store_directory(root: Path, spec: StoreSpec) -> Path:
    """Folder of one feature store."""
    return root / spec.directory()


def spec_file(store: Path) -> Path:
    """The store's spec with its fitted values, JSON."""
    return store / "spec.json"


def moments_file(store: Path) -> Path:
    """Moments of summaries and patches, Arrow."""
    return store / "moments.arrow"


def codec_file(directory: Path) -> Path:
    """Fitted values of a codec that has too many for JSON, Arrow; of a store or of a view."""
    return directory / "codec.arrow"


def manifest_directory(store: Path) -> Path:
    """Folder of the manifest: segments and HEAD."""
    return store / "manifest"


def view_directory(store: Path, view: int) -> Path:
    """Folder of one view: a Zarr v3 array of patches, with the tables of its rows beside it."""
    return store / f"view-{view:04d}"


def zarr_file(store: Path, view: int) -> Path:
    """Metadata of the patches array of one view."""
    return view_directory(store, view) / "zarr.json"


def patches_file(store: Path, view: int, shard: int) -> Path:
    """One shard of patches, named as Zarr's default chunk keys have it, separated by dots."""
    return view_directory(store, view) / f"c.{shard}.0.0"


def rows_file(store: Path, view: int, shard: int) -> Path:
    """The table of one shard's rows."""
    return view_directory(store, view) / f"rows-{shard:08d}.arrow"


def shard_of(path: Path) -> tuple[int, int] | None:
    """Return view and shard of a file named as `patches_file` or `rows_file` do, else None."""
    view = _VIEW.fullmatch(path.parent.name)
    shard = _PATCHES.fullmatch(path.name) or _ROWS.fullmatch(path.name)
    return None if view is None or shard is None else (int(view[1]), int(shard[1]))


def scratch_directory(directory: Path) -> Path:
    """Local folder of temporary files and locks of a store or of a sample table."""
    return place.scratch(directory, SCRATCH)
