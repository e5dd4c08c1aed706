"""Mend a store: spec, fitted values, manifest, shards, and the arrays' zarr.json."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import JsonValue, ValidationError

from cache.codec.encoded import Arrays
from cache.codec.known import stored_codec
from cache.errors import MissingSamples, StoreError
from cache.files import atomic
from cache.format import arrow_tables, layout, moments_table, rows_table, zarr_shard
from cache.format.record_table import SCHEMA, ShardRecord, records_of, table_of
from cache.heads import HeadFile, left_of, restore
from cache.manifest import Manifest, ManifestHead
from cache.mending import Mending
from cache.runs import write_run
from cache.samples import Samples
from cache.segments import whole_segments
from cache.store import FITTED, Store, read_arrays, spec_bytes
from cache.verify import Problem, Progress, Report, check_shard
from eupe import fingerprint as fp
from eupe.errors import BadInput
from eupe.spec import StoreSpec

FIRST_COMMIT = 1
"""Version that a record gets whose own is lost: every run that pins a version sees its shard."""
UNKNOWN: dict[str, object] = {"unknown": "the record was lost; made anew from the shard's files"}
"""Provenance of such a record."""
BUILD = "`eupe cache build` computes it again"


class StoreMending:
    """Mends one store."""

    def __init__(
        self,
        base: Path,
        directory: Path,
        samples: Samples | None,
        mending: Mending,
        compute_batch: int | None,
    ):
        self.base, self.directory, self.samples = base, directory, samples
        self.mending, self.compute_batch = mending, compute_batch
        self.manifest_directory = layout.manifest_directory(directory)
        self.scratch = layout.scratch_directory(directory)

    def run(self, shown: Callable[[int], AbstractContextManager[Progress]]) -> None:
        """Mend the store's files, in the order in which one is judged by the other."""
        if self.samples is None:
            self.mending.lose(self.directory, "cannot be judged: its dataset's samples are lost")
            return
        self.left = left_of(self.manifest_directory, ManifestHead)
        head = self.left.newest
        said = self._spec(head)
        if said is None:
            return
        spec = StoreSpec.model_validate(said["spec"])
        moments = self._moments(head, spec)
        if moments is None and head is None:
            self.mending.lose(self.manifest_directory, "no HEAD without moments; see above")
            return
        pinned = ManifestHead(
            spec_sha256=hashlib.sha256(spec_bytes(said)).hexdigest(),
            moments_sha256=moments or (head.moments_sha256 if head else ""),
            provenance={},
        )
        head = head or pinned
        there = HeadFile(head, b"")
        self.store = Store(self.base, spec, Manifest(self.manifest_directory, there))
        self.store.samples = self.samples
        self.store.description = said
        arrays = self._arrays(said["codec"])
        if arrays is None:
            return
        self.store.codec = stored_codec(spec.codec, said["codec"], arrays)
        records = self._shards(head, shown)
        self._metadata(records)

    def _spec(self, head: ManifestHead | None) -> dict[str, Any] | None:
        """Return what spec.json says once it is mended; None if that is lost."""
        path = layout.spec_file(self.directory)
        wanted = None if head is None else head.spec_sha256
        if (said := self._described(path, wanted, lambda whole: whole)) is not None:
            return said
        for array in sorted(self.directory.glob("view-*/zarr.json")):
            said = self._described(array, wanted, lambda whole: whole["attributes"]["eupe"])
            if said is not None:
                what = f"damaged or lost; written anew from {array.parent.name}/{array.name}"
                self.mending.mend(path, what, partial(self._write, path, spec_bytes(said)))
                return said
        self.mending.lose(path, "damaged or lost, and no array's zarr.json says the same; restore")
        return None

    def _described(
        self, path: Path, sha256: str | None, part: Callable[[Any], Any]
    ) -> dict[str, Any] | None:
        """Read a description of this store; None if the file has none, or another's."""
        try:
            said: dict[str, Any] = part(json.loads(path.read_bytes()))
            spec = StoreSpec.model_validate(said["spec"])
            if FITTED not in said["codec"]:
                stored_codec(spec.codec, said["codec"], {})
        except (OSError, ValueError, LookupError, TypeError, ValidationError, BadInput):
            return None
        ours = layout.store_directory(self.base, spec) == self.directory
        if not ours or spec.fingerprint() != said.get("fingerprint"):
            return None
        if sha256 is not None and hashlib.sha256(spec_bytes(said)).hexdigest() != sha256:
            return None
        return said

    def _arrays(self, said: Mapping[str, Any]) -> Arrays | None:
        """Return the codec's fitted values once their files are mended; None if they are lost.

        They lie with the store and with every view, the same.
        """
        views = sorted(path.parent for path in self.directory.glob("view-*/zarr.json"))
        found: dict[Path, Arrays | None] = {}
        for directory in (self.directory, *views):
            try:
                found[directory] = read_arrays(directory, said)
            except (StoreError, OSError):
                found[directory] = None
        whole = next((path for path, arrays in found.items() if arrays is not None), None)
        for directory in (path for path, arrays in found.items() if arrays is None):
            path = layout.codec_file(directory)
            if whole is None:
                self.mending.lose(path, "damaged or lost, and no view has the same; restore it")
                return None
            content = layout.codec_file(whole).read_bytes()
            what = f"damaged or lost; written anew from {whole.name}/{path.name}"
            self.mending.mend(path, what, partial(self._write, path, content))
        return None if whole is None else found[whole]

    def _moments(self, head: ManifestHead | None, spec: StoreSpec) -> str | None:
        """Return the sha256 of the store's moments; None if they are lost."""
        path = layout.moments_file(self.directory)
        try:
            content = arrow_tables.map_file(path, sha256=head.moments_sha256 if head else None)
            moments_table.check_widths(spec, moments_table.parse(content, path))
            return hashlib.sha256(content).hexdigest()
        except (StoreError, ValueError, OSError):
            self.mending.lose(
                path,
                "damaged or lost, and cannot be told from stored features: restore it. Features "
                "are read, decoded and built without it; training normalises by it",
            )
            return None

    # ---------------------------------------------------------------------------------- shards

    def _shards(
        self, head: ManifestHead, shown: Callable[[int], AbstractContextManager[Progress]]
    ) -> list[ShardRecord]:
        """Judge every shard; return the records of those that are there once all is mended."""
        whole = whole_segments(self.manifest_directory, head.segments, SCHEMA)
        gone = [segment.name for segment in head.segments if segment.name not in whole]
        sound = self.left.fault is None and not gone
        named = {segment.name for segment in head.segments}
        versions: dict[tuple[int, int], dict[ShardRecord, int]] = {}
        for name, (_, table) in whole.items():
            if sound and name not in named:
                continue  # of a commit that never was
            committed = arrow_tables.to_numpy(table["version"]).tolist()
            for version, record in zip(committed, records_of(table), strict=True):
                versions.setdefault((record.view, record.shard), {})[record] = version
        on_disk = set() if sound else self._files()
        kept: list[ShardRecord] = []
        changed: list[tuple[int, ShardRecord]] = []
        keys = sorted(set(versions) | on_disk)
        with shown(len(keys)) as progress:
            for done, key in enumerate(keys, 1):
                known = versions.get(key, {})
                newest_first = sorted(known, key=known.__getitem__, reverse=True)
                judged = self._judged(key, newest_first)
                if judged is not None:
                    kept.append(judged)
                    if judged not in known:
                        changed.append((FIRST_COMMIT, judged))
                    elif known[judged] < max(known.values()):
                        changed.append((self.left.next_version, judged))
                progress(done, len(keys))
        if not sound:
            everything = [
                (version, record) for own in versions.values() for record, version in own.items()
            ]
            self._write_head(head, everything, changed, gone)
        return kept

    def _judged(self, key: tuple[int, int], known: Sequence[ShardRecord]) -> ShardRecord | None:
        """Return the record that a shard's files are of, the newest first; None if of none."""
        view, shard = key
        paths = [
            named(self.directory, view, shard) for named in (layout.patches_file, layout.rows_file)
        ]
        problems: list[Problem] = []
        try:
            digest = self.store.samples.shard_digest(shard)
        except MissingSamples:  # to be indexed again: until then nobody reads it
            return known[0] if known else None
        if known and all(record.samples_digest != digest for record in known):
            what = "made of other samples or images than the dataset's table has; restore the table"
            self.mending.lose(paths[0], what)
            return known[0]
        for record in known:
            problems = list(check_shard(self.store, record, True, Report()))
            if not problems:
                return record
        if not known:
            return self._read(view, shard, paths, digest)
        there = [path for path in paths if path.is_file()]

        def delete() -> None:
            for path in there:
                path.unlink()

        what = f"deleted; {BUILD}" if there else BUILD
        self.mending.mend(problems[0].path, f"{problems[0].what.partition(';')[0]}; {what}", delete)
        return None

    def _read(
        self, view: int, shard: int, paths: Sequence[Path], digest: str
    ) -> ShardRecord | None:
        """Make a shard's record from its files; None if they are not whole: it was in work."""
        try:
            content = [arrow_tables.map_file(path) for path in paths]
        except (StoreError, OSError):
            return None
        sha256s = [hashlib.sha256(part).hexdigest() for part in content]
        span = self.store.samples.shard_range(shard)
        try:
            table = arrow_tables.parse_table(content[1], str(paths[1]))
            if table.schema != self.store.rows_schema:
                return None
            valid = rows_table.valid(table)
            record = ShardRecord(
                view=view,
                shard=shard,
                start=span.start,
                stop=span.stop,
                num_valid=int(valid.sum()),
                num_escapes=rows_table.num_escapes(table),
                samples_digest=digest,
                patches_bytes=content[0].size,
                patches_sha256=sha256s[0],
                rows_bytes=content[1].size,
                rows_sha256=sha256s[1],
                provenance=fp.canonical_json(UNKNOWN).decode(),
            )
            if list(check_shard(self.store, record, True, Report())):
                return None
            sums = zarr_shard.kept_checksums(content[0], self.store.row_bytes, record.num_valid)
        except (StoreError, pa.ArrowException):
            return None
        return record if np.array_equal(*sums) else None

    def _files(self) -> set[tuple[int, int]]:
        """Return (view, shard) of every file of patches."""
        found = map(layout.shard_of, self.directory.glob("view-*/c.*.0.0"))
        return {key for key in found if key is not None}

    def _write_head(
        self,
        head: ManifestHead,
        known: Sequence[tuple[int, ShardRecord]],
        changed: Sequence[tuple[int, ShardRecord]],
        gone: Sequence[str],
    ) -> None:
        """Write one segment of all records, and the HEAD that names it."""
        path = self.manifest_directory / layout.HEAD
        provenance = head.provenance or self._provenance(known)
        if provenance is None:
            self.mending.lose(
                path,
                "lost, and no record tells the compute_batch that its features were made with: "
                "give it with --compute-batch (extraction.compute_batch of the recipe)",
            )
            return
        everything = sorted(
            [*known, *changed], key=lambda each: (each[1].view, each[1].shard, each[0])
        )
        table = table_of([record for _, record in everything], [at for at, _ in everything])
        # Where nothing tells, as many as there are shards: a build commits them one by one.
        version = self.left.next_version or table.num_rows

        def write() -> None:
            segments = write_run(self.manifest_directory, [table], version, self.scratch)
            mended = head.model_copy(
                update={"version": version, "segments": segments, "provenance": provenance}
            )
            restore(self.manifest_directory, mended, self.scratch)

        what = [f"{name} is damaged or lost" for name in gone] or [self.left.fault or ""]
        unknown = sum(at == FIRST_COMMIT for at, _ in changed)
        told = f"; of {unknown} shards the provenance is unknown now" if unknown else ""
        self.mending.mend(path, f"{', '.join(what)}; written anew{told}", write)

    def _provenance(self, known: Sequence[tuple[int, ShardRecord]]) -> dict[str, JsonValue] | None:
        """Return what the first build recorded, from what it recorded of its shards."""
        for _, record in sorted(known, key=lambda each: each[0]):
            said: dict[str, JsonValue] = json.loads(record.provenance)
            if "compute_batch" in said:
                return {name: value for name, value in said.items() if name != "device"}
        return {"compute_batch": self.compute_batch} if self.compute_batch else None

    def _metadata(self, records: Sequence[ShardRecord]) -> None:
        """Write the zarr.json of every view that has shards, where it is another."""
        ends: dict[int, int] = {}
        for record in records:
            ends[record.view] = max(record.stop, ends.get(record.view, self.store.samples.num_rows))
        for view, end in sorted(ends.items()):
            path, content = layout.zarr_file(self.directory, view), self.store.array_metadata(end)
            if not path.is_file() or path.read_bytes() != content:
                what = "damaged, lost or of another length; written anew"
                self.mending.mend(path, what, partial(self._write, path, content))

    def _write(self, path: Path, content: bytes) -> None:
        atomic.write(path, [content], self.scratch)
