"""The extractor: a process that holds the teachers and turns shards of images into shard files.

It is an ordinary class; `pipelines.machines.pool` makes Ray actors of it. All it does can be done
again: calls are functions of their arguments, and files are written whole (docs/design.md, law 5).
"""

import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import PIL
import polars as pl
import timm
import torch

from cache.codec.encoded import Escapes
from cache.format.record_table import ShardRecord
from cache.shard_ranges import ShardRange
from cache.store import Store
from cache.writer import write_shard
from eupe import views
from eupe.encoders import Features
from eupe.errors import BadInput
from eupe.moments import Moments
from eupe.spec import AugmentedView, CentreView
from pipelines.caching.loaded import Loaded
from pipelines.features.live_rows import check_teacher
from pipelines.features.streams import Stored, Streams
from pipelines.images import warned
from pipelines.images.parquet import RowGroups
from pipelines.images.reader import ImageReader, LostImage
from pipelines.recipe.config import TeacherConfig

ALL_LOST = 4
"""Images of a batch of which not one is found: a disk that is not mounted, not images lost."""
UNDER_WAY = 2
"""Batches of a store that may wait to be encoded while the next is computed; they take memory."""
Output = tuple[str, int]
"""A teacher's name and the resolution of its input, pixels."""


class Measured(NamedTuple):
    """What one output is over some samples.

    Attributes:
        summary: moments; None where no sample gave finite features.
        patches: moments of the patch tokens, or None.
        tokens: float32 [k, D], patch tokens spread evenly over the samples.
        rows: float32 [r, N, D], patches of whole samples, spread likewise; None: not asked for.
    """

    summary: Moments | None
    patches: Moments | None
    tokens: np.ndarray
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class DrawnView:
    """One view as the teachers want it.

    Attributes:
        pixels: resolution -> uint8 [R, R, 3]; empty if the image is lost or cannot be decoded.
        digest: of the canvas.
        parameters: of the view, JSON.
        reason: why there are no pixels, else None.
        lost: True if the image is not where it was indexed, or is another one.
    """

    pixels: Mapping[int, np.ndarray]
    digest: str | None
    parameters: str | None
    reason: str | None
    lost: bool = False


class _Pass(NamedTuple):
    """One view of a compute batch: where it lies in the table, each output on its device."""

    start: int
    view: int
    drawn: list[DrawnView]
    tokens: dict[Output, Features]


_About = tuple[str | None, str | None, str | None]
"""Digest, parameters and reason of a view, see `DrawnView`."""


class _Part:
    """What one store gets of one view of one shard, gathered batch by batch, then written."""

    def __init__(self, store: Store, view: int, shard: ShardRange) -> None:
        self._store, self._view, self._shard = store, view, shard
        self._patches = np.empty((len(shard), *store.row_shape), store.codec.storage_dtype)
        self._summaries: list[np.ndarray] = []
        self._escapes: list[Escapes] = []
        self._starts: list[int] = []
        self._digests: list[str | None] = []
        self._parameters: list[str | None] = []
        self._reasons: list[str | None] = []

    def begin(self, batch: _Pass, streams: Streams) -> "_Encoding":
        """Begin to encode a batch's tokens; its pixels are not kept."""
        features = batch.tokens[_output(self._store)]
        stored = streams.encode(self._store.codec, features)
        about = [(image.digest, image.parameters, image.reason) for image in batch.drawn]
        return _Encoding(self, batch.start, about, stored)

    def add(self, start: int, about: Sequence[_About], stored: Stored) -> None:
        """Take a batch that is encoded; batches come in order."""
        encoded, summary = stored
        self._patches[start : start + len(about)] = encoded.data
        self._summaries.append(summary)
        self._escapes.append(encoded.escapes)
        self._starts.append(start)
        self._digests += [digest for digest, _, _ in about]
        self._parameters += [parameters for _, parameters, _ in about]
        self._reasons += [
            reason or _summary_reason(own) or other
            for (_, _, reason), own, other in zip(about, summary, encoded.reasons, strict=True)
        ]

    def write(self, samples: pl.DataFrame, made_by: Mapping[str, object]) -> ShardRecord:
        """Write the shard's files, once every batch is there."""
        summary = np.concatenate(self._summaries)
        rows = pl.DataFrame(
            {
                "sample_id": samples["sample_id"],
                "valid": [reason is None for reason in self._reasons],
                "reason": pl.Series(self._reasons, dtype=pl.String),
                "view_digest": pl.Series(self._digests, dtype=pl.String),
                "parameters": pl.Series(self._parameters, dtype=pl.String),
                "summary": pl.Series(summary, dtype=pl.Array(pl.Float32, summary.shape[1])),
            }
        )
        escapes = Escapes.joined(self._escapes, self._starts)
        return write_shard(
            self._store, self._view, self._shard, self._patches, rows, made_by, escapes
        )


