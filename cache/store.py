"""A store: every (sample, view) of a dataset through one teacher at one resolution."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from cache.codec.encoded import Arrays, Codec, Moments
from cache.codec.known import make_codec, stored_codec
from cache.errors import Corrupt, FingerprintMismatch, NotBuilt
from cache.files import atomic, place
from cache.format import arrow_tables, codec_table, layout, moments_table, rows_table, zarr_shard
from cache.format.record_table import ShardRecord
from cache.manifest import Manifest, ManifestHead, Totals, check_same
from cache.samples import Samples, num_rows_now
from cache.segments import check_pinned
from cache.shard_ranges import Missing, ShardRanges
from eupe import fingerprint as fp
from eupe.spec import StoreSpec

FITTED = "fitted"
"""Of a codec in spec.json: name and sha256 of the file of its `arrays`."""
BUILD = "build it with `eupe cache build` or `prefect deployment run teacher-cache/default`"


class Store:
    """An open store; made by `create_store` or `open_store`.

    Attributes:
        root: the cache root.
        spec: what the store holds.
        directory: where it lies.
        provenance: what the first build recorded for later builds to obey (compute batch, ...).
        moments_sha256: checksum of its moments, which never change.
    """

    def __init__(self, root: Path, spec: StoreSpec, manifest: Manifest):
        """Use `create_store` or `open_store`."""
        self.root = root
        self.spec = spec
        self.directory = layout.store_directory(root, spec)
        self.provenance = manifest.head.provenance
        self._spec_sha256 = manifest.head.spec_sha256
        self.moments_sha256 = manifest.head.moments_sha256

    def __reduce__(self) -> tuple[object, ...]:
        """Travel to other processes as root and spec, and be opened there."""
        return open_store, (self.root, self.spec)

    def __repr__(self) -> str:
        return f"Store({self.directory})"

    @cached_property
    def samples(self) -> Samples:
        """The dataset's samples as they were when first asked for."""
        return Samples.open(self.root, self.spec.dataset.name)

    @cached_property
    def codec(self) -> Codec:
        """The codec, as fitted when the store was created: other code may fit it otherwise.

        Raises:
            Corrupt: spec.json is not what HEAD says, or codec.arrow not what spec.json says.
        """
        said = self.description["codec"]
        return stored_codec(self.spec.codec, said, read_arrays(self.directory, said))

    @cached_property
    def description(self) -> dict[str, Any]:
        """What spec.json says.

        Raises:
            Corrupt: it is not what HEAD says.
        """
        path = layout.spec_file(self.directory)
        content = path.read_bytes()
        check_pinned(path, content, self._spec_sha256)
        said: dict[str, Any] = json.loads(content)
        return said

    @property
    def row_shape(self) -> tuple[int, int]:
        """Shape of one row of the patches array, in storage dtype."""
        num_tokens = self.spec.grid[0] * self.spec.grid[1]
        return self.codec.storage_shape(num_tokens, self.spec.patch_dim)

    @property
    def row_bytes(self) -> int:
        """Size of one row of the patches array, its crc32c left out."""
        return int(np.prod(self.row_shape)) * self.codec.storage_dtype.itemsize

    @property
    def rows_schema(self) -> pa.Schema:
        """Columns of every table of rows."""
        return rows_table.schema(self.spec.summary_dim, self.codec.has_escapes)

    def manifest(self) -> Manifest:
        """Read the manifest as it is now.

        Raises:
            StoreError: the store was made anew since it was opened, with another spec or moments.
        """
        manifest = Manifest.open(self.directory)
        check_same(self.directory, manifest.head, self._spec_sha256, self.moments_sha256)
        return manifest

    def moments(self) -> dict[str, Moments]:
        """Return count, mean [D] and scatter [D, D] (float64) of "summary" and "patches".

        Raises:
            Corrupt: the file is not the one that HEAD names.
        """
        path = layout.moments_file(self.directory)
        content = arrow_tables.map_file(path, sha256=self.moments_sha256)
        return moments_table.parse(content, path)

    def todo(self, wanted: int | npt.NDArray[np.bool_]) -> Missing:
        """Return what is wanted and not there: (view, shard), in view order.

        A shard is there when the manifest has it for these rows and both files have the recorded
        size; a deleted or cut file is to do again (law 11). What the files hold is not looked at,
        nor which samples it was made of: readers and `verify` do that, shard by shard.

        Args:
            wanted: True where a view of a shard is, bool [views, shards]; or the number of views
                that are wanted of all shards.
        """
        samples, manifest = self.samples, self.manifest()
        shards = samples.shards()
        every = np.ones((wanted, len(shards)), bool) if isinstance(wanted, int) else wanted
        missing = every.copy()
        files = layout.patches_file, layout.rows_file
        size_of = place.sizes_below(self.directory, 2 * sum(p.rows for p in manifest.head.segments))
        for table in manifest.tables(views=range(len(missing))):
            view, shard, stop, *sizes = (
                arrow_tables.to_numpy(table[name])
                for name in ("view", "shard", "stop", "patches_bytes", "rows_bytes")
            )
            places = np.searchsorted(shards.numbers, shard)
            there = stop == samples.shard_stops(shard)
            there[there] = missing[view[there], places[there]]
            for at in np.flatnonzero(there).tolist():
                key = int(view[at]), int(shard[at])
                missing[key[0], places[at]] = any(
                    size_of(named(self.directory, *key)) != size[at]
                    for named, size in zip(files, sizes, strict=True)
                )
        return Missing(shards, missing)

    def lacks(
        self, wanted: npt.NDArray[np.bool_], shards: ShardRanges, version: int | None = None
    ) -> int:
        """Count the views of shards that are wanted and not in the manifest.

        Args:
            wanted: bool [views, shards].
            shards: of the dataset, those that `wanted` is of.
            version: of the manifest; None: the newest.
        """
        missing = wanted.copy()
        for table in self.manifest().tables(version, range(len(wanted))):
            view, shard = (arrow_tables.to_numpy(table[name]) for name in ("view", "shard"))
            places = np.minimum(np.searchsorted(shards.numbers, shard), len(shards) - 1)
            there = shards.numbers[places] == shard
            missing[view[there], places[there]] = False
        return int(missing.sum())

    def commit(self, records: Sequence[ShardRecord]) -> int:
        """Make written shards exist; return the manifest's new version.

        Each touched view's zarr.json gets the shape of the dataset as it is, then the manifest's
        HEAD is replaced: readers see the shards from then on.

        Raises:
            StoreError: the store was made anew since it was opened, with another spec or moments.
            Busy: other processes have been committing for a minute.
        """
        manifest = self.manifest()
        self._describe_arrays(sorted({record.view for record in records}))
        return manifest.commit(records)

    def mend_metadata(self) -> None:
        """Write HEAD and the zarr.json of every committed view anew where they are not of now.

        For builds that find no shard to do, and so commit none.
        """
        manifest = self.manifest()
        manifest.settle()
        views = list(manifest.totals())
        if FITTED in self.description["codec"]:
            for view in views:
                self._copy_fitted(view)
        self._describe_arrays(views)

    def array_metadata(self, num_rows: int) -> bytes:
        """Return the zarr.json of a view, of so many rows."""
        return zarr_shard.array_metadata(
            num_rows,
            self.samples.rows_per_shard,
            self.row_shape,
            self.codec.storage_dtype,
            self.codec.fill_value,
            self.attributes(),
        )

    def attributes(self) -> dict[str, object]:
        """What the patches array says about itself: all of spec.json, which is lost with less."""
        return {"eupe": self.description}

    def _describe_arrays(self, views: Sequence[int]) -> None:
        """Write the zarr.json of views for the dataset as it is now; again if it grew meanwhile.

        Samples are only added: who looks again after writing has shortened nobody's array.
        """
        fitted = FITTED in self.description["codec"]
        left = list(views)
        while left:
            content = self.array_metadata(num_rows_now(self.root, self.spec.dataset.name))
            left = [view for view in left if not self._is_described(view, content)]
            for view in left:
                if fitted:
                    self._copy_fitted(view)
                path = layout.zarr_file(self.directory, view)
                atomic.write(path, [content], layout.scratch_directory(self.directory))

    def _is_described(self, view: int, content: bytes) -> bool:
        """True if a view's zarr.json is this one."""
        try:
            return layout.zarr_file(self.directory, view).read_bytes() == content
        except FileNotFoundError:
            return False

    def _copy_fitted(self, view: int) -> None:
        """Lay the codec's fitted values beside an array, if they are not there (law 17)."""
        copy = layout.codec_file(layout.view_directory(self.directory, view))
        if not copy.is_file():
            content = layout.codec_file(self.directory).read_bytes()
            atomic.write_once(copy, content, layout.scratch_directory(self.directory))


