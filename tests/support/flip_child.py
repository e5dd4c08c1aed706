"""Flips bits of every kind of file of a small store, one at a time, and looks at what is read.

`python flip_child.py FOLDER CODEC EVERY PATCHES`, FOLDER empty: flips every EVERY-th bit of each
small file and PATCHES seeded bits of patches, and prints one JSON line: kind -> {"bits", "refused",
"by_verify", "unseen"}. A process of its own, so that a bit that ends it is seen.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache import dropping
from cache.errors import StoreError
from cache.format import arrow_tables, layout, zarr_shard
from cache.format.sample_table import SOURCES
from cache.reader import Reader
from cache.samples import Samples, segment_files
from cache.store import Store, open_store
from cache.verify import unseen, verify_root
from support.toy_stores import DATASET, GRID, PATCH_DIM, ROWS_PER_SHARD, Toy, ids, sample_table

COUNT = 7
VIEW, SHARD = 1, 0
"""Of the shard whose files are damaged; its second row is invalid."""
DROPPED = "a/005"
"""A sample of the other one, that is taken out."""
TOKENS = np.ones((1, GRID[0] * GRID[1], PATCH_DIM), np.float32)

Look = Callable[[], object]
"""Opens a file anew and returns all that is read of it."""


def looks(store: Store) -> dict[str, tuple[Path, Look]]:
    """Return kind -> the file of that kind, and what reads everything of it."""
    samples = layout.samples_directory(store.root, DATASET.name)
    segments = segment_files(store.root, DATASET.name)
    manifest = layout.manifest_directory(store.directory)
    codec = layout.codec_file(store.directory)

    def all_samples() -> object:
        opened = Samples.open(store.root, DATASET.name)
        return [
            opened.table.rows(),
            opened.rows_of(opened.table["sample_id"].to_list()).tolist(),
            opened.dataset,
            opened.rows_per_shard,
            opened.shards(),
            opened.dropped.tolist(),
            opened.sources().to_pylist(),
        ]

    def records() -> object:
        opened = open_store(store.root, store.spec)
        found = opened.manifest()
        return [found.version, list(found.records()), opened.provenance, found.head]

    def rows() -> object:
        return bytes(arrow_tables.to_bytes(Reader(store, [VIEW]).table(VIEW, SHARD).table))

    def patches() -> object:
        everything = np.arange(ROWS_PER_SHARD)
        return Reader(store, [VIEW]).select(everything, VIEW).patches().tobytes()

    def fitted() -> object:
        return open_store(store.root, store.spec).codec.encode(TOKENS).data.tobytes()

    found: dict[str, tuple[Path, Look]] = {
        "samples": (segments[0][0], all_samples),
        "hashes": (segments[1][0], all_samples),
        "sources": (segments[2][0], all_samples),
        "dropped": (segments[3][0], all_samples),
        "samples HEAD": (samples / layout.HEAD, all_samples),
        "manifest": (next(manifest.glob("*.arrow")), records),
        "manifest HEAD": (manifest / layout.HEAD, records),
        "spec": (
            layout.spec_file(store.directory),
            lambda: open_store(store.root, store.spec).codec.to_json_dict(),
        ),
        "moments": (layout.moments_file(store.directory), lambda: repr(store.moments())),
        "zarr.json": (layout.zarr_file(store.directory, VIEW), lambda: None),  # for others
        "rows": (layout.rows_file(store.directory, VIEW, SHARD), rows),
        "index": (layout.patches_file(store.directory, VIEW, SHARD), patches),
        "patches": (layout.patches_file(store.directory, VIEW, SHARD), patches),
    }
    if codec.is_file():  # of a codec that is fitted to more than moments
        found["codec"] = (codec, fitted)
        found["codec of a view"] = (layout.codec_file(store.directory / "view-0001"), lambda: None)
    return found


def bits_of(kind: str, path: Path, every: int, num_patches: int) -> Iterable[int]:
    """Return which bits of a file are flipped; of a shard either its index or what is before."""
    size, index = path.stat().st_size, zarr_shard.index_bytes(ROWS_PER_SHARD)
    if kind == "patches":
        random = np.random.Generator(np.random.Philox(12))
        found: list[int] = random.integers(0, 8 * (size - index), num_patches).tolist()
        return found
    first = 8 * (size - index) if kind == "index" else 0
    return range(first + first % every, 8 * size, every)


def verified(root: Path) -> bool:
    """True if verify finds no problem below a root."""
    return not any(report.problems for _, report in verify_root(root, True, unseen))


def main(folder: str, codec: str, every: str, num_patches: str) -> None:
    """Flip, look, flip back."""
    toy = Toy(Path(folder), codec=codec, bad={"a/001": "no image"})
    indexed = pa.table([["a.tar"], [COUNT], ["stamp"], ["[]"]], schema=SOURCES)
    given = sample_table(ids(COUNT))
    Samples.append(toy.root, DATASET, given, ROWS_PER_SHARD, sources=indexed)
    store = toy.build(num_views=2)
    dropping.drop(toy.root, DATASET.name, [DROPPED])
    found = {}
    for kind, (path, look) in looks(store).items():
        wanted = look()
        counts = {"bits": 0, "refused": 0, "by_verify": 0}
        unseen = []
        with path.open("r+b", buffering=0) as file:
            for bit in bits_of(kind, path, int(every), int(num_patches)):
                sound = os.pread(file.fileno(), 1, bit // 8)
                os.pwrite(file.fileno(), bytes([sound[0] ^ 1 << bit % 8]), bit // 8)
                counts["bits"] += 1
                try:
                    same = look() == wanted
                except StoreError:
                    counts["refused"] += 1
                else:
                    if same and not verified(store.root):
                        counts["by_verify"] += 1
                    else:
                        unseen.append(bit)
                os.pwrite(file.fileno(), sound, bit // 8)
        assert look() == wanted
        assert verified(store.root)
        found[kind] = {**counts, "unseen": unseen}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
