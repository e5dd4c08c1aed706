"""Work on a small file system of its own that gets full, make room on it, and go on.

Run as `unshare --map-root-user --mount python full_disk_child.py store|training FOLDER`. Prints
one JSON line: {"refused": sentences, "different": where the end is not that of undisturbed work}.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from cache.errors import StoreError

PATIENCE_SECONDS = 300

PAGE = 4096
DISK_BYTES = {"store": 4 << 20, "training": 64 << 20}


def free_pages(folder: Path) -> int:
    """Count the pages that a file system has left."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize // PAGE


def fill(folder: Path, left: int) -> Callable[[], None]:
    """Fill a file system up to so many pages; return what makes room again."""
    filler = folder / "filler"
    filler.write_bytes(bytes(PAGE * (free_pages(folder) - left)))
    assert free_pages(folder) == left
    return filler.unlink


def store(disk: Path) -> dict[str, list]:
    """Build with no page left, with one, with two, until that is enough."""
    from cache.verify import verify
    from support.toy_stores import Toy, files_under, ids

    def build(root: Path) -> dict[str, bytes]:
        toy = Toy(root, bad={"a/001": "no image"})
        toy.add_samples(ids(5))
        toy.add_samples(ids(5) + ids(2, "b"))
        built = toy.build(num_views=2)
        assert not verify(built).problems
        return files_under(root)

    clean = build(disk / "clean")
    refused, different = [], []
    for left in range(free_pages(disk)):
        root = disk / f"full-{left}"
        root.mkdir()
        make_room = fill(disk, left)
        try:
            build(root)
            break
        except StoreError as error:
            refused.append(str(error))
        finally:
            make_room()
        swept = not any(path.name != "LOCK" for path in root.rglob(".tmp/*"))
        if build(root) != clean or not swept:
            different.append(left)
        shutil.rmtree(root)
    return {"refused": refused, "different": different}


def training(disk: Path) -> dict[str, list]:
    """Train; the disk gets full after the first checkpoint, before the second is whole."""
    from pipelines.records import checkpoint
    from pipelines.training.batches import Batch
    from pipelines.training.inputs import Inputs
    from pipelines.training.loop import train_stage
    from support import small_stage

    run = small_stage.recipe(disk, steps=9, log_every=1, checkpoint_every=3)
    made = small_stage.inputs(run)

    def train(directory: Path, left: int | None = None) -> str:
        def disturbed(steps: range) -> Iterator[Batch]:
            for batch in made.batches(steps):
                if left is not None and batch.step == 5:
                    fill(disk, left)
                yield batch

        inputs = Inputs(disturbed, made.dims, made.normalisers, made.identity, made.pins)
        train_stage(run, run.stage("stage2"), inputs, directory)
        return checkpoint.finished(directory, 9).weights_digest()

    clean = train(disk / "clean")
    refused, different = [], []
    size = sum(path.stat().st_size for path in (disk / "clean/checkpoints").glob("*-00000009/*"))
    for left in (1, size // PAGE // 2, size // PAGE - 2):
        directory = disk / f"full-{left}"
        try:
            train(directory, left)
        except StoreError as error:
            refused.append(str(error))
        (disk / "filler").unlink()
        kept = [found.step for found in checkpoint.find(directory)]
        names = {path.name for path in (directory / checkpoint.FOLDER).iterdir()}
        if kept != [3] or len(names) != 1 or train(directory) != clean:
            different.append(left)
        shutil.rmtree(directory)
    return {"refused": refused, "different": different}


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    size = f"size={DISK_BYTES[what]}"
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", size, "none", where], check=True, timeout=PATIENCE_SECONDS
    )
    print(json.dumps({"store": store, "training": training}[what](where)))
