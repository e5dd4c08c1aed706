"""Build a small store in forked children that die at the n-th file operation, for every n.

Run as a script with an empty folder: prints one JSON line {"operations", "failures", "swept"}.
A fresh process, so that no library has started threads before the forks.
"""

import json
import os
import shutil
import sys
import traceback
from pathlib import Path

import pyarrow as pa
import pyarrow.compute

from cache.reader import Reader
from cache.verify import verify
from support.toy_stores import Toy, files_under, ids

OPERATIONS = ("open", "write", "fsync", "link", "replace", "mkdir", "unlink")
DIED = 9


def build(root: Path) -> None:
    """What a user's command does: samples, grown once, a store of two views."""
    toy = Toy(root, bad={"a/001": "no image"})
    toy.add_samples(ids(5))
    toy.add_samples(ids(5) + ids(2, "b"))
    store = toy.build(num_views=1)
    found = verify(store)
    assert not found.problems, found.problems
    assert len(Reader(store)) == 7


def in_child(root: Path, die_at: int | None, count_into: Path | None = None) -> int:
    """Build in a forked child; return its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        done = 0

        def dying(name, real):
            def operation(*args, **kwargs):
                nonlocal done
                done += 1
                if done == die_at:
                    if name == "write":  # half of it reaches the file
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os._exit(DIED)
                return real(*args, **kwargs)

            return operation

        for name in OPERATIONS:
            setattr(os, name, dying(name, getattr(os, name)))
        build(root)
        if count_into is not None:
            count_into.write_text(str(done))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path) -> None:
    """Compare every interrupted and resumed build with the undisturbed one."""
    pa.array([0])  # loads what pyarrow loads on first use, once instead of in every child
    count = folder / "count"
    assert in_child(folder / "clean", None, count) == 0
    clean = files_under(folder / "clean")
    total = int(count.read_text())
    failures = []
    for n in range(1, total + 1):
        root = folder / f"crash-{n}"
        died = in_child(root, n)
        resumed = in_child(root, None)
        if (died, resumed) != (DIED, 0) or files_under(root) != clean:
            failures.append([n, died, resumed])
        left = [str(p) for p in root.rglob(".tmp/*") if p.name != "LOCK"]
        if left:
            failures.append([n, *left])
        shutil.rmtree(root)
    print(json.dumps({"operations": total, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
