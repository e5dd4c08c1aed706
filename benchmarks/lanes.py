"""What lanes save and what they cost in randomness: bytes fetched over all nodes, classes a batch.

    python -m benchmarks.lanes [--nodes 32] [--batch 2048] [--lanes 1 64 256] [--json FILE]

Shards of ROWS_PER_SHARD pictures (256 MB of 512-pixel views, or of a ViT-L's features at 256) are
counted, not read. Of ImageNet-1k's size, sorted by class, an epoch is drawn and it is counted which
shards each node reads; of 100 M pictures the shards of each node's lanes are counted. Measures of a
batch: 2 to the entropy of its labels (how many classes it has, if all had equally many rows), and
how often two of its rows are of one shard, against rows drawn by chance (1). Beside them a full
shuffle.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks import tables
from cache.shard_ranges import ShardRanges
from pipelines.recipe.draws import TrainingDraw, lanes_of
from pipelines.recipe.mix import Mix

ROWS_PER_SHARD = 340
IMAGENET, CLASSES, MILLIONS = 1_281_167, 1000, 100_000_000
BATCHES = 40
COLUMNS = {
    "pictures": ",",
    "shards": ",",
    "lanes": "",
    "fetched": ".3f",
    "busiest_node": ".3f",
    "classes": ".0f",
    "pairs": ".1f",
}


def shards_of(num_rows: int) -> ShardRanges:
    """Return the shards of so many pictures, the last one partly filled."""
    starts = np.arange(0, num_rows, ROWS_PER_SHARD)
    stops = np.minimum(starts + ROWS_PER_SHARD, num_rows)
    return ShardRanges(np.arange(len(starts)), starts, stops)


def randomness(batches: Iterable[np.ndarray], num_rows: int) -> tables.Row:
    """Measure batches of rows, int64 [B] each, of a dataset sorted by class."""
    classes, pairs = [], []
    for rows in batches:
        share = np.bincount(rows * CLASSES // num_rows) / len(rows)
        share = share[share > 0]
        classes.append(2 ** -(share * np.log2(share)).sum())
        counts = np.bincount(rows // ROWS_PER_SHARD)
        pairs.append((counts * (counts - 1)).sum() / (len(rows) * (len(rows) - 1)))
    by_chance = ROWS_PER_SHARD / num_rows
    return {"classes": float(np.mean(classes)), "pairs": float(np.mean(pairs)) / by_chance}


def fetched(shards: ShardRanges, of_nodes: Sequence[np.ndarray]) -> tables.Row:
    """Count the rows of the shards that each node reads, bool [shards] a node, against the data."""
    rows = np.array([shards.lengths[reads].sum() for reads in of_nodes])
    data = shards.lengths.sum()
    return {
        "fetched": float(rows.sum() / data),
        "busiest_node": float(rows.max() * len(rows) / data),
    }


def drawn(num_rows: int, lanes: int, nodes: int, batch: int) -> tables.Row:
    """Draw an epoch as the nodes would and measure it."""
    shards = shards_of(num_rows)
    draw = TrainingDraw(Mix({"a": 1.0}, {}, batch, 0, lanes), {"a": shards}, {"a": 1}, 0)
    of_nodes = np.zeros((nodes, len(shards)), bool)
    kept = list[np.ndarray]()
    for step in range(num_rows // batch):
        rows = draw(step).rows
        for node, own in enumerate(np.split(rows, nodes)):
            of_nodes[node, own // ROWS_PER_SHARD] = True
        if len(kept) < BATCHES and step % 10 == 9:
            kept.append(rows)
    return fetched(shards, list(of_nodes)) | randomness(kept, num_rows)


def counted(num_rows: int, lanes: int, nodes: int) -> tables.Row:
    """Count the shards that the lanes of each node have a part of."""
    shards = shards_of(num_rows)
    of_nodes = np.zeros((nodes, len(shards)), bool)
    for number, lane in enumerate(lanes_of(shards, "a", lanes)):
        of_nodes[number * nodes // lanes, lane.places] = True
    return fetched(shards, list(of_nodes))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser: argparse.ArgumentParser = tables.parser("lanes", __doc__)
    parser.add_argument("--nodes", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--pictures", type=int, nargs=2, default=[IMAGENET, MILLIONS])
    arguments = parser.parse_args(argv)
    small, large = arguments.pictures
    found: list[tables.Row] = []
    for lanes in arguments.lanes:
        about: tables.Row = {"pictures": small, "shards": len(shards_of(small)), "lanes": lanes}
        found.append(about | drawn(small, lanes, arguments.nodes, arguments.batch))
    shuffled = np.random.default_rng(0).permutation(small)
    whole = shuffled[: BATCHES * arguments.batch].reshape(-1, arguments.batch)
    found.append({"pictures": small, "lanes": "full shuffle"} | randomness(whole, small))
    for lanes in arguments.lanes:
        if lanes >= arguments.nodes:
            about = {"pictures": large, "shards": len(shards_of(large)), "lanes": lanes}
            found.append(about | counted(large, lanes, arguments.nodes))
    title = f"{arguments.nodes} nodes, batches of {arguments.batch}: bytes fetched / the data"
    tables.show(found, COLUMNS, title, tables.console(), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
