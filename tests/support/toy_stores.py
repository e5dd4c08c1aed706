"""Small stores with known contents, for the tests of the cache."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from cache.codec.known import default_codec, make_codec
from cache.format import rows_table
from cache.samples import DROPPED_REASON, Samples
from cache.shard_ranges import ShardRange
from cache.store import Store, create_store
from cache.writer import write_shard
from eupe.spec import AugmentedView, DatasetSpec, EncoderSpec, StoreSpec, TeacherSpec

DATASET = DatasetSpec(name="toy")
GRID = (2, 3)
PATCH_DIM = 8
SUMMARY_DIM = 5
ROWS_PER_SHARD = 4


def sample_table(ids: list[str], image: str = "image of ") -> pl.DataFrame:
    """A sample table with one made-up image a sample id."""
    return pl.DataFrame(
        {
            "sample_id": ids,
            "uri": [f"{name}.png" for name in ids],
            "offset": [0] * len(ids),
            "bytes": [100 + len(name) for name in ids],
            "digest": [hashlib.sha256(f"{image}{name}".encode()).digest() for name in ids],
            "labels": ['{"class": "x"}'] * len(ids),
        }
    )


def store_spec(codec: str = "float16", **changes: object) -> StoreSpec:
    """A spec of a small store."""
    fields: dict[str, object] = {
        "dataset": DATASET,
        "views": AugmentedView(canvas=64),
        "teacher": TeacherSpec(
            name="toy_teacher", encoder=EncoderSpec(architecture="toy"), weights="0" * 64
        ),
        "codec": default_codec(codec),
        "resolution": 32,
        "grid": GRID,
        "patch_dim": PATCH_DIM,
        "summary_dim": SUMMARY_DIM,
    }
    return StoreSpec.model_validate({**fields, **changes})


def moments(dim: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Moments of 100 made-up tokens: mean 0, standard deviation 1."""
    return 100, np.zeros(dim), 100.0 * np.eye(dim)


def features(sample_id: str, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Patches [N, D] and summary [D] of a sample, a pure function of its id and view."""
    rng = np.random.default_rng([view, *sample_id.encode()])
    patches = rng.standard_normal((GRID[0] * GRID[1], PATCH_DIM), np.float32)
    return patches, rng.standard_normal(SUMMARY_DIM, np.float32)


@dataclass
class Toy:
    """A store being built, and what was written into it."""

    root: Path
    codec: str = "float16"
    bad: dict[str, str] = field(default_factory=dict)
    """sample_id -> reason: written as invalid."""

    def add_samples(self, ids: list[str]) -> Samples:
        """Append samples."""
        return Samples.append(self.root, DATASET, sample_table(ids), ROWS_PER_SHARD)

    def store(self) -> Store:
        """Create or open the store."""
        given = {"summary": moments(SUMMARY_DIM), "patches": moments(PATCH_DIM)}
        rows = np.stack([features(name, 0)[0] for name in ids(16, "fit")])
        spec, made_by = store_spec(self.codec), {"compute_batch": 8}
        codec = make_codec(spec.codec, given["patches"], GRID, rows)
        return create_store(self.root, spec, given, made_by, codec)

    def write(self, store: Store, view: int, shard: ShardRange):
        """Write one shard, commit nothing."""
        ids = store.samples.shard(shard.shard)["sample_id"].to_list()
        made = [features(name, view) for name in ids]
        encoded = store.codec.encode(np.stack([patches for patches, _ in made]))
        reasons = [self.bad.get(n, r) for n, r in zip(ids, encoded.reasons, strict=True)]
        dropped = np.isin(np.arange(shard.start, shard.stop), store.samples.dropped).tolist()
        rows = rows_table.make(
            ids,
            [DROPPED_REASON if d else r for d, r in zip(dropped, reasons, strict=True)],
            [None if d else f"canvas of {n} {view}" for d, n in zip(dropped, ids, strict=True)],
            [None if d else '{"flip": false}' for d in dropped],
            np.stack([summary for _, summary in made]),
        )
        return write_shard(
            store, view, shard, encoded.data, rows, {"device": "cpu"}, encoded.escapes
        )

    def build(self, num_views: int = 2) -> Store:
        """Write and commit whatever is missing, shard by shard."""
        store = self.store()
        for view, shard in store.todo(num_views):
            store.commit([self.write(store, view, shard)])
        return store


def ids(count: int, prefix: str = "a") -> list[str]:
    """Sample ids."""
    return [f"{prefix}/{number:03d}" for number in range(count)]


def files_under(directory: Path) -> dict[str, bytes]:
    """Contents of every data file: all but the manifest, locks and temporary files."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "manifest" not in path.parts and ".tmp" not in path.parts
    }
