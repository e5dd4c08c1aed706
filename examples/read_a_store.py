"""Read the same store four ways and show that they agree: ours, zarr-python, tensorstore, polars.

    python examples/read_a_store.py ROOT

ROOT is a cache root, as `eupe cache build` or the demo writes one (runs/cache). The files
are standard Zarr v3 and Arrow IPC: nothing of this project is needed to read them.
"""

import sys

import numpy as np
import polars as pl
import tensorstore
import zarr

from cache.errors import StoreError
from cache.format import layout
from cache.reader import Reader
from cache.store import Store, find_stores, open_store

SAMPLES = 256  # compared per view; enough to touch several shards of a small store


def compare(store: Store, view: int) -> str:
    """Compare one view of a store through all readers; return what was compared."""
    reader = Reader(store, [view])
    known = np.concatenate([np.arange(s.start, s.stop) for s in reader.shards()])
    rows = np.random.default_rng(0).permutation(known)[:SAMPLES]
    directory = layout.view_directory(store.directory, view)

    selected = reader.select(rows, view)
    ours = selected.patches()
    by_zarr = zarr.open_array(str(directory), mode="r").oindex[rows]
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(directory)}}
    by_tensorstore = tensorstore.open(spec, read=True).result()[rows].read().result()
    # assert_array_equal counts NaN equal to NaN: rows that are invalid read as NaN everywhere.
    np.testing.assert_array_equal(by_zarr, ours)
    np.testing.assert_array_equal(by_tensorstore, ours)

    tables = [
        pl.read_ipc(layout.rows_file(store.directory, view, s.shard)) for s in reader.shards()
    ]
    by_polars = pl.concat(tables).join(
        pl.DataFrame({"sample_id": reader.sample_ids(rows)}),
        on="sample_id",
        how="right",
        maintain_order="right",
    )
    np.testing.assert_array_equal(by_polars["summary"].to_numpy(), selected.summaries)
    return (
        f"view {view}: patches {ours.dtype}{list(ours.shape)} equal through our reader, "
        f"zarr-python {zarr.__version__} and tensorstore; summaries "
        f"[{len(rows)}, {store.spec.summary_dim}] equal through our reader and polars; "
        f"{int((~selected.valid).sum())} rows invalid"
    )


def main(arguments: list[str]) -> int:
    """Compare every view of every store below a root."""
    if len(arguments) != 1:
        print("usage: python examples/read_a_store.py ROOT", file=sys.stderr)
        return 2
    try:
        stores = find_stores(arguments[0])
        if not any(info.num_shards for info in stores):
            print(f"{arguments[0]}: no built store below this folder", file=sys.stderr)
            return 2
        for info in stores:
            print(f"{info.directory}  ({info.spec.codec.name}, {info.num_shards} shards)")
            store = open_store(arguments[0], info.spec)
            for view in store.manifest().totals():
                print(f"  {compare(store, view)}")
    except StoreError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
