"""The readers that `benchmarks.read` compares: how each stores rows and gathers a batch.

A peer writes the rows once, as its own documentation advises, and then fills one buffer of the
caller's with the rows asked for, in the order asked for. Nothing is compressed: features are noise
to a compressor. A peer that reads ranges is asked for runs of neighbours as one. To add a peer,
write a class and list it.
"""

import io
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stderr
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np

from cache.codec.known import default_codec
from cache.format import rows_table
from cache.reader import Reader
from cache.samples import Samples
from cache.shard_rows import MappedRows, _FirstTouch
from cache.store import create_store, open_store
from cache.writer import write_shard
from eupe.spec import CentreView, DatasetSpec, EncoderSpec, StoreSpec, TeacherSpec

Rows = np.ndarray
GRID, DIM, ROWS_PER_SHARD = (16, 16), 768, 640  # ViT-B at 256 pixels: 393 KB a row, 252 MB a shard
THREADS = min(os.cpu_count() or 1, 4)  # that copy a batch; tensorstore, zarrs, lance take all


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, None if it is not there."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def runs(rows: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Split row numbers into runs of neighbours: (places in the batch, rows)."""
    ends = np.flatnonzero(np.diff(rows) != 1) + 1
    for start, stop in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
        yield slice(start, stop), slice(int(rows[start]), int(rows[start]) + stop - start)


class Peer(Protocol):
    """One way to keep rows [n, N, D] float16 and to gather some of them."""

    name: str
    version: str | None  # None: not installed here

    def write(self, rows: Rows, folder: Path) -> None:
        """Write the rows below a folder."""

    def open(self, folder: Path) -> None:
        """Open what was written."""

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Fill out [n, N, D] with the rows of those numbers."""


class Memmap:
    """numpy.memmap of one flat file, np.take into the buffer: the floor, one copy from the map."""

    name = "numpy.memmap"
    version: str | None = np.__version__

    def write(self, rows: Rows, folder: Path) -> None:
        """One file of raw bytes."""
        rows.tofile(folder / "rows.bin")
        (folder / "shape.json").write_text(json.dumps(rows.shape))

    def open(self, folder: Path) -> None:
        """Map it."""
        shape = json.loads((folder / "shape.json").read_text())
        self.rows = np.memmap(folder / "rows.bin", np.float16, "r", shape=tuple(shape))

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Copy once; mode="clip" lets numpy write straight into out."""
        np.take(self.rows, rows, axis=0, out=out, mode="clip")


class Ours:
    """A store of this project through `cache.reader`, a batch copied by THREADS threads."""

    name = "eupe"
    version: str | None = installed("eupe")
    threads = THREADS
    spec = StoreSpec(
        dataset=DatasetSpec(name="bench"),
        views=CentreView(),
        teacher=TeacherSpec(
            name="vit_b", encoder=EncoderSpec(architecture="none"), weights="0" * 64
        ),
        codec=default_codec("float16"),
        resolution=256,
        grid=GRID,
        patch_dim=DIM,
        summary_dim=8,
    )

    def write(self, rows: Rows, folder: Path) -> None:
        """Write a store of one view."""
        ids = [str(number) for number in range(len(rows))]
        digests = [name.zfill(32).encode() for name in ids]
        table = {"sample_id": ids, "uri": ids, "digest": digests, "labels": ["{}"] * len(ids)}
        numbers = dict.fromkeys(("offset", "bytes"), 0)
        import polars as pl

        samples = pl.DataFrame(table).with_columns(pl.lit(0).alias(name) for name in numbers)
        Samples.append(folder, self.spec.dataset, samples, ROWS_PER_SHARD)
        moments = {
            kind: (1, np.zeros(dim), np.zeros((dim, dim)))
            for kind, dim in (("summary", self.spec.summary_dim), ("patches", DIM))
        }
        store = create_store(folder, self.spec, moments, {})
        for view, shard in store.todo(1):
            n = len(shard)
            names = ids[shard.start : shard.stop]
            summary = np.zeros((n, self.spec.summary_dim), np.float32)
            told = rows_table.make(names, [None] * n, names, ["{}"] * n, summary)
            part = rows[shard.start : shard.stop]
            store.commit([write_shard(store, view, shard, part, told, {})])

    def open(self, folder: Path) -> None:
        """Open the store."""
        self.reader = Reader(open_store(folder, self.spec), threads=self.threads)

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Take."""
        self.reader.select(rows, 0).patches(out)


class OursAlone(Ours):
    """The same in one thread, as numpy.memmap copies: what a loader's thread does in training."""

    name, threads = "eupe, 1 thread", 1


