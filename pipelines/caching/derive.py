"""Deriving: a cheaper store from a richer one, without a pass of the teacher.

Another codec, fewer views, fewer samples: what the source has is decoded and encoded again, or
copied as it is where the codec stays.

Identity (law 1). What a float32 store gives to another codec is what the teacher gave, so the
derived store is the one that a build would have made, byte for byte, and has its identity. Any
other source has rounded the features first: the codec of what is derived from it says so, as in
"rot4 of float16", and is another identity; recipes name it so. Grid codecs are fitted to pictures
of the sample, which a store no longer knows: of these a derived one is always another. Fewer views
or samples change no row, and no identity: they want a root of their own.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from cache.codec import nothing
from cache.codec.encoded import Encoded
from cache.codec.known import default_codec, kind, make_codec, name_of
from cache.errors import FingerprintMismatch, NotBuilt
from cache.format import layout
from cache.reader import Reader
from cache.samples import Samples
from cache.selection import Selection
from cache.shard_ranges import Rows, ShardRange
from cache.store import Store, create_store, open_store, store_info
from cache.verify import Progress, unseen
from cache.writer import write_shard
from eupe.errors import BadInput
from eupe.spec import CodecSpec
from pipelines.caching import quality
from pipelines.caching.measure import SAMPLE_ROWS, SAMPLE_TOKENS, Sample
from pipelines.features.codec_torch import encode

ROWS = 32
"""Decoded and encoded at a time: 50 MB of float32 for 256 tokens of 1536 channels."""
EXACT = "float32"
"""Keeps what teachers give as it is."""


@dataclass(frozen=True)
class Derived:
    """What a derivation did.

    Attributes:
        store: that was made, or went on with.
        num_shards: written; 0 if everything was there.
        num_samples: of the store's dataset.
        num_bytes: of all its committed files.
    """

    store: Store
    num_shards: int
    num_samples: int
    num_bytes: int

    @property
    def codec(self) -> str:
        """As recipes name it."""
        return name_of(self.store.spec.codec)


def derive(
    directory: Path,
    root: str | Path,
    codec: str | None = None,
    num_views: int | None = None,
    num_samples: int | None = None,
    shown: Callable[[int], AbstractContextManager[Progress]] = unseen,
) -> Derived:
    """Make a store of another one, or go on with it: shards that are there are not written again.

    What the source lacks, as of a store of what is drawn or of a bank, is left out.

    Args:
        directory: of the source.
        root: cache root of what is derived; the source's own where only the codec differs.
        codec: its name; None: the source's.
        num_views: the first so many; None: all that the source has.
        num_samples: the first so many by row, a random subset; None: all.
        shown: shows progress over so many shards.

    Raises:
        BadInput: nothing would differ, or in a way that this root cannot hold; a lossy codec that
            keeps less of the features than it documents.
        StoreError: the source cannot be read, or something cannot be written.
    """
    info = store_info(directory)
    base = layout.cache_root(root)
    source = open_store(directory.parents[3], info.spec)
    spec = info.spec.model_copy(update={"codec": codec_of(info.spec.codec, codec)})
    views = info.num_views if num_views is None else num_views
    if not 1 <= views <= info.num_views:
        raise BadInput(
            f"views = {views}: {directory} has {info.num_views}, wants 1 or more of them"
        )
    if base.resolve() == source.root.resolve():
        if spec == info.spec:
            raise BadInput(f"{directory}: what is derived would lie there too; give another root")
        if num_samples is not None:
            raise BadInput("samples: fewer of them want a root of their own; give another root")
    else:
        _take_samples(source, base, num_samples)
    reader = Reader(source, range(views))
    store = _opened(base, source, spec.codec, reader, info.version)
    todo = [(view, shard) for view, shard in store.todo(views) if _has(reader, store, view, shard)]
    with shown(len(todo)) as progress:
        for done, (view, shard) in enumerate(todo, 1):
            _write(store, reader, view, shard)
            progress(done, len(todo))
    total = store.manifest().total()
    return Derived(store, len(todo), len(store.samples), total.num_bytes)


def codec_of(source: CodecSpec, name: str | None) -> CodecSpec:
    """Return the codec of what is derived from a store, as its identity says it."""
    there = name_of(source)
    if name is None or name == there:
        return source
    if not kind(name).bits or not kind(source.name).bits:
        raise BadInput(
            f"codec = {name!r}: cannot be derived from {there!r}: {nothing.NONE!r} has no patches, "
            "and its stores are built"
        )
    exact = not kind(name).of_rows and there == EXACT
    return default_codec(name if exact else f"{name} of {there}")


def _take_samples(source: Store, root: Path, count: int | None) -> None:
    """Index the first so many of the source's samples in another root, if none are there."""
    dataset = source.spec.dataset
    try:
        there = Samples.open(root, dataset.name)
    except NotBuilt:
        there = source.samples
        chosen = there.at(np.arange(min(len(there), count or len(there))))
        Samples.append(root, dataset, chosen, source.samples.rows_per_shard)
        return
    if count is not None and min(count, len(source.samples)) != len(there):
        raise BadInput(f"samples = {count}: {root} has {len(there)} of {dataset.name} already")


