"""How fast cached rows come back, against numpy.memmap: same bytes, same batches, one process.

    python -m benchmarks.read [--gigabytes 1.2] [--peers NAME ...] [--json FILE]

Every peer keeps the same rows [256, 768] float16 (ViT-B at 256 pixels) and gathers the same batches
of 64 into one buffer that the caller owns. Peers and numpy.memmap take turns batch by batch; the
ratio is the median over the pairs, with a bootstrap interval (benchmarks/pairs.py).

warm: every peer has read every row once, so files are in the page cache and, where files are
mapped, pages are in the process's tables. first: files are in the page cache, but before every
batch the peer is opened anew, untimed, so that it maps files and checks what it checks once. cold:
as that, and its files are dropped from the page cache. random: rows of a permutation of all.
sequential: 64 neighbours.
"""

import argparse
import gc
import mmap
import os
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks import tables
from benchmarks.pairs import Timed, interleave
from benchmarks.read_peers import DIM, GRID, PEERS, Memmap, Peer

BATCH = 64
NUM_PAIRS = 60
SHAPE = (GRID[0] * GRID[1], DIM)
ROW_BYTES = SHAPE[0] * SHAPE[1] * 2
COLUMNS = {
    "name": "",
    "version": "",
    "mode": "",
    "access": "",
    "gb_per_s": ".2f",
    "ratio_to_memmap": ".3f",
    "ratio_low": ".3f",
    "ratio_high": ".3f",
}


@cache
def noise() -> np.ndarray:
    """BATCH rows of float16 noise."""
    rng = np.random.default_rng(0)
    rows: np.ndarray = rng.standard_normal((BATCH, *SHAPE), np.float32).astype(np.float16)
    return rows


def make_rows(numbers: np.ndarray) -> np.ndarray:
    """Rows [n, N, D] of those numbers: noise, with the number itself in the first two values."""
    rows: np.ndarray = noise()[numbers % BATCH]
    rows[:, 0, 0], rows[:, 0, 1] = numbers // 1024, numbers % 1024
    return rows


def batch_memory() -> np.ndarray:
    """Memory for a batch, float16 [BATCH, N, D], that begins where a page does.

    What malloc gives begins 16 bytes later. There the copy out of a map whose rows begin with
    pages, as numpy.memmap's do, is three times as slow (docs/log.md, 2026-11-26): memmap would be
    handicapped.
    """
    memory = np.zeros(BATCH * ROW_BYTES + mmap.PAGESIZE, np.uint8)
    first = -memory.ctypes.data % mmap.PAGESIZE
    return memory[first : first + BATCH * ROW_BYTES].view(np.float16).reshape(BATCH, *SHAPE)