class OursUnchecked(Ours):
    """The same without comparing rows with their crc32c: what the check costs stands between."""

    name = "eupe, unchecked"

    def open(self, folder: Path) -> None:
        """Open the store; of each shard that is mapped take the way that checked rows have."""
        super().open(folder)
        shards = self.reader._patches
        checking = shards._make

        def plain(view: int, shard: int) -> MappedRows:
            rows = checking(view, shard)
            assert isinstance(rows, MappedRows)
            assert isinstance(rows.row, _FirstTouch)
            rows.row = rows.row._plain
            return rows

        shards._make = plain


class Tensorstore(Ours):
    """tensorstore on the very files of `Ours`; indexes cached, nothing rechecked."""

    name = "tensorstore"
    version: str | None = installed("tensorstore")

    def open(self, folder: Path) -> None:
        """Open view 0 as a Zarr v3 array, with a cache that holds every shard's index."""
        import tensorstore

        path = open_store(folder, self.spec).directory / "view-0000"
        self.array = tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}},
            read=True,
            recheck_cached=False,
            context=tensorstore.Context({"cache_pool": {"total_bytes_limit": 1 << 24}}),
        ).result()

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """One indexed read, written straight into the buffer."""
        import tensorstore

        target = tensorstore.array(out)
        target.write(self.array[rows]).result()


class ZarrPython(Ours):
    """zarr-python on the very files of `Ours`, run by run: 15 x faster than its oindex."""

    name = "zarr-python"
    version: str | None = installed("zarr")

    def open(self, folder: Path) -> None:
        """Open view 0 as a Zarr v3 array."""
        import zarr

        path = open_store(folder, self.spec).directory / "view-0000"
        self.array = zarr.open_array(str(path), mode="r")

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Read each run and copy it into the buffer."""
        for places, run in runs(rows):
            out[places] = self.array[run]


class Zarrs(ZarrPython):
    """zarrs, the codec pipeline in Rust, under zarr-python on the very files of `Ours`."""

    name = "zarrs"
    version: str | None = installed("zarrs")

    def open(self, folder: Path) -> None:
        """Open view 0 with zarrs' pipeline; an array keeps the one it was opened with."""
        import zarr
        import zarrs  # noqa: F401  registers its pipeline

        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            super().open(folder)


