"""How a large store opens: ten million rows in a hundred thousand shards, and a tenth of that.

    python -m benchmarks.scale [--rows 1000000 10000000] [--folder DIR] [--json FILE]
    python -m benchmarks.scale --records 20000000 240000000

With `--records` it is the manifest alone, of so many shards: the records of a random batch are
found and read. Up to COMMITTED records are committed in random order, COMMIT_RECORDS at once; of
more (the 240 M of 1.7 B pictures in two views and six stores) one run is written, its digests holes
in files.

The sample table and manifest are real; the shards of patches are sparse files (a hole with a real
index at its end, 3.9 TB of addresses in all) and the tables of rows are hard links of one. Each
size is opened in a fresh process, so that its memory is that of the open store alone: anonymous
memory, since mapped pages of files are the kernel's to drop.
"""

import argparse
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from rich.console import Console
from rich.progress import track

from benchmarks import tables
from benchmarks.read_peers import DIM, GRID, Ours
from cache import heads, runs
from cache.format import arrow_tables, layout, rows_table, zarr_shard
from cache.format.arrow_tables import from_numpy
from cache.format.record_table import SCHEMA, ShardRecord
from cache.manifest import Manifest, ManifestHead
from cache.reader import Reader
from cache.runs import Part
from cache.samples import Samples
from cache.store import Store, create_store, open_store

ROWS_PER_SHARD = 100
ROW_BYTES = GRID[0] * GRID[1] * DIM * 2
LINKS = 50_000  # names an inode may have on ext4: 65,000
BATCH = 64
COMMITTED, COMMIT_RECORDS = 20_000_000, 100_000
NUM_VIEWS = 12
COLUMNS = {
    "rows": ",",
    "shards": ",",
    "open_seconds": ".3f",
    "first_batch_seconds": ".3f",
    "rss_mb": ",.0f",
}
RECORD_COLUMNS = {
    "records": ",",
    "build_seconds": ",.0f",
    "parts": ",",
    "runs": ",",
    "open_seconds": ".3f",
    "first_batch_seconds": ".3f",
    "again_seconds": ".3f",
    "anonymous_mb": ",.0f",
    "rss_mb": ",.0f",
    "peak_mb": ",.0f",
}
PAGE = mmap.PAGESIZE
Numbers = npt.NDArray[np.int64]


def begun(root: Path, num_rows: int, rows_per_shard: int) -> Store:
    """Create a store of made-up samples; no shard is in it yet."""
    numbers = pl.DataFrame({"n": np.arange(num_rows)})
    text = pl.col("n").cast(pl.String)
    rows = numbers.select(
        sample_id="class/" + text.str.zfill(12),
        uri="class/" + text.str.zfill(12) + ".jpg",
        offset=pl.lit(0),
        bytes=pl.lit(110_000),
        digest=text.str.zfill(32).cast(pl.Binary),
        labels=pl.lit('{"class":"n01440764"}'),
    )
    Samples.append(root, Ours.spec.dataset, rows, rows_per_shard)
    dims = {"summary": Ours.spec.summary_dim, "patches": DIM}
    moments = {kind: (1, np.zeros(dim), np.zeros((dim, dim))) for kind, dim in dims.items()}
    return create_store(root, Ours.spec, moments, {})


def build(root: Path, num_rows: int, console: Console) -> Store:
    """Write the store."""
    store = begun(root, num_rows, ROWS_PER_SHARD)
    samples, spec = store.samples, store.spec

    stored = zarr_shard.stored_bytes(ROW_BYTES)
    offsets = np.arange(ROWS_PER_SHARD, dtype="<u8") * np.uint64(stored)
    sizes = np.full_like(offsets, ROW_BYTES + zarr_shard.CHECKSUM_BYTES)
    index = np.stack([offsets, sizes], axis=1).tobytes()
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


def open_and_read(root: Path) -> tables.Row:
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
    return {
        "open_seconds": opened - start,
        "first_batch_seconds": taken - before,
        "rss_mb": memory_mb("RssAnon") - (out.nbytes + summaries.nbytes) / 2**20,
        "shards": len(reader.shards()),
    }


def records_table(view: Numbers, shard: Numbers, rows_per_shard: int = ROWS_PER_SHARD) -> pa.Table:
    """Return sorted records of shards (record_table.SCHEMA), their digests and sizes zero."""
    zeros = pa.py_buffer(np.zeros((len(shard), 32), np.uint8))
    columns: dict[str, pa.Array] = {}
    for field in SCHEMA:
        if field.name == "provenance":
            names = pa.array(['{"compute_batch":32,"device":"cpu"}'])
            numbers = from_numpy(np.zeros(len(shard), np.int32))
            columns[field.name] = pa.DictionaryArray.from_arrays(numbers, names)
        elif pa.types.is_fixed_size_binary(field.type):
            columns[field.name] = pa.Array.from_buffers(field.type, len(shard), [None, zeros])
        else:
            starts = shard * rows_per_shard
            known = {"view": view, "shard": shard, "start": starts, "stop": starts + rows_per_shard}
            values = known.get(field.name, np.zeros(len(shard)))
            columns[field.name] = from_numpy(values.astype(field.type.to_pandas_dtype()))
    return pa.table(columns, schema=SCHEMA)