def batches(access: str, num_rows: int) -> list[np.ndarray]:
    """The batches of row numbers that every peer gathers, int64 [BATCH] each."""
    rng = np.random.default_rng(1)
    whole = num_rows // BATCH * BATCH
    if access == "sequential":
        starts = rng.integers(0, num_rows - BATCH, NUM_PAIRS)
        return [np.arange(start, start + BATCH) for start in starts]
    rounds = [rng.permutation(num_rows)[:whole] for _ in range(-(-NUM_PAIRS * BATCH // whole))]
    return list(np.concatenate(rounds).reshape(-1, BATCH)[:NUM_PAIRS])


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the files below a folder (they must be clean, i.e. synced)."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


class Opened:
    """A peer on its files, warm, at first touch or cold."""

    def __init__(self, cls: type[Peer], home: Path, mode: str):
        self.cls, self.home, self.mode = cls, home, mode
        self.peer: Peer | None = None

    def prepare(self) -> None:
        """Open the peer if it is not open; unless warm close it, if cold forget its files first."""
        if self.mode != "warm":
            self.peer = None  # unmaps: the kernel forgets no page that a process has mapped
            gc.collect()
        if self.mode == "cold":
            drop_cache(self.home)
        if self.peer is None:
            self.peer = self.cls()
            self.peer.open(self.home)

    def gather(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Gather through the open peer."""
        assert self.peer is not None
        self.peer.gather(rows, out)


def check_and_warm(opened: Opened, num_rows: int) -> None:
    """Read every row once through a peer, and refuse to time one that gives other bytes."""
    opened.prepare()
    out = batch_memory()
    whole = [np.arange(start, min(start + BATCH, num_rows)) for start in range(0, num_rows, BATCH)]
    for rows in (batches("random", num_rows)[0], *whole):
        opened.gather(rows, out[: len(rows)])
        if not np.array_equal(out[: len(rows)], make_rows(rows)):
            raise RuntimeError(f"{opened.cls.name} gives other bytes than were written")


def measure(
    subject: Opened, reference: Opened, num_rows: int, access: str, seconds: float
) -> dict[str, object]:
    """Time one peer against memmap; return the row of the table."""
    work = batches(access, num_rows)
    out = batch_memory()
    check_and_warm(reference, num_rows)
    check_and_warm(subject, num_rows)
    pairs = interleave(
        Timed(lambda number: reference.gather(work[number], out), reference.prepare),
        Timed(lambda number: subject.gather(work[number], out), subject.prepare),
        NUM_PAIRS,
        seconds,
    )
    ratio = pairs.speed_ratio()
    return {
        "name": subject.cls.name,
        "mode": subject.mode,
        "access": access,
        "gb_per_s": BATCH * ROW_BYTES / float(np.median(pairs.subject)) / 1e9,
        "ratio_to_memmap": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
        "pairs": len(pairs.subject),
        "version": subject.cls.version,
    }


def run(arguments: argparse.Namespace, folder: Path, console: Console) -> list[tables.Row]:
    """Write what is missing, then measure every peer in every mode."""
    num_rows = max(2 * BATCH, int(arguments.gigabytes * 1e9 / ROW_BYTES))
    asked = [cls for cls in PEERS if not arguments.peers or cls.name in arguments.peers]
    chosen = [cls for cls in asked if cls.version is not None]
    if missing := [cls.name for cls in asked if cls.version is None]:
        console.print(f"not installed, so not measured: {', '.join(missing)} (`make bench` does)")
    peers: list[tuple[type[Peer], Path]] = []
    rows: np.ndarray | None = None
    with Progress(console=console, transient=True) as progress:
        floor: type[Peer] = Memmap
        all_of_them = list(dict.fromkeys([floor, *chosen]))
        task = progress.add_task("writing", total=len(all_of_them))
        for cls in all_of_them:
            # A subclass that only reads shares the files its base class wrote.
            owner = next(c.__name__ for c in cls.__mro__ if "write" in c.__dict__)
            home = folder / f"{owner}-{num_rows}"
            if not (home / "done").exists():
                progress.update(task, description=f"writing for {cls.name}")
                home.mkdir(parents=True, exist_ok=True)
                rows = make_rows(np.arange(num_rows)) if rows is None else rows
                cls().write(rows, home)
                os.sync()
                (home / "done").touch()
            peers.append((cls, home))
            progress.advance(task)
        rows = None
        cases = [(mode, access) for mode in arguments.modes for access in arguments.access]
        task = progress.add_task("measuring", total=len(peers) * len(cases))
        table = []
        for mode, access in cases:
            reference = Opened(*peers[0], mode)
            for cls, home in peers:
                progress.update(task, description=f"{mode} {access}: {cls.name}")
                # memmap against itself must share its map, or neither would ever be cold.
                subject = reference if cls is floor else Opened(cls, home, mode)
                table.append(measure(subject, reference, num_rows, access, arguments.seconds))
                progress.advance(task)
    return table


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("read", __doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="size of the rows")
    parser.add_argument("--peers", nargs="+", choices=[cls.name for cls in PEERS], default=[])
    modes = ["warm", "first", "cold"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes)
    parser.add_argument(
        "--access", nargs="+", choices=["random", "sequential"], default=["random", "sequential"]
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="budget of each line")
    parser.add_argument("--folder", type=Path, help="keep the data here (default: a fresh folder)")
    arguments = parser.parse_args(argv)
    console = tables.console()
    if arguments.folder is not None:
        table = run(arguments, arguments.folder, console)
    else:
        with tempfile.TemporaryDirectory(prefix="eupe-read-") as folder:
            table = run(arguments, Path(folder), console)
    title = f"{BATCH} rows of {ROW_BYTES / 1e3:.0f} kB a batch, {platform.platform()}"
    tables.show(table, COLUMNS, title, console, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
