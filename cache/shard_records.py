"""Which shards of a store a reader has: those of one version of its manifest, or as it grows on."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cache.format import arrow_tables
from cache.format.record_table import ShardRecord
from cache.selection import ShardKey, Views, located
from cache.shard_ranges import Rows
from cache.store import Store

LOOK_SECONDS = 1.0
"""Whoever asks whether rows are there causes no more than one request to a store in this time."""
SEEN_SHARDS = 32_768
"""Shards of which it is remembered that they are there."""


class ShardRecords:
    """Records of a store's shards as of one version of its manifest.

    Attributes:
        version: that version.
        growing: True if a shard that does not exist at that version is found as it was first
            committed since: what is found follows from the version, whenever it is asked for.
    """

    def __init__(self, store: Store, version: int | None = None, growing: bool = False) -> None:
        """Read the manifest; a version of None is the newest.

        Raises:
            ValueError: that version does not exist.
        """
        self._store, self.growing = store, growing
        self._manifest, self._looked = store.manifest(), time.monotonic()
        self.version = self._manifest.checked(version)
        self._seen: set[ShardKey] = set()

    def find(self, view: int, shard: int) -> ShardRecord | None:
        """Return the record of a shard; None if it is not there, or not yet."""
        if not self.growing:
            return self._manifest.find(view, shard, self.version)
        found = self._manifest.find_since(view, shard, self.version)
        if found is None:
            self._look_again()
            found = self._manifest.find_since(view, shard, self.version)
        return found

    def absent(self, rows: Sequence[int] | Rows, views: Views = 0) -> npt.NDArray[np.bool_]:
        """Say which rows are not there, or not yet, bool [n].

        Args:
            rows: int64 [n].
            views: view number of each row, [n], or one for all.
        """
        keys, missing = self._missing(rows, views)
        return np.array([key in missing for key in keys], bool)

    def num_absent(self, rows: Sequence[int] | Rows, views: Views = 0) -> int:
        """Count the shards of rows that are not there, or not yet; arguments as of `absent`."""
        return len(self._missing(rows, views)[1])

    def of_view(self, view: int) -> Iterator[Rows]:
        """Yield a view's shards at the version, but those of samples that were added since."""
        samples = self._store.samples
        for table in self._manifest.tables(self.version, range(view, view + 1)):
            shards = arrow_tables.to_numpy(table["shard"])
            yield shards[samples.shard_stops(shards) >= 0]

    def shared(self, views: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Say of each shard of the data set whether it is there in every view at the version."""
        samples = self._store.samples
        shared = np.ones(-(-samples.num_rows // samples.rows_per_shard), bool)
        for view in views:
            there = np.zeros_like(shared)
            for shards in self.of_view(view):
                there[shards] = True
            shared &= there
        return shared

    def _missing(
        self, rows: Sequence[int] | Rows, views: Views
    ) -> tuple[list[ShardKey], set[ShardKey]]:
        """Return the shard of each row, and those of them that are not there."""
        keys, _ = located(rows, views, self._store.samples.rows_per_shard)
        missing = self._not_found({*keys})
        if missing and self.growing and time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look_again()
            missing = self._not_found(missing)
        return keys, missing

    def _not_found(self, keys: set[ShardKey]) -> set[ShardKey]:
        find = self._manifest.find_since if self.growing else self._manifest.find
        missing = {key for key in keys - self._seen if find(*key, self.version) is None}
        if len(self._seen) > SEEN_SHARDS:
            self._seen = set()
        self._seen |= keys - missing
        return missing

    def _look_again(self) -> None:
        """Read the manifest's HEAD once more; what it names stays open if it is the same one.

        Raises:
            StoreError: the store was made anew meanwhile.
        """
        self._looked = time.monotonic()
        manifest = self._store.manifest()
        if manifest.version != self._manifest.version:
            self._manifest = manifest
