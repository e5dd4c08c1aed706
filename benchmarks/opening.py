"""What a rank waits for and holds when it opens its stores: a hundred million pictures and more.

    python -m benchmarks.opening [--rows 100000000 1700000000] [--shards 1200000 2500000]

NUM_STORES stores of NUM_VIEWS views each, whose manifests are real, committed in random order by
the COMMIT_RECORDS. The sample table names one real segment again and again: what opening costs is
in its HEAD and not in the files, and a table of 1.7 billion rows would take 140 GB. No shard is
written. A fresh process opens all stores, lists the shards that an epoch is ordered from and finds
the records of BATCH random shards of each; its memory is anonymous memory, as in benchmarks.scale.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import tables
from benchmarks.read_peers import DIM, Ours
from benchmarks.scale import BATCH, COMMIT_RECORDS, begun, memory_mb, records_table
from cache import heads
from cache.format import layout
from cache.reader import Reader
from cache.samples import SEGMENT_ROWS, SamplesHead
from cache.store import Store, create_store, open_store
from eupe.spec import StoreSpec

NUM_STORES, NUM_VIEWS = 3, 2
COLUMNS = {
    "rows": ",",
    "shards": ",",
    "records": ",",
    "build_seconds": ",.0f",
    "open_seconds": ".2f",
    "list_seconds": ".2f",
    "find_seconds": ".2f",
    "cpu_seconds": ".1f",
    "opened_mb": ",.0f",
    "anonymous_mb": ",.0f",
    "peak_mb": ",.0f",
}


def specs() -> list[StoreSpec]:
    """Return what the stores hold: features of as many teachers."""
    teacher = Ours.spec.teacher
    return [
        Ours.spec.model_copy(
            update={"teacher": teacher.model_copy(update={"name": f"teacher_{number}"})}
        )
        for number in range(NUM_STORES)
    ]


def build(root: Path, num_rows: int, num_shards: int, console: Console) -> None:
    """Write the sample table and the manifests."""
    per_shard = num_rows // num_shards
    rows = min(SEGMENT_ROWS, num_rows) // per_shard * per_shard
    samples = begun(root, rows, per_shard).samples
    found = heads.read_head(samples.directory, SamplesHead)
    assert found is not None
    (first,) = found.head.segments
    repeated = tuple(
        first.model_copy(update={"start": start})
        for start in range(0, num_shards * per_shard, rows)
    )
    head = found.head.model_copy(update={"version": found.head.version + 1, "segments": repeated})
    scratch = layout.scratch_directory(samples.directory)
    heads.commit(samples.directory, SamplesHead, lambda there: head, scratch)
    num_shards = len(repeated) * rows // per_shard
    dims = {"summary": Ours.spec.summary_dim, "patches": DIM}
    moments = {kind: (1, np.zeros(dim), np.zeros((dim, dim))) for kind, dim in dims.items()}
    for number, spec in enumerate(specs()):
        manifest = create_store(root, spec, moments, {}).manifest()
        order = np.random.default_rng(number).permutation(num_shards * NUM_VIEWS)
        pieces = np.array_split(order, max(len(order) // COMMIT_RECORDS, 1))
        for piece in track(pieces, f"committing store {number}", console=console, transient=True):
            view, shard = np.divmod(np.sort(piece), num_shards)
            manifest.append(records_table(view, shard, per_shard))


def opened(root: Path) -> tables.Row:
    """Open all stores and find some records; run in a fresh process."""
    start = time.perf_counter()
    stores: list[Store] = [open_store(root, spec) for spec in specs()]
    readers = [Reader(store, range(NUM_VIEWS)) for store in stores]
    open_seconds, opened_mb = time.perf_counter() - start, memory_mb("RssAnon")
    start = time.perf_counter()
    shards = [reader.shards() for reader in readers]
    list_seconds = time.perf_counter() - start
    numbers = np.random.default_rng(0).choice(shards[0].numbers, BATCH).tolist()
    start = time.perf_counter()
    for store in stores:
        manifest = store.manifest()
        if any(manifest.find(NUM_VIEWS - 1, shard) is None for shard in numbers):
            raise RuntimeError("a record was not found")
    seconds = time.perf_counter() - start
    return {
        "rows": len(readers[0]),
        "shards": len(shards[0]),
        "records": sum(store.manifest().total().num_shards for store in stores),
        "open_seconds": open_seconds,
        "list_seconds": list_seconds,
        "find_seconds": seconds,
        "cpu_seconds": time.process_time(),
        "opened_mb": opened_mb,
        "anonymous_mb": memory_mb("RssAnon"),
        "peak_mb": memory_mb("VmHWM"),
    }


def measure(num_rows: int, num_shards: int, console: Console) -> tables.Row:
    """Build one size and open it in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="eupe-opening-") as folder:
        started = time.perf_counter()
        build(Path(folder), num_rows, num_shards, console)
        built = time.perf_counter() - started
        command = [sys.executable, "-m", "benchmarks.opening", "--open", folder]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"build_seconds": built, **json.loads(run.stdout)}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("opening", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000_000, 1_700_000_000])
    parser.add_argument("--shards", type=int, nargs="+", default=[1_200_000, 2_500_000])
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    said = parser.parse_args(argv)
    if said.open is not None:
        print(json.dumps(opened(said.open)))
        return 0
    console = tables.console()
    rows = [measure(*size, console) for size in zip(said.rows, said.shards, strict=True)]
    title = f"opening {NUM_STORES} stores of {NUM_VIEWS} views, committed in random order"
    tables.show(rows, COLUMNS, title, console, said.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
