"""Class folders that may be none: a folder given in the place of the one inside it."""

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.images.aside import Aside
from pipelines.recipe.config import SourceConfig

SPLITS = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
MOST = 1000
"""Folders that are kept in mind: with more of them nothing is in doubt."""


class Classes:
    """The two upper levels of folders that a source's images lie in."""

    def __init__(self) -> None:
        self._tops: set[str] = set()
        self._below: set[str] = set()

    def add(self, sample_ids: pa.ChunkedArray) -> None:
        """Look at the folders in some sample ids."""
        folders = pc.unique(pc.replace_substring_regex(sample_ids, r"(^|/)[^/]*$", ""))
        for folder in folders.to_pylist():
            top, _, below = folder.partition("/")
            if len(self._tops) < MOST:
                self._tops.add(top)
            if below and len(self._below) < MOST:
                self._below.add(f"{top}/{below.partition('/')[0]}")

    def doubt(self, config: SourceConfig, aside: Aside) -> None:
        """Say if the class of all images is one, or that of a split, and folders lie below it."""
        by_folder = config.kind == "folder" or (
            config.kind == "webdataset" and config.classes == "folder" and config.key != "shard"
        )
        if not by_folder or "label" in config.where:
            return
        tops = sorted(self._tops)
        if len(self._below) < 2 or not (len(tops) == 1 or SPLITS.issuperset(tops)):
            return
        num = f"at least {MOST}" if len(self._below) == MOST else str(len(self._below))
        instead = "written without that folder, the tars would have those below it"
        if config.kind == "folder":
            instead = f"source.path={config.path.rstrip('/')}/{tops[0]} would have those below it"
        aside.say(
            f"every image has the label {' or '.join(map(repr, tops))}, its top folder; {instead} "
            f"as classes ({num}, such as {min(self._below)})"
        )
