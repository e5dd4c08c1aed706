"""Build a small store in forked children that die at the n-th file operation, for every n.

Run as a script with an empty folder: prints one JSON line {"operations", "failures"}.
After every odd one garbage is collected before the build goes on; after all of them at the end.
A fresh process, so that no library has started threads before the forks.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute

from cache import orphans
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
    toy.store().mend_metadata()
    store = toy.build(num_views=1)
    found = verify(store)
    assert not found.problems, found.problems
    assert len(Reader(store)) == 7


def collect(root: Path) -> None:
    """What `eupe cache gc --older-than 0 --yes` does."""
    if not root.is_dir():
        return
    found = orphans.find(root, 0)
    assert not found.untold, found.untold
    assert all(orphans.remove(each, 0) for each in found.orphans)


def everything_under(root: Path) -> dict[str, bytes]:
    """Contents of every file, of the manifest too."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "LOCK"
    }


def in_child(
    work: Callable[[Path], None],
    root: Path,
    die_at: int | None = None,
    count_into: Path | None = None,
) -> int:
    """Work in a forked child; return its exit code."""
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
        work(root)
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
    assert in_child(build, folder / "clean", count_into=count) == 0
    clean, clean_manifest = files_under(folder / "clean"), everything_under(folder / "clean")
    total = int(count.read_text())
    failures = []
    for n in range(1, total + 1):
        root = folder / f"crash-{n}"
        died = in_child(build, root, n)
        codes = [died, in_child(collect, root) if n % 2 else 0, in_child(build, root)]
        if codes != [DIED, 0, 0] or files_under(root) != clean:
            failures.append([n, *codes])
        left = [str(p) for p in root.rglob(".tmp/*") if p.name != "LOCK"]
        if left:
            failures.append([n, *left])
        if in_child(collect, root) or everything_under(root) != clean_manifest:
            after = everything_under(root)
            names = {k for k in {*after, *clean_manifest} if after.get(k) != clean_manifest.get(k)}
            failures.append([n, "collected", *sorted(names)])
        shutil.rmtree(root)
    print(json.dumps({"operations": total, "failures": failures}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