def build_records(folder: Path, num_records: int, console: Console) -> None:
    """Write a manifest of so many records, NUM_VIEWS a shard."""
    pins = {"spec_sha256": "0" * 64, "moments_sha256": "0" * 64}
    num_shards = num_records // NUM_VIEWS
    Manifest.create(folder, ManifestHead(**pins, provenance={}))
    manifest = Manifest.open(folder)
    if num_records <= COMMITTED:
        order = np.random.default_rng(0).permutation(num_shards * NUM_VIEWS)
        pieces = np.array_split(order, max(len(order) // COMMIT_RECORDS, 1))
        for piece in track(pieces, "committing", console=console, transient=True):
            view, shard = np.divmod(np.sort(piece), num_shards)
            manifest.append(records_table(view, shard))
        return
    parts = []
    starts = [
        (view, first)
        for view in range(NUM_VIEWS)
        for first in range(0, num_shards, runs.PART_RECORDS)
    ]
    for number, first in track(starts, "writing parts", console=console, transient=True):
        shard = np.arange(first, min(first + runs.PART_RECORDS, num_shards))
        content = arrow_tables.to_bytes(records_table(np.full_like(shard, number), shard))
        sha256 = hashlib.sha256(content).hexdigest()
        name = f"{1:08d}-{sha256[:16]}.arrow"
        write_sparse(manifest.directory / name, content)
        ends = (number, first), (number, int(shard[-1]))
        parts.append(
            Part(name=name, rows=len(shard), sha256=sha256, run=1, first=ends[0], last=ends[1])
        )
    head = manifest.head.model_copy(update={"version": 1, "segments": tuple(parts)})
    heads.commit(manifest.directory, ManifestHead, lambda there: head, folder / ".tmp")


def write_sparse(path: Path, content: memoryview) -> None:
    """Write a file, its pages of zeros as holes."""
    pages = np.zeros((-(-len(content) // PAGE), PAGE), np.uint8)
    pages.reshape(-1)[: len(content)] = np.frombuffer(content, np.uint8)
    full = np.flatnonzero(pages.any(axis=1))
    with open(path, "wb") as file:
        for run in np.split(full, np.flatnonzero(np.diff(full) > 1) + 1):
            file.seek(int(run[0]) * PAGE)
            file.write(pages[run[0] : run[-1] + 1].data)
        file.truncate(len(content))


def find_records(folder: Path) -> tables.Row:
    """Open a manifest and find the records of a batch; run in a fresh process."""
    start = time.perf_counter()
    manifest = Manifest.open(folder)
    opened = time.perf_counter()
    num_shards = max(part.last[1] for part in manifest.head.segments) + 1
    rng = np.random.default_rng(1)
    views, shards = (rng.integers(0, count, BATCH).tolist() for count in (NUM_VIEWS, num_shards))
    asked = list(zip(views, shards, strict=True))
    before = time.perf_counter()
    found = [manifest.find(view, shard) for view, shard in asked]
    done = time.perf_counter()
    again = [manifest.find(view, shard) for view, shard in asked]
    known = {(each.view, each.shard) for each in found if each is not None}
    if known != set(asked) or again != found:
        raise RuntimeError("a record was not found")
    return {
        "parts": len(manifest.head.segments),
        "runs": len({part.run for part in manifest.head.segments}),
        "open_seconds": opened - start,
        "first_batch_seconds": done - before,
        "again_seconds": time.perf_counter() - done,
        "anonymous_mb": memory_mb("RssAnon"),
        "rss_mb": memory_mb("VmRSS"),
        "peak_mb": memory_mb("VmHWM"),
    }


def memory_mb(name: str, process: int | str = "self") -> float:
    """Return a figure of a process's memory, as the kernel names it."""
    status = Path(f"/proc/{process}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def measure_records(num_records: int, folder: Path, console: Console) -> tables.Row:
    """Build a manifest, if it is not there, and open it in a fresh process."""
    root = folder / f"records-{num_records}"
    started = time.perf_counter()
    if not (root / "done").exists():
        build_records(root, num_records, console)
        (root / "done").touch()
    built = time.perf_counter() - started
    command = [sys.executable, "-m", "benchmarks.scale", "--find", str(root)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {"records": num_records, "build_seconds": built, **json.loads(run.stdout)}


def measure(num_rows: int, folder: Path, console: Console) -> tables.Row:
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
    parser.add_argument("--records", type=int, nargs="+", help="shards of a manifest alone")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--find", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.open is not None:
        print(json.dumps(open_and_read(arguments.open)))
        return 0
    if arguments.find is not None:
        print(json.dumps(find_records(arguments.find)))
        return 0
    console = tables.console()
    with tempfile.TemporaryDirectory(prefix="eupe-scale-") as fresh:
        folder = arguments.folder or Path(fresh)
        folder.mkdir(parents=True, exist_ok=True)
        if arguments.records:
            found = [measure_records(count, folder, console) for count in arguments.records]
            title = f"opening a manifest, then the records of {BATCH} random shards"
            tables.show(found, RECORD_COLUMNS, title, console, arguments.json)
            return 0
        table = [measure(num_rows, folder, console) for num_rows in arguments.rows]
    title = f"opening a store, then {BATCH} random rows of {ROW_BYTES / 1e3:.0f} kB"
    tables.show(table, COLUMNS, title, console, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