def _opened(root: Path, source: Store, codec: CodecSpec, reader: Reader, version: int) -> Store:
    """Open the derived store, or create it as the source was: moments are the teacher's own."""
    spec = source.spec.model_copy(update={"codec": codec})
    try:
        return open_store(root, spec)
    except (NotBuilt, FingerprintMismatch):  # others of the teacher's stores are no obstacle
        moments = source.moments()
    provenance: dict[str, object] = {
        **source.provenance,
        "derived": {"fingerprint": source.spec.fingerprint(), "version": version},
    }
    fitted = source.codec
    if codec != source.spec.codec:
        rows = _sample(reader)
        tokens = rows.reshape(-1, rows.shape[-1])
        tokens = tokens[:: max(1, len(tokens) // SAMPLE_TOKENS)][:SAMPLE_TOKENS]
        provenance.pop("codec_quality", None)
        fitted = make_codec(codec, moments["patches"], spec.grid, rows)
        found = quality.check(spec, Sample(moments, tokens, rows))
        if found is not None:
            provenance["codec_quality"] = found.to_json_dict()
    return create_store(root, spec, moments, provenance, fitted)


def _sample(reader: Reader) -> np.ndarray:
    """Decode valid rows of view 0, spread evenly over those that are there: float32 [r, N, D]."""
    shards = reader.store.samples.shards()
    shards = shards.where(reader.records.shared([0])[shards.numbers])
    count, ends = min(SAMPLE_ROWS, shards.num_rows), np.cumsum(shards.lengths)
    places = np.arange(count) * shards.num_rows // max(count, 1)
    of_shard = np.searchsorted(ends, places, side="right")
    chosen = reader.select(shards.stops[of_shard] - ends[of_shard] + places)
    rows = chosen.decoded()[chosen.valid]
    if not len(rows):
        raise BadInput(f"{reader.store.directory}: no valid row to fit a codec to")
    return rows


def _has(reader: Reader, store: Store, view: int, shard: ShardRange) -> bool:
    """True if the source has all rows of a shard of what is derived."""
    return not reader.records.num_absent(_rows(reader, store, shard), view)


def _rows(reader: Reader, store: Store, shard: ShardRange) -> Sequence[int] | Rows:
    """Return the source's rows of a shard of what is derived, [n]."""
    if store.root == reader.store.root:
        return np.arange(shard.start, shard.stop)
    ids = store.samples.shard(shard.shard)["sample_id"].to_list()
    return reader.store.samples.rows_of(ids)


def _write(store: Store, reader: Reader, view: int, shard: ShardRange) -> None:
    """Write and commit one shard of what is derived."""
    ids = store.samples.shard(shard.shard)["sample_id"].to_list()
    rows = _rows(reader, store, shard)
    chosen = reader.select(rows, view)
    parts = [
        _encoded(store, reader, reader.select(rows[start : start + ROWS], view))
        for start in range(0, len(rows), ROWS)
    ]
    starts = list(range(0, len(rows), ROWS))
    escapes = type(parts[0].escapes).joined([part.escapes for part in parts], starts)
    reasons = [
        there or new
        for there, new in zip(
            chosen.reasons, [reason for part in parts for reason in part.reasons], strict=True
        )
    ]
    summaries = np.array(chosen.summaries)
    table = pl.DataFrame(
        {
            "sample_id": ids,
            "valid": [reason is None for reason in reasons],
            "reason": pl.Series(reasons, dtype=pl.String),
            "view_digest": pl.Series(chosen.digests, dtype=pl.String),
            "parameters": pl.Series(chosen.parameters, dtype=pl.String),
            "summary": pl.Series(summaries, dtype=pl.Array(pl.Float32, summaries.shape[1])),
        }
    )
    data = np.concatenate([part.data for part in parts])
    made_by = {"derived_from": reader.store.spec.fingerprint(), "torch": torch.__version__}
    store.commit([write_shard(store, view, shard, data, table, made_by, escapes)])


def _encoded(store: Store, reader: Reader, chosen: Selection) -> Encoded:
    """Return rows as the derived store keeps them: copied, where the codec stays."""
    if store.spec.codec == reader.store.spec.codec:
        reasons: list[str | None] = [None] * len(chosen)
        return Encoded(chosen.patches(), chosen.valid, reasons, chosen.escapes)
    decoded = np.where(chosen.valid[:, None, None], chosen.decoded(), np.float32(0))
    return encode(store.codec, torch.from_numpy(decoded))
