"""How a node fills its mirror from a bucket: bytes fetched twice, and how full its link is.

    PYTHONPATH=tests python -m benchmarks.fetch [--ranks 1 8] [--scale 64] [--json FILE]

A bucket on loopback (the tests') that lets each request wait for 30 ms, over a link of 10 Gbit/s of
which one stream takes 85 MB/s. So much is no small machine's: link, streams, objects (256 MB) and
ranges are all divided by `--scale`, time is not. Each rank is a process that wants shards of its
own and, one after the other, a few that all ranks want; it hints them in the order of its need and
then opens one after the other.
"""

import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path

from support import link_server
from support.link_server import Link

from benchmarks import tables
from cache.files import bucket
from cache.files.bucket_path import BucketPath
from cache.files.mirror import Mirror, Wanted

LINK, STREAM, OBJECT = 1.25e9, 85e6, 256 << 20  # bytes a second of 10 Gbit/s; of S3; of a shard
DELAY_SECONDS = 0.03
SHARED = 2
COLUMNS = {
    "ranks": "",
    "objects": "",
    "megabytes": ".0f",
    "requests": ",",
    "fetched": ".3f",
    "streams": "",
    "seconds": ".1f",
    "share_of_link": ".2f",
}


def rank(folder: Path, files: Sequence[Wanted], part_bytes: int, start: Barrier) -> None:
    """Bring files as a rank does."""
    bucket.READ_BYTES = part_bytes
    mirror = Mirror(folder, 1 << 34)
    start.wait()
    mirror.will_need(files)
    for file in files:
        mirror.local(file)


def measure(ranks: int, num_objects: int, scale: int) -> tables.Row:
    """Have ranks share out objects and bring them into one mirror."""
    objects = {f"{n}": bytes([n % 256]) * (OBJECT // scale) for n in range(num_objects)}
    files = [
        Wanted(BucketPath(f"s3://far/{n}"), len(data), hashlib.sha256(data).hexdigest())
        for n, data in objects.items()
    ]
    link = Link(LINK / scale, STREAM / scale, DELAY_SECONDS)
    named = {f"far/{name}": data for name, data in objects.items()}
    context = multiprocessing.get_context("spawn")
    start, part_bytes = context.Barrier(ranks), bucket.READ_BYTES // scale
    all_want, own = files[:SHARED], files[SHARED:]
    with (
        tempfile.TemporaryDirectory(prefix="eupe-fetch-") as folder,
        link_server.serve(named, link) as far,
    ):
        os.environ |= {"AWS_ENDPOINT_URL": far.endpoint, "AWS_REGION": "us-east-1"}
        os.environ["AWS_SKIP_SIGNATURE"] = "true"
        node = []
        for number in range(ranks):
            asked = [*own[number::ranks], *all_want]
            node.append(context.Process(target=rank, args=(Path(folder), asked, part_bytes, start)))
        for process in node:
            process.start()
        for process in node:
            process.join()
        if any(process.exitcode for process in node):
            raise RuntimeError("a rank failed")
        sent, data = sum(far.sent.values()), sum(map(len, objects.values()))
    return {
        "ranks": ranks,
        "objects": num_objects,
        "megabytes": data / 1e6,
        "requests": far.num_requests,
        "fetched": sent / data,
        "streams": far.most_streams,
        "seconds": far.ended - far.began,
        "share_of_link": far.share_of_link,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser: argparse.ArgumentParser = tables.parser("fetch", __doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--objects", type=int, default=34)
    parser.add_argument("--scale", type=int, default=64)
    arguments = parser.parse_args(argv)
    found = [measure(ranks, arguments.objects, arguments.scale) for ranks in arguments.ranks]
    title = f"10 Gbit/s, 30 ms, all sizes divided by {arguments.scale}: bytes fetched / the data"
    tables.show(found, COLUMNS, title, tables.console(), arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
