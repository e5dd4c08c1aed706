"""Small files laid into folders that all machines share, by which others are known to see them."""

import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cache.errors import StoreError
from cache.files import atomic, place
from cache.files.bucket_path import BucketPath
from cache.format import layout


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
                atomic.write(root / name, [content], layout.scratch_directory(root))
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


def unseen(probes: Mapping[str, bytes]) -> tuple[str, ...]:
    """Return those of some probes that are not there for this process, or hold something else."""
    return tuple(file for file, content in probes.items() if _read(file) != content)


def _read(file: str) -> bytes | None:
    try:
        return place.root(file).read_bytes()
    except (OSError, StoreError):
        return None


def _absent(root: Path) -> list[Path]:
    """Return the folders that a file in `root` would make."""
    if isinstance(root, BucketPath):
        return []
    wanted = (layout.scratch_directory(root), root, *root.parents)
    return [folder for folder in wanted if not os.path.exists(folder)]
