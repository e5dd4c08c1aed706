"""The manifest of a store: which shards exist. A shard that is not in it does not exist (law 5).

Records are kept for ever in Arrow segments; HEAD, replaced last, names the segments of the newest
version. Every record carries the version that committed it, so any earlier version can still be
read after segments have been merged: a run pins the version it trains on.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa

from cache.errors import Busy, Corrupt, NotBuilt
from cache.files import atomic
from cache.files.bucket import BucketPath
from cache.format import arrow_tables, layout
from eupe.errors import BadInput

SWAP_SECONDS = 60.0
MERGE_AT = 8
"""So many segments of about one size become one: n commits make O(log n) files."""


@dataclass(frozen=True)
class ShardRecord:
    """What a committed shard is.

    Attributes:
        view: view number.
        shard: shard number.
        start: first row.
        stop: one past the last row.
        num_valid: rows whose features are there.
        num_escapes: tokens stored at higher precision.
        samples_digest: of the sample ids and image digests the features were made of.
        patches_bytes: size of the Zarr shard file.
        patches_sha256: its checksum.
        rows_bytes: size of the table of rows.
        rows_sha256: its checksum.
        provenance: library versions, device, compute batch; canonical JSON. Never identity.
    """

    view: int
    shard: int
    start: int
    stop: int
    num_valid: int
    num_escapes: int
    samples_digest: str
    patches_bytes: int
    patches_sha256: str
    rows_bytes: int
    rows_sha256: str
    provenance: str

    @property
    def num_invalid(self) -> int:
        """Rows recorded as invalid, with their reason in the table of rows."""
        return self.stop - self.start - self.num_valid


SCHEMA = pa.schema(
    [("version", pa.int64())]
    + [(f.name, pa.int64() if f.type in (int, "int") else pa.string()) for f in fields(ShardRecord)]
)
"""Columns of a segment."""


class Manifest:
    """The manifest as of one reading of HEAD; `commit` moves it on.

    Attributes:
        directory: where segments and HEAD lie.
        head: the parsed HEAD.
    """

    def __init__(self, directory: Path, head: dict[str, object], content: bytes | None):
        """Use `Manifest.open` or `Manifest.create`."""
        self.directory = directory
        self.head = head
        self._content = content  # of the HEAD file as read, which a commit expects to find

    @classmethod
    def open(cls, store: Path) -> "Manifest":
        """Open the manifest of a store's directory.

        Raises:
            NotBuilt: the store has none.
            Corrupt: HEAD cannot be read.
        """
        directory = layout.manifest_directory(store)
        path = directory / layout.HEAD
        try:
            content = path.read_bytes()
            head = json.loads(content)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotBuilt(f"{store}: no store here (it has no manifest/HEAD)") from error
        except ValueError as error:
            raise Corrupt(f"{path}: no JSON ({error})") from error
        if not isinstance(head, dict) or head.get("format") != 1:
            raise Corrupt(f"{path}: wants a JSON object of format 1")
        return cls(directory, head, content)

    @classmethod
    def create(cls, store: Path, pinned: Mapping[str, object]) -> "Manifest":
        """Write the first HEAD, version 0 without shards; `pinned` fields stay in every HEAD."""
        head = {"format": 1, **pinned, "version": 0, "segments": []}
        manifest = cls(layout.manifest_directory(store), head, None)
        manifest._write_head(head)
        return manifest

    @property
    def version(self) -> int:
        """Number of commits so far."""
        return int(self.head["version"])  # type: ignore[call-overload,no-any-return]

    @property
    def segment_files(self) -> list[tuple[Path, str]]:
        """Path and sha256 of every segment."""
        return [(self.directory / str(s["name"]), str(s["sha256"])) for s in self._segments()]

    def table(self, version: int | None = None) -> pa.Table:
        """Return the records at a version (None: the newest), one a (view, shard), sorted so.

        A shard that was committed again is there once, with its latest record.

        Raises:
            ValueError: that version does not exist.
            Corrupt: a segment is missing or not what HEAD says.
        """
        if version is not None and not 0 <= version <= self.version:
            raise BadInput(f"version = {version}: {self.directory} has 0 to {self.version}")
        parts = self._parts()
        table = pa.concat_tables(parts) if parts else SCHEMA.empty_table()
        committed = arrow_tables.to_numpy(table["version"])
        keep = np.arange(len(committed))
        if version is not None:
            keep = keep[committed <= version]
        view, shard = (arrow_tables.to_numpy(table[name])[keep] for name in ("view", "shard"))
        order = np.lexsort((committed[keep], shard, view))
        view, shard = view[order], shard[order]
        last = np.ones(len(order), bool)
        last[:-1] = (view[1:] != view[:-1]) | (shard[1:] != shard[:-1])
        chosen = keep[order[last]]
        if len(chosen) == len(committed) and (np.diff(chosen) == 1).all():
            return table  # already in order: stay mapped
        return table.take(arrow_tables.from_numpy(chosen))

    def records(self, version: int | None = None) -> list[ShardRecord]:
        """Return the records at a version as objects, sorted by view and shard (see `table`)."""
        rows = self.table(version).drop_columns(["version"]).to_pylist()
        return [ShardRecord(**row) for row in rows]

    def commit(self, records: Sequence[ShardRecord]) -> int:
        """Make shards exist: append their records, HEAD last; return the new version.

        The files of the shards must be on disk. `Store.commit` also grows the array's shape;
        callers want that one.

        Raises:
            Busy: another process has been committing for a minute.
        """
        if not records:
            return self.version
        scratch = layout.scratch_directory(self.directory.parent)
        with atomic.only_writer(self.directory.parent, scratch):
            return self._commit(records, scratch)

    def _commit(self, records: Sequence[ShardRecord], scratch: Path) -> int:
        """Append to the newest HEAD; in a bucket, builders of other machines move it too."""
        rows = [asdict(record) for record in records]
        given = time.monotonic() + SWAP_SECONDS
        while True:
            self._read_again()
            version = self.version + 1
            columns = {"version": [version] * len(records)}
            columns |= {name: [row[name] for row in rows] for name in SCHEMA.names[1:]}
            try:
                self._append(pa.table(columns, schema=SCHEMA), version, scratch)
                return version
            except Busy:
                if time.monotonic() > given:
                    raise

    def _append(self, table: pa.Table, version: int, scratch: Path) -> None:
        """Write one segment, merging smaller ones of the tail into it, then HEAD."""
        segments = self._segments()
        first = version
        # Merge when the last MERGE_AT - 1 segments are no larger than this one would become, so
        # each record is rewritten at most log_MERGE_AT(n) times.
        while True:
            tail = segments[-(MERGE_AT - 1) :]
            if len(tail) < MERGE_AT - 1 or max(_rows(s) for s in tail) > table.num_rows:
                break
            table = pa.concat_tables([*(self._segment(entry) for entry in tail), table])
            first = int(str(tail[0]["name"]).partition("-")[0])
            segments = segments[: -len(tail)]
        path = self.directory / f"{first:08d}-{version:08d}.arrow"
        name, written = atomic.write_new(path, arrow_tables.to_bytes(table), scratch)
        entry = {"name": name, "rows": table.num_rows, "sha256": written.sha256}
        self._write_head({**self.head, "version": version, "segments": [*segments, entry]})
        if isinstance(self.directory, BucketPath):
            return  # another machine may be about to name a segment, or be reading an older HEAD
        named = {str(entry["name"]) for entry in self._segments()}
        for path in self.directory.glob("*.arrow"):
            if path.name not in named:  # merged just now, or left by a killed commit
                path.unlink(missing_ok=True)

    def _write_head(self, head: dict[str, object]) -> None:
        scratch = layout.scratch_directory(self.directory.parent)
        content = json.dumps(head, indent=2, sort_keys=True).encode() + b"\n"
        atomic.swap(self.directory / layout.HEAD, content, self._content, scratch)
        self.head, self._content = head, content

    def _read_again(self) -> None:
        newest = Manifest.open(self.directory.parent)
        self.head, self._content = newest.head, newest._content

    def _segments(self) -> list[dict[str, object]]:
        segments = self.head["segments"]
        assert isinstance(segments, list)
        return segments

    def _parts(self) -> list[pa.Table]:
        """Read the segments; where a committer has merged some since HEAD was read, its newer ones.

        A merge loses no record, so what was asked of the older HEAD stands in the newer.
        """
        while True:
            try:
                return [self._segment(entry) for entry in self._segments()]
            except (NotBuilt, Corrupt):
                before = self.head
                self._read_again()
                if self.head == before:
                    raise

    def _segment(self, entry: Mapping[str, object]) -> pa.Table:
        path = self.directory / str(entry["name"])
        buffer = arrow_tables.map_file(path, sha256=str(entry["sha256"]))
        check_pinned(path, buffer, str(entry["sha256"]))  # 0.2 s for a million shards
        table = arrow_tables.parse_table(buffer, str(path))
        if table.schema != SCHEMA:
            raise Corrupt(f"{path}: not the segment its HEAD describes")
        return table


def check_pinned(path: Path, content: bytes | pa.Buffer, sha256: str) -> None:
    """Compare a file's contents with the checksum that HEAD pins.

    Raises:
        Corrupt: they are another file's.
    """
    if hashlib.sha256(content).hexdigest() != sha256:
        raise Corrupt(f"{path}: contents do not match the sha256 in HEAD; restore the file")


def _rows(entry: Mapping[str, object]) -> int:
    return int(entry["rows"])  # type: ignore[call-overload,no-any-return]