class _Encoding(NamedTuple):
    """A batch of a part that is being encoded."""

    part: _Part
    start: int
    about: list[_About]
    stored: "Future[Stored]"

    def end(self) -> None:
        """Wait for it, and give it to its part."""
        self.part.add(self.start, self.about, self.stored.result())


class Extractor:
    """Holds teachers; measures moments and extracts shards.

    Args:
        teachers: those it may be asked for; each is loaded when first needed, so that a file that
            is missing fails a call with its reason, not the actor.
        decode_threads: that read, decode and draw while the teachers compute.
        device: the teachers compute on.
        compute_threads: of torch, in this process; None leaves them as they are.
    """

    def __init__(
        self,
        teachers: Sequence[TeacherConfig],
        decode_threads: int = 2,
        device: str = "cpu",
        compute_threads: int | None = None,
    ) -> None:
        if compute_threads is not None:
            torch.set_num_threads(compute_threads)
        self._loaded = Loaded(teachers, device)
        self._device = device
        self._row_groups = RowGroups()
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._computing = threading.Lock()  # one call computes while another writes

    def measure(
        self,
        base: str,
        policy: CentreView | AugmentedView,
        samples: pl.DataFrame,
        outputs: Sequence[Output],
        compute_batch: int,
        num_tokens: int = 0,
        num_rows: int = 0,
    ) -> dict[Output, Measured]:
        """Measure the moments of view 0 of some samples, in float64.

        Args:
            base: what the samples' paths are relative to, `images.walks.base`.
            policy: of the views.
            samples: rows of the sample table.
            outputs: what to measure.
            compute_batch: pictures a forward pass, padded.
            num_tokens: patch tokens to bring along, at most.
            num_rows: samples whose patches to bring along whole, at most.

        Raises:
            BadInput: weights that cannot be loaded, or images that are out of reach.
        """
        parts: dict[Output, list[tuple[np.ndarray, np.ndarray]]] = {each: [] for each in outputs}
        passes = self._passes(base, policy, samples, {0: outputs}, compute_batch)
        with self._computing:
            for batch in passes:
                decoded = np.array([drawn.reason is None for drawn in batch.drawn])
                for output, features in batch.tokens.items():
                    summary = features.summary.cpu().numpy()
                    patches = features.patches.flatten(1, 2).cpu().numpy()
                    finite = decoded & np.isfinite(summary).all(1)
                    finite &= np.isfinite(patches).all((1, 2))
                    parts[output].append((summary[finite], patches[finite]))
        return {output: _measured(tokens, num_tokens, num_rows) for output, tokens in parts.items()}

    def extract(
        self, base: str, wanted: Mapping[int, Sequence[Store]], shard: ShardRange
    ) -> list[ShardRecord]:
        """Compute and write one shard of some views for several stores.

        Each image is read and decoded once for all of them, each view drawn once.

        Args:
            base: what the samples' paths are relative to, `images.walks.base`.
            wanted: view number -> stores that want it; all of one dataset, view policy and compute
                batch.
            shard: which rows.

        Returns:
            one record a view and store, in the order of `wanted`; nothing is committed.

        Raises:
            BadInput: weights that cannot be loaded or are not those a store was made with; images
                that are out of reach.
            StoreError: a file cannot be written.
        """
        stores = [store for of_view in wanted.values() for store in of_view]
        samples = stores[0].samples.shard(shard.shard)
        compute_batch = int(str(stores[0].provenance["compute_batch"]))
        outputs = {view: [_output(store) for store in of_view] for view, of_view in wanted.items()}
        parts = {
            view: [_Part(store, view, shard) for store in of_view]
            for view, of_view in wanted.items()
        }
        passes = self._passes(base, stores[0].spec.views, samples, outputs, compute_batch)
        under_way: deque[_Encoding] = deque()
        with self._computing:
            for store in stores:
                check_teacher(self._loaded.teacher(store.spec.teacher.name).spec, store)
            for batch in passes:
                for part in parts[batch.view]:
                    under_way.append(part.begin(batch, self._streams))
                    if len(under_way) > UNDER_WAY:
                        under_way.popleft().end()
        for encoding in under_way:  # while the next call computes
            encoding.end()
        made_by = provenance(compute_batch, torch.get_num_threads(), self._device)
        return [part.write(samples, made_by) for of_view in parts.values() for part in of_view]

    @cached_property
    def _streams(self) -> Streams:
        return Streams(self._device)

    def _passes(
        self,
        base: str,
        policy: CentreView | AugmentedView,
        samples: pl.DataFrame,
        wanted: Mapping[int, Sequence[Output]],
        compute_batch: int,
    ) -> Iterator[_Pass]:
        """Walk over samples in compute batches, and in each over the views (view -> outputs).

        The next batch is decoded, and all its views are drawn, while this one computes; the first
        one from now on, while the call before may still compute.
        """
        resolutions = {
            view: sorted({resolution for _, resolution in outputs})
            for view, outputs in wanted.items()
        }
        draw = partial(self._draw, ImageReader(base, self._row_groups), policy, resolutions)

        def decode(start: int) -> list[Future[dict[int, DrawnView]]]:
            rows = samples.slice(start, compute_batch).iter_rows(named=True)
            return [self._decoders.submit(draw, sample) for sample in rows]

        def walk(ahead: list[Future[dict[int, DrawnView]]]) -> Iterator[_Pass]:
            for start in range(0, len(samples), compute_batch):
                coming, ahead = ahead, decode(start + compute_batch)
                images = [future.result() for future in coming]
                _check_mounted(images)
                for view, outputs in wanted.items():
                    drawn = [image[view] for image in images]
                    tokens: dict[Output, Features] = {}
                    for resolution in resolutions[view]:
                        pixels = _stacked(drawn, resolution)
                        names = [name for name, own in outputs if own == resolution]
                        features = self._loaded.features(
                            names, pixels, compute_batch, self._streams.arrive
                        )
                        tokens |= {(name, resolution): each for name, each in features.items()}
                    yield _Pass(start, view, drawn, tokens)

        return walk(decode(0))

    @staticmethod
    def _draw(
        images: ImageReader,
        policy: CentreView | AugmentedView,
        resolutions: Mapping[int, Sequence[int]],
        sample: Mapping[str, object],
    ) -> dict[int, DrawnView]:
        """Decode a sample once and draw its views, each at its own resolutions."""
        try:
            data = images.read(sample, verify=True)
            with warned.about(str(sample["sample_id"])):
                image = views.decode(data, policy.background)
        except views.ImageError as error:
            lost = isinstance(error, LostImage)
            return dict.fromkeys(resolutions, DrawnView({}, None, None, str(error), lost))
        drawn = {}
        for view, of_view in resolutions.items():
            canvas, parameters, digest = views.view_of(
                image, policy, str(sample["sample_id"]), view
            )
            pixels = {resolution: views.resize(canvas, resolution) for resolution in of_view}
            as_json = json.dumps(parameters.to_json_dict(), sort_keys=True)
            drawn[view] = DrawnView(pixels, digest, as_json, None)
        return drawn