@dataclass(frozen=True)
class StoreInfo:
    """A line of `eupe cache ls`.

    Attributes:
        directory: where the store lies.
        spec: what it holds.
        version: of its manifest.
        num_views: views with at least one shard.
        num_shards: committed shards, over all views.
        num_rows: committed rows, over all views.
        num_valid: those that are valid.
        num_bytes: size of all committed files.
    """

    directory: Path
    spec: StoreSpec
    version: int
    num_views: int
    num_shards: int
    num_rows: int
    num_valid: int
    num_bytes: int


def create_store(
    root: str | Path,
    spec: StoreSpec,
    moments: Mapping[str, Moments],
    provenance: Mapping[str, object],
    codec: Codec | None = None,
) -> Store:
    """Create a store, or open it if it is there: moments and provenance never change afterwards.

    Of several builders that create it at once the first one's moments count, for all of them.

    Args:
        root: cache root; the dataset's samples must be in it.
        spec: what the store will hold.
        moments: "summary" and "patches": count, mean [D], scatter [D, D], measured on a fixed
            sample of features as the teacher gives them.
        provenance: what later builds must obey and what made the first one; plain data.
        codec: of the spec, fitted already; None: it is fitted to the moments.

    Raises:
        ValueError: moments of another width than the spec's.
        NotBuilt: the dataset has no samples.
        FingerprintMismatch: the directory holds a store of another spec.
        Busy: another process has been creating or committing for a minute.
    """
    base = layout.cache_root(root)
    directory = layout.store_directory(base, spec)
    Samples.open(base, spec.dataset.name)
    moments_table.check_widths(spec, moments)
    scratch = layout.scratch_directory(directory)
    with atomic.only_writer(directory, scratch):
        atomic.sweep(scratch)
        if not layout.manifest_directory(directory).joinpath(layout.HEAD).is_file():
            _create(directory, spec, moments, provenance, codec, scratch)
    return open_store(base, spec)


