"""How a large store opens: ten million rows in a hundred thousand shards, and a tenth of that.

    python -m benchmarks.scale [--rows 1000000 10000000] [--folder DIR] [--json FILE]

The sample table and manifest are real; the shards of patches are sparse files (a hole with a real
index at its end, 3.9 TB of addresses in all) and the tables of rows are hard links of one. Each
size is opened in a fresh process, so that its memory is that of the open store alone: anonymous
memory, since mapped pages of files are the kernel's to drop.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console
from rich.progress import track

from benchmarks import tables
from benchmarks.read_peers import DIM, GRID, Ours
from cache.format import arrow_tables, layout, rows_table, zarr_shard
from cache.manifest import ShardRecord
from cache.reader import Reader
from cache.samples import Samples
from cache.store import Store, create_store, open_store

ROWS_PER_SHARD = 100
ROW_BYTES = GRID[0] * GRID[1] * DIM * 2
LINKS = 50_000  # names an inode may have on ext4: 65,000
BATCH = 64
COLUMNS = {
    "rows": ",",
    "shards": ",",
    "open_seconds": ".3f",
    "first_batch_seconds": ".3f",
    "rss_mb": ",.0f",
}


def build(root: Path, num_rows: int, console: Console) -> Store:
    """Write the store."""
    numbers = pl.DataFrame({"n": np.arange(num_rows)})
    text = pl.col("n").cast(pl.String)
    samples = Samples.append(
        root,
        Ours.spec.dataset,
        numbers.select(
            sample_id="class/" + text.str.zfill(12),
            uri="class/" + text.str.zfill(12) + ".jpg",
            offset=pl.lit(0),
            bytes=pl.lit(110_000),
            digest=text.str.zfill(32).cast(pl.Binary),
            labels=pl.lit('{"class":"n01440764"}'),
        ),
        ROWS_PER_SHARD,
    )
    spec = Ours.spec
    dims = {"summary": spec.summary_dim, "patches": DIM}
    moments = {kind: (1, np.zeros(dim), np.zeros((dim, dim))) for kind, dim in dims.items()}
    store = create_store(root, spec, moments, {})

    stored = zarr_shard.stored_bytes(ROW_BYTES)
    offsets = np.arange(ROWS_PER_SHARD, dtype="<u8") * np.uint64(stored)
    index = np.stack([offsets, np.full_like(offsets, stored)], axis=1).tobytes()
    tail = index + zarr_shard.checksum(index)
    names = [f"{n}" for n in range(ROWS_PER_SHARD)]
    summary = np.zeros((ROWS_PER_SHARD, spec.summary_dim), np.float32)
    told = rows_table.make(names, [None] * len(names), names, ["{}"] * len(names), summary)
    hole = np.zeros((1, ROW_BYTES), np.uint8)  # what a hole in a file reads as
    sums = zarr_shard.checksums(hole).repeat(ROWS_PER_SHARD)
    rows = arrow_tables.to_bytes(rows_table.with_checksums(told, sums))
    rows_sha256 = hashlib.sha256(rows).hexdigest()
    records = []
    view = layout.view_directory(store.directory, 0)
    view.mkdir()
    for shard in track(samples.shards(), "writing shards", console=console, transient=True):
        patches = layout.patches_file(store.directory, 0, shard.shard)
        with open(patches, "wb") as file:
            file.seek(ROWS_PER_SHARD * stored)
            file.write(tail)
        original = layout.rows_file(store.directory, 0, shard.shard // LINKS * LINKS)
        if shard.shard % LINKS == 0:
            original.write_bytes(rows)
        else:
            os.link(original, layout.rows_file(store.directory, 0, shard.shard))
        records.append(
            ShardRecord(
                view=0,
                shard=shard.shard,
                start=shard.start,
                stop=shard.stop,
                num_valid=len(shard),
                num_escapes=0,
                samples_digest=samples.shard_digest(shard.shard),
                patches_bytes=ROWS_PER_SHARD * stored + len(tail),
                patches_sha256="0" * 64,
                rows_bytes=len(rows),
                rows_sha256=rows_sha256,
                provenance='{"compute_batch":32,"device":"cpu","torch":"2.14.1"}',
            )
        )
    store.commit(records)
    return store


def open_and_read(root: Path) -> dict[str, float]:
    """Open the store and take one random batch; run in a fresh process."""
    start = time.perf_counter()
    reader = Reader(open_store(root, Ours.spec))
    opened = time.perf_counter()
    rows = np.random.default_rng(0).integers(0, len(reader), BATCH)
    out = np.empty((BATCH, *reader.row_shape), reader.dtype)
    before = time.perf_counter()
    selected = reader.select(rows)
    selected.patches(out)
    summaries, _ = selected.summaries, reader.sample_ids(rows)
    taken = time.perf_counter()
    status = Path("/proc/self/status").read_text()
    anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return {
        "open_seconds": opened - start,
        "first_batch_seconds": taken - before,
        "rss_mb": int(anonymous.split()[1]) / 1024 - (out.nbytes + summaries.nbytes) / 2**20,
        "shards": len(reader.shards()),
    }


def measure(num_rows: int, folder: Path, console: Console) -> dict[str, float]:
    """Build one size, if it is not there, and open it in a fresh process."""
    root = folder / f"scale-{num_rows}"
    if not (root / "done").exists():
        build(root, num_rows, console)
        (root / "done").touch()
    command = [sys.executable, "-m", "benchmarks.scale", "--open", str(root)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"rows": num_rows, **json.loads(run.stdout)}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("scale", __doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, help="keep the data here (default: a fresh folder)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.open is not None:
        print(json.dumps(open_and_read(arguments.open)))
        return 0
    console = tables.console()
    with tempfile.TemporaryDirectory(prefix="eupe-scale-") as fresh:
        folder = arguments.folder or Path(fresh)
        folder.mkdir(parents=True, exist_ok=True)
        table = [measure(num_rows, folder, console) for num_rows in arguments.rows]
    title = f"opening a store, then {BATCH} random rows of {ROW_BYTES / 1e3:.0f} kB"
    tables.show(table, COLUMNS, title, console, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