class Lance:
    """A Lance dataset, a fixed-size list of halffloats a row, read by `take`."""

    name = "lance"
    version: str | None = installed("pylance")
    column = "patches"

    def write(self, rows: Rows, folder: Path) -> None:
        """Write batches of rows without copying them."""
        import lance
        import pyarrow as pa

        width = rows[0].size
        kind = pa.list_(pa.float16(), width)
        schema = pa.schema({self.column: kind})

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, len(rows), ROWS_PER_SHARD):
                part = pa.array(rows[start : start + ROWS_PER_SHARD].reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(part, width)
                yield pa.record_batch([column], schema=schema)

        lance.write_dataset(batches(), str(folder / "rows.lance"), schema=schema)

    def open(self, folder: Path) -> None:
        """Open the dataset."""
        import lance

        self.rows = lance.dataset(str(folder / "rows.lance"))

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Take, then copy what came into the buffer."""
        place = 0
        for chunk in self.rows.take(rows.tolist(), columns=[self.column])[self.column].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            out[place : place + len(chunk)] = values.reshape(len(chunk), *out.shape[1:])
            place += len(chunk)


class Safetensors:
    """One tensor in one safetensors file, mapped by the library, slice by slice."""

    name = "safetensors"
    version: str | None = installed("safetensors")
    key = "patches"

    def write(self, rows: Rows, folder: Path) -> None:
        """Write one file."""
        from safetensors.numpy import save_file

        save_file({self.key: rows}, folder / "rows.safetensors")

    def open(self, folder: Path) -> None:
        """Map it."""
        from safetensors import safe_open

        self.file = safe_open(folder / "rows.safetensors", framework="numpy")
        self.rows = self.file.get_slice(self.key)

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Slice each run and copy it into the buffer."""
        for places, run in runs(rows):
            out[places] = self.rows[run]


class MosaicMl:
    """MDS shards of MosaicML Streaming, read where they lie by its LocalDataset."""

    name = "mosaicml-streaming"
    version: str | None = installed("mosaicml-streaming")
    column = "patches"

    def write(self, rows: Rows, folder: Path) -> None:
        """Write shards of the default size."""
        from streaming import MDSWriter

        shape = ",".join(str(size) for size in rows.shape[1:])
        columns = {self.column: f"ndarray:float16:{shape}"}
        with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
            for row in rows:
                writer.write({self.column: row})

    def open(self, folder: Path) -> None:
        """Open the shards."""
        from streaming import LocalDataset

        self.rows = LocalDataset(str(folder / "mds"))

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Read row by row."""
        for place, row in enumerate(rows.tolist()):
            out[place] = self.rows[row][self.column]


class Litdata:
    """Chunks of litdata, read by its StreamingDataset from the folder they lie in."""

    name = "litdata"
    version: str | None = installed("litdata")

    def write(self, rows: Rows, folder: Path) -> None:
        """Write chunks of 64 MB, litdata's advice."""
        from litdata.streaming.cache import Cache

        cache = Cache(str(folder / "chunks"), chunk_bytes="64MB")
        for number, row in enumerate(rows):
            cache[number] = row
        cache.done()
        cache.merge(1)

    def open(self, folder: Path) -> None:
        """Open the chunks."""
        from litdata import StreamingDataset

        self.rows = StreamingDataset(str(folder / "chunks"), shuffle=False)

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Read row by row."""
        for place, row in enumerate(rows.tolist()):
            out[place] = self.rows[row]


class Webdataset:
    """Tars of .npy files, read by wids, WebDataset's indexed reader (its version 1 has none)."""

    name = "webdataset"
    version: str | None = installed("webdataset")

    def write(self, rows: Rows, folder: Path) -> None:
        """Write tars and the index that wids wants."""
        import webdataset

        shards: list[dict[str, object]] = []
        for start in range(0, len(rows), ROWS_PER_SHARD):
            path = folder / f"rows-{start:08d}.tar"
            part = rows[start : start + ROWS_PER_SHARD]
            with webdataset.TarWriter(str(path)) as writer:
                for number, row in enumerate(part, start):
                    writer.write({"__key__": f"{number:08d}", "npy": row})
            shards.append({"url": str(path), "nsamples": len(part)})
        (folder / "index.json").write_text(json.dumps(shards))

    def open(self, folder: Path) -> None:
        """Open the tars that the index names."""
        import wids

        shards = json.loads((folder / "index.json").read_text())
        cache = str(folder / "cache")  # made cold with the rest
        with redirect_stderr(io.StringIO()):  # it prints what it was given
            self.rows = wids.ShardListDataset(shards, keep=True, cache_dir=cache)

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Read row by row."""
        for place, row in enumerate(rows.tolist()):
            out[place] = self.rows[row][".npy"]


PEERS: tuple[type[Peer], ...] = (
    Memmap,
    Ours,
    OursAlone,
    OursUnchecked,
    Tensorstore,
    ZarrPython,
    Zarrs,
    Lance,
    Safetensors,
    MosaicMl,
    Litdata,
    Webdataset,
)