def _create(
    directory: Path,
    spec: StoreSpec,
    moments: Mapping[str, Moments],
    provenance: Mapping[str, object],
    codec: Codec | None,
    scratch: Path,
) -> None:
    """Write the files that HEAD pins, then HEAD.

    Other builders may do so at this moment: a file that is there is the one that counts, and HEAD
    pins what is there.
    """
    path = layout.moments_file(directory)
    measured = atomic.write_once(path, moments_table.to_bytes(moments), scratch)
    if codec is None:
        codec = make_codec(spec.codec, moments_table.parse(measured, path)["patches"])
    said = codec.to_json_dict()
    if arrays := codec.arrays():
        path = layout.codec_file(directory)
        fitted = atomic.write_once(path, codec_table.to_bytes(arrays), scratch)
        # Of another builder's file, what its codec says of itself.
        said = stored_codec(spec.codec, said, codec_table.parse(fitted, path)).to_json_dict()
        said[FITTED] = {"file": path.name, "sha256": hashlib.sha256(fitted).hexdigest()}
    content = spec_bytes(description(spec, said))
    described = atomic.write_once(layout.spec_file(directory), content, scratch)
    head = ManifestHead(
        spec_sha256=hashlib.sha256(described).hexdigest(),
        moments_sha256=hashlib.sha256(measured).hexdigest(),
        provenance=json.loads(fp.canonical_json(dict(provenance))),
    )
    Manifest.create(directory, head)


def read_arrays(directory: Path, said: Mapping[str, Any]) -> Arrays:
    """Return a codec's fitted values as its file in a folder has them; none without a file.

    Args:
        directory: of a store, or of a view.
        said: of the codec, in spec.json.

    Raises:
        NotBuilt: the file is missing.
        Corrupt: it is not the one that spec.json names.
    """
    if FITTED not in said:
        return {}
    path = layout.codec_file(directory)
    content = arrow_tables.map_file(path, sha256=said[FITTED]["sha256"])
    return codec_table.parse(content, path)


