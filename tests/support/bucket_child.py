"""What a builder of a bucket does, as a process that tests kill.

`bucket_child.py build ROOT` builds the toy store; `bucket_child.py send FILE URI` sends one file.
"""

import sys
from pathlib import Path

from cache.files import bucket, place
from cache.files.bucket_path import BucketPath
from support.toy_stores import Toy, ids

BAD = {"a/001": "no image"}


def build(root: Path) -> None:
    """Samples, grown once; a store of two views."""
    toy = Toy(root, bad=BAD)
    toy.add_samples(ids(5))
    toy.add_samples(ids(5) + ids(2, "b"))
    toy.build(num_views=2)


if __name__ == "__main__":
    sys.stdin.readline()  # the test knows this process by then
    if sys.argv[1] == "build":
        build(place.root(sys.argv[2]))
    else:
        bucket.send(Path(sys.argv[2]), BucketPath(sys.argv[3]))
