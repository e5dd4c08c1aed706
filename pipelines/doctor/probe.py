"""Small files laid into the folders that all machines share, and how fast such files are read."""

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cache.errors import StoreError
from cache.files import atomic, place
from cache.files.bucket import BucketPath
from cache.format import layout

STREAMS = 8
STREAM_BYTES = 32 << 20


class Laid(NamedTuple):
    """Probes that are there, file -> contents, and why a folder takes none, folder -> sentence."""

    probes: Mapping[str, bytes]
    refused: Mapping[str, str]


@contextmanager
def laid(folders: Sequence[str]) -> Iterator[Laid]:
    """Have a file of random contents in each folder, or bucket, for as long as the block lasts.

    Folders that had to be made for it go again.
    """
    probes, refused = dict[str, bytes](), dict[str, str]()
    made = list[Path]()
    try:
        for folder in dict.fromkeys(folders):
            root = place.root(folder)
            made += _absent(root)
            content, name = secrets.token_bytes(16), f".probe-{secrets.token_hex(8)}"
            try:
                atomic.write(root / name, [content], _scratch(root))
                probes[str(root / name)] = content
            except (StoreError, OSError) as error:
                refused[folder] = str(error)
        yield Laid(probes, refused)
    finally:
        for file in probes:
            place.root(file).unlink(missing_ok=True)
        for empty in sorted(made, key=lambda folder: -len(folder.parts)):
            with suppress(OSError):  # never made, or somebody uses it meanwhile
                empty.rmdir()


def reading(folder: str, stream_bytes: int = STREAM_BYTES) -> float:
    """Write some files and read them again, all at once: bytes a second of the reading.

    Args:
        folder: where, or which bucket.
        stream_bytes: of each file.

    Raises:
        StoreError: they cannot be written.
    """
    root = place.root(folder)
    files = [root / f".probe-{secrets.token_hex(8)}" for _ in range(STREAMS)]
    try:
        for file in files:
            atomic.write(file, [secrets.token_bytes(stream_bytes)], _scratch(root))
            _forget(file)
        with ThreadPoolExecutor(STREAMS) as pool:
            started = time.perf_counter()
            num_bytes = sum(pool.map(lambda file: len(file.read_bytes()), files))
            return num_bytes / (time.perf_counter() - started)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _scratch(root: Path) -> Path:
    return layout.scratch_directory(root)


def _absent(root: Path) -> list[Path]:
    """Return the folders that a file in `root` would make."""
    if isinstance(root, BucketPath):
        return []
    wanted = (_scratch(root), root, *root.parents)
    return [folder for folder in wanted if not os.path.exists(folder)]


def _forget(file: Path) -> None:
    """Have the next reading of a file come from its disk, and not from memory."""
    if isinstance(file, BucketPath):
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