def description(spec: StoreSpec, codec: Mapping[str, object]) -> dict[str, object]:
    """Return what spec.json, and the attributes of every array, say of a store: plain data."""
    return {
        "format": spec.format,
        "fingerprint": spec.fingerprint(),
        "spec": spec.model_dump(mode="json"),
        "codec": dict(codec),
    }


def spec_bytes(said: Mapping[str, object]) -> bytes:
    """Return the spec.json that says so: equal descriptions, equal bytes."""
    return json.dumps(said, indent=2, sort_keys=True).encode() + b"\n"


def open_store(root: str | Path, spec: StoreSpec) -> Store:
    """Open the store of a spec.

    Raises:
        NotBuilt: no such store, nor one that resembles it.
        FingerprintMismatch: the directory holds another spec, or the root only has stores of the
            same teacher name and resolution with another fingerprint; with the fields that differ.
    """
    base = layout.cache_root(root)
    directory = layout.store_directory(base, spec)
    try:
        manifest = Manifest.open(directory)
    except NotBuilt as error:
        raise _not_built(base, directory, spec) from error
    lines = fp.difference(spec.model_dump(mode="json"), _read_spec(directory))
    if lines:
        raise FingerprintMismatch(f"{directory}: holds another store, asked != there", lines)
    return Store(base, spec, manifest)


def store_directories(root: str | Path) -> list[Path]:
    """List where the stores of a cache root lie, sorted; nothing of them is read.

    Raises:
        NotBuilt: there is no such folder.
    """
    base = layout.cache_root(root)
    if not base.is_dir():
        raise NotBuilt(f"{base}: no such folder, so no cache root")
    return [head.parent.parent for head in sorted(base.glob("*/*/*/*/manifest/HEAD"))]


def find_stores(root: str | Path) -> list[StoreInfo]:
    """Describe the stores of a cache root, sorted by directory.

    Raises:
        NotBuilt: there is no such folder.
        Corrupt: a store's spec or manifest cannot be read.
    """
    return [store_info(directory) for directory in store_directories(root)]


def store_info(directory: Path) -> StoreInfo:
    """Describe the store in a directory.

    Raises:
        Corrupt: its spec or manifest cannot be read.
    """
    try:
        spec = StoreSpec.model_validate(_read_spec(directory))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        what = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
        path = layout.spec_file(directory)
        raise Corrupt(f"{path}: no store spec in it ({what}); restore it") from error
    manifest = Manifest.open(directory)
    views = manifest.totals()
    total = sum(views.values(), Totals())
    return StoreInfo(
        directory=directory,
        spec=spec,
        version=manifest.version,
        num_views=len(views),
        num_shards=total.num_shards,
        num_rows=total.num_rows,
        num_valid=total.num_valid,
        num_bytes=total.num_bytes,
    )


def _read_spec(directory: Path) -> object:
    path = layout.spec_file(directory)
    try:
        return json.loads(path.read_bytes())["spec"]
    except FileNotFoundError as error:
        Manifest.open(directory)  # NotBuilt without one
        raise Corrupt(f"{path}: missing, though the store has a manifest; restore it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"{path}: no store spec in it ({error}); restore it") from error


def _not_built(base: Path, directory: Path, spec: StoreSpec) -> NotBuilt | FingerprintMismatch:
    """Say that a store is not there, and what is there instead if something resembles it."""
    pattern = f"{spec.dataset.name}/*/{spec.teacher.name}-*/{spec.resolution}/manifest/HEAD"
    asked = spec.model_dump(mode="json")
    near = [
        (fp.difference(asked, _read_spec(head.parent.parent)), head.parent.parent)
        for head in sorted(base.glob(pattern))
    ]
    if not near:
        return NotBuilt(f"{directory}: no such store; {BUILD}")
    lines, other = min(near, key=lambda item: (len(item[0]), item[1]))
    return FingerprintMismatch(
        f"{directory}: not built, {BUILD}; nearest is {other}, asked != there", lines
    )
