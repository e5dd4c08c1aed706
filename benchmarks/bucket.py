"""What committing to a store in a bucket asks for: shards that many actors bring, in one manifest.

    PYTHONPATH=tests python -m benchmarks.bucket [--shards 10000] [--actors 256] [--delay-ms 30]

A bucket on loopback (the tests') that counts requests and holds each back for so long. The records
are made up, their files do not exist: it is the committer's work alone. Each actor has two calls in
flight, so at most twice as many records arrive together.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
from support import bucket_server

from benchmarks import tables
from benchmarks.scale import begun
from cache.files import place
from cache.format.record_table import ShardRecord
from cache.store import Store
from pipelines.machines.pool import IN_FLIGHT

ROWS_PER_SHARD = 4
COLUMNS = {
    "shards": ",",
    "together": ",",
    "commits": ",",
    "requests": ",",
    "get": ",",
    "put": ",",
    "head": ",",
    "seconds": ".1f",
}


def record(shard: int) -> ShardRecord:
    """Return the record of a shard in view 0."""
    return ShardRecord(
        view=0,
        shard=shard,
        start=shard * ROWS_PER_SHARD,
        stop=(shard + 1) * ROWS_PER_SHARD,
        num_valid=ROWS_PER_SHARD,
        num_escapes=0,
        samples_digest="0" * 64,
        patches_bytes=1,
        patches_sha256="0" * 64,
        rows_bytes=1,
        rows_sha256="0" * 64,
        provenance='{"compute_batch":32,"device":"cpu","torch":"2.14.1"}',
    )


def measure(store: Store, bucket: bucket_server.Bucket, together: int, delay: float) -> tables.Row:
    """Commit all shards in random order, so many at once, and count."""
    order = np.random.default_rng(0).permutation(len(store.samples.shards())).tolist()
    bucket.behave(delay_seconds=delay)
    started = time.perf_counter()
    for first in range(0, len(order), together):
        store.commit([record(shard) for shard in order[first : first + together]])
    seconds = time.perf_counter() - started
    methods = Counter(request.method for request in bucket.requests)
    bucket.behave()
    if store.manifest().total().num_shards != len(order):
        raise RuntimeError("a shard was lost")
    return {
        "shards": len(order),
        "together": together,
        "commits": store.manifest().version,
        "requests": sum(methods.values()),
        **{method.lower(): methods[method] for method in ("GET", "PUT", "HEAD")},
        "seconds": seconds,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser: argparse.ArgumentParser = tables.parser("bucket", __doc__)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--actors", type=int, default=256)
    parser.add_argument("--delay-ms", type=float, default=30.0)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="eupe-bucket-") as mirror, bucket_server.serve() as s3:
        os.environ |= {
            "AWS_ENDPOINT_URL": s3.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "EUPE_MIRROR": mirror,
        }
        root = place.root(f"s3://{bucket_server.NAME}/commits-{arguments.shards}")
        store = begun(root, arguments.shards * ROWS_PER_SHARD, ROWS_PER_SHARD)
        together = IN_FLIGHT * arguments.actors
        found = [measure(store, s3, together, arguments.delay_ms / 1000)]
    title = f"committing to a bucket of {arguments.delay_ms:g} ms a request"
    tables.show(found, COLUMNS, title, tables.console(), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
