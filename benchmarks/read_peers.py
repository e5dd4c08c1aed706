"""The readers that `benchmarks.read` compares: how each stores rows and gathers a batch.

A peer writes the rows once, as its own documentation advises, and then fills one buffer of the
caller's with the rows asked for, in the order asked for. To add one, write a class and list it.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np

from cache import arrow_shard
from cache.codec import default_codec
from cache.reader import Reader
from cache.samples import Samples
from cache.store import create_store, open_store
from cache.writer import write_shard
from eupe.spec import CentreView, DatasetSpec, EncoderSpec, StoreSpec, TeacherSpec

Rows = np.ndarray
GRID, DIM, ROWS_PER_SHARD = (16, 16), 768, 640  # ViT-B at 256 pixels: 393 KB a row, 252 MB a shard


class Peer(Protocol):
    """One way to keep rows [n, N, D] float16 and to gather some of them."""

    name: str
    version: str

    def write(self, rows: Rows, folder: Path) -> None:
        """Write the rows below a folder."""

    def open(self, folder: Path) -> None:
        """Open what was written."""

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Fill out [n, N, D] with the rows of those numbers."""


class Memmap:
    """numpy.memmap of one flat file, np.take into the buffer: the floor, one copy from the map."""

    name, version = "numpy.memmap", np.__version__

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
    """A store of this project through `cache.reader`."""

    name, version = "eupe", version("eupe")
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
        table = {"sample_id": ids, "uri": ids, "digest": ids, "labels": ["{}"] * len(ids)}
        numbers = dict.fromkeys(("offset", "bytes", "width", "height"), 0)
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
            told = arrow_shard.make(names, [None] * n, names, ["{}"] * n, summary)
            part = rows[shard.start : shard.stop]
            store.commit([write_shard(store, view, shard, part, told, {})])

    def open(self, folder: Path) -> None:
        """Open the store."""
        self.reader = Reader(open_store(folder, self.spec))

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Take."""
        self.reader.take(rows, 0, out)


class Tensorstore(Ours):
    """tensorstore on the very files of `Ours`; indexes cached, nothing rechecked."""

    name, version = "tensorstore", version("tensorstore")

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
    """zarr-python on the very files of `Ours`, row by row: 15 x faster than its oindex."""

    name, version = "zarr-python", version("zarr")

    def open(self, folder: Path) -> None:
        """Open view 0 as a Zarr v3 array."""
        import zarr

        path = open_store(folder, self.spec).directory / "view-0000"
        self.array = zarr.open_array(str(path), mode="r")

    def gather(self, rows: Rows, out: np.ndarray) -> None:
        """Read each row and copy it into the buffer."""
        for place, row in enumerate(rows.tolist()):
            out[place] = self.array[row]


PEERS: tuple[type[Peer], ...] = (Memmap, Ours, Tensorstore, ZarrPython)
