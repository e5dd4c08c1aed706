"""Faults of disks and files: full, damaged, exchanged; locks that the dead have left."""

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from benchmarks import fault_subject
from benchmarks.fault_children import Child, in_child
from benchmarks.fault_kinds import PATCHES, Round, Struck, died, kind
from cache.files import bucket
from cache.files.bucket_path import BucketPath
from cache.format import layout

PAGE = 4096
DISK_BYTES = 6 << 20


# ------------------------------------------------------------------------------ disks


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a disk of DISK_BYTES."""
    folder.mkdir(parents=True)
    size = f"size={DISK_BYTES}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "faults", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def filled(folder: Path, left: int) -> Iterator[None]:
    """Fill the disk of a folder, but for so many pages."""
    disk, filler = os.statvfs(folder), folder / "filler"
    filler.write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - left * PAGE)))
    try:
        yield
    finally:
        filler.unlink()


def limited(work: Callable[..., object], num_bytes: int, *arguments: object) -> object:
    """Work in a process whose files may not become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))
    return work(*arguments)


def _fill(round: Round, what: Literal["build", "train"]) -> Struck:
    """Work on a disk with a few pages left; who may not mount one gets a limit to files' sizes."""
    work = fault_subject.build if what == "build" else fault_subject.train
    arguments = (round.reference.images, round.root)
    made = round.reference.root / {"build": "cache", "train": "stages"}[what]
    sizes = [path.stat().st_size for path in made.rglob("*") if path.is_file()]
    if os.geteuid():
        if what == "train":
            round.copy("cache")
        ended = in_child(limited, work, round.random.randint(1, max(sizes) - 1), *arguments)
    else:
        round.stack.enter_context(small_disk(round.root))
        if what == "train":
            round.copy("cache")
        left = round.random.randint(0, sum(-(-size // PAGE) for size in sizes) * 3 // 4)
        with filled(round.root, left):
            ended = in_child(work, *arguments)
    sound = ended.how == "done" or (ended.how == "refused" and str(round.root) in ended.words)
    return Struck(broken="" if sound else f"{ended.how}: {ended.words}")


@kind("disk full, build")
def _disk_full_build(round: Round) -> Struck:
    return _fill(round, "build")


@kind("disk full, training", then="train")
def _disk_full_training(round: Round) -> Struck:
    return _fill(round, "train")


# ------------------------------------------------------------------------------ damaged files

CACHE_FILES = {
    "patches": PATCHES,
    "rows": "cache/*/*/*/*/view-*/rows-*",
    "zarr.json": "cache/*/*/*/*/view-*/zarr.json",
    "spec": "cache/*/*/*/*/spec.json",
    "moments": "cache/*/*/*/*/moments.arrow",
    "manifest segment": "cache/*/*/*/*/manifest/*.arrow",
    "manifest HEAD": "cache/*/*/*/*/manifest/HEAD",
    "numbered manifest HEAD": "cache/*/*/*/*/manifest/HEAD-*",
    "sample segment": "cache/*/samples/*.arrow",
    "sample HEAD": "cache/*/samples/HEAD",
    "numbered sample HEAD": "cache/*/samples/HEAD-*",
}
RUN_FILES = {
    "checkpoint": "stages/*/checkpoints/step-00000006/*",
    "what made a stage": "stages/*/made_of.json",
}
"""Kind of file -> where such files lie below a root."""


Damage = Callable[[Round, Path, str], tuple[Path, ...]]
"""(round, a file, the pattern of its kind) -> the files that it damaged."""


def put(path: Path, content: bytes | bytearray) -> None:
    """Have a file or an object hold something else; a file stays the one it was."""
    if not isinstance(path, BucketPath):
        path.write_bytes(content)
        return
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        bucket.send(Path(file.name), path)


def _flipped(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    content = bytearray(path.read_bytes())
    bit = round.random.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    put(path, content)
    return (path,)


def _truncated(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    content = path.read_bytes()
    put(path, content[: round.random.randrange(len(content))])
    return (path,)


def _deleted(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    path.unlink()
    return (path,)


def _exchanged(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    """Exchange a file for another of its kind, or the twin's: of its size if there is one.

    The only one of its kind gets what another file of its folder holds.
    """
    content = path.read_bytes()
    own, twins = (sorted(root.glob(pattern)) for root in (round.root, round.reference.twin))
    below = own + [twin for twin in twins if twin.name == path.name]
    others = [other for other in below if other.read_bytes() != content]
    if not others:
        put(path, round.random.choice(_neighbours(path)).read_bytes())
        return (path,)
    like = [other for other in others if other.stat().st_size == len(content)]
    other = round.random.choice(like or others)
    put(path, other.read_bytes())
    if other not in own:
        return (path,)
    put(other, content)
    return path, other


def _neighbours(path: Path) -> list[Path]:
    return [other for other in sorted(path.parent.rglob("*")) if other.is_file() and other != path]


DAMAGES = {
    "flipped": _flipped,
    "truncated": _truncated,
    "deleted": _deleted,
    "exchanged": _exchanged,
}


def _rolled_back(round: Round, path: Path, pattern: str) -> tuple[Path, ...]:
    """Put a HEAD back as it was when half of the work was done."""
    earlier = round.reference.half / path.relative_to(round.root)
    if not earlier.is_file():  # the last store of all, say, had none yet
        path.unlink()
        return (path,)
    shutil.copyfile(earlier, path)
    return (path,)


def _damage(
    name: str,
    pattern: str,
    how: str,
    damage: Damage,
    then: Literal["build", "train"],
) -> None:
    @kind(f"{name} {how}", then=then)
    def strike(round: Round) -> Struck:
        round.copy("cache")
        if then == "train":  # at its last checkpoint but one
            round.copy("run", "stages")
            (last,) = round.root.glob("stages/*/checkpoints/step-00000008")
            shutil.rmtree(last)
        path = round.random.choice(sorted(round.root.glob(pattern)))
        return Struck(damage(round, path, pattern))


for _how, _change in DAMAGES.items():
    for _name, _pattern in CACHE_FILES.items():
        _damage(_name, _pattern, _how, _change, "build")
    for _name, _pattern in RUN_FILES.items():
        _damage(_name, _pattern, _how, _change, "train")
for _name in ("manifest HEAD", "sample HEAD"):
    _damage(_name, CACHE_FILES[_name], "rolled back", _rolled_back, "build")


# ------------------------------------------------------------------------------ locks


@kind("stale locks")
def _stale_locks(round: Round) -> Struck:
    """Leave the locks and temporary files of processes that are gone, some in mid-build."""
    at = round.random.randint(1, round.reference.build_operations)
    struck = died(round.child("build", at, "killed"))
    gone = Child(os.getpid)
    pid = gone.process.pid
    gone.end()
    for scratch in sorted((round.root / "cache").rglob(layout.SCRATCH)):
        (scratch / "LOCK").write_text(f"{pid}\n")
        (scratch / f"elsewhere~{pid}~{round.random.getrandbits(64):016x}~HEAD").write_bytes(b"{")
    return struck
