"""How fast files of a folder, or a bucket, are read: some are written, and read again."""

import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.files import atomic, place
from cache.files.bucket_path import BucketPath
from cache.format import layout

STREAMS = 8
STREAM_BYTES = 32 << 20


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
            atomic.write(file, [secrets.token_bytes(stream_bytes)], layout.scratch_directory(root))
            _forget(file)
        with ThreadPoolExecutor(STREAMS) as pool:
            started = time.perf_counter()
            num_bytes = sum(pool.map(lambda file: len(file.read_bytes()), files))
            return num_bytes / (time.perf_counter() - started)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def _forget(file: Path) -> None:
    """Have the next reading of a file come from its disk, and not from memory."""
    if isinstance(file, BucketPath):
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