def provenance(
    compute_batch: int, compute_threads: int, device: str | None = None
) -> dict[str, object]:
    """Return what else may move a feature's last bits: recorded, never identity (law 1).

    Args:
        compute_batch: pictures a forward pass.
        compute_threads: of torch.
        device: this process computes on; None: it does not compute.
    """
    made_by: dict[str, object] = {
        "compute_batch": compute_batch,
        "compute_threads": compute_threads,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
    }
    if device is not None:
        cuda = device.startswith("cuda")
        made_by["device"] = torch.cuda.get_device_name(device) if cuda else "cpu"
    return made_by


def _output(store: Store) -> Output:
    return store.spec.teacher.name, store.spec.resolution


def _check_mounted(images: Sequence[Mapping[int, DrawnView]]) -> None:
    """Refuse a batch of lost images alone: where they lie is out of reach, so record nothing."""
    reasons = [each.reason for image in images for each in image.values() if each.lost]
    num_lost = sum(all(each.lost for each in image.values()) for image in images)
    if num_lost == len(images) >= ALL_LOST:
        raise BadInput(
            f"all {num_lost} images of a batch are lost; is their source in reach? {reasons[0]}"
        )


def _stacked(drawn: Sequence[DrawnView], resolution: int) -> np.ndarray:
    """Stack pictures, uint8 [n, R, R, 3]; black where there is none, its row is invalid."""
    none = np.zeros((resolution, resolution, 3), np.uint8)
    return np.stack([each.pixels.get(resolution, none) for each in drawn])


def _summary_reason(summary: np.ndarray) -> str | None:
    return None if np.isfinite(summary).all() else "the teacher's summary is not finite"


def _measured(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], num_tokens: int, num_rows: int
) -> Measured:
    summary = np.concatenate([part for part, _ in parts])
    whole = np.concatenate([part for _, part in parts])
    patches = whole.reshape(-1, whole.shape[-1])
    tokens = _spread(patches, num_tokens)
    rows = _spread(whole, num_rows) if num_rows else None
    if not len(summary):
        return Measured(None, None, tokens, rows)
    return Measured(Moments.of(summary), Moments.of(patches), tokens, rows)


def _spread(values: np.ndarray, count: int) -> np.ndarray:
    """Return so many of [n, ...], at most, spread evenly."""
    kept = min(count, len(values))
    return values[np.arange(kept) * len(values) // max(kept, 1)]
