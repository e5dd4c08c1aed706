"""The extractor: a process that holds the teachers and turns shards of images into shard files.

It is an ordinary class; `pipelines.pool` makes Ray actors of it. All it does can be done again:
calls are functions of their arguments, and files are written whole (DESIGN.md, law 5).
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import PIL
import polars as pl
import timm
import torch

from cache.encoded import Escapes
from cache.manifest import ShardRecord
from cache.samples import ShardRange
from cache.store import Store
from cache.writer import write_shard
from eupe import views
from eupe.encoders import Features
from eupe.moments import Moments
from eupe.spec import AugmentedView, CentreView, TeacherSpec
from eupe.teachers import Teacher, load_teacher
from pipelines.codec_torch import encode
from pipelines.config import TeacherConfig
from pipelines.forward import padded_forward
from pipelines.images import ImageReader

Output = tuple[str, int]
"""A teacher's name and the resolution of its input, pixels."""


class Measured(NamedTuple):
    """What one output is over some samples.

    Attributes:
        summary: moments; None where no sample gave finite features.
        patches: moments of the patch tokens, or None.
        tokens: float32 [k, D], patch tokens spread evenly over the samples.
    """

    summary: Moments | None
    patches: Moments | None
    tokens: np.ndarray


@dataclass(frozen=True)
class Drawn:
    """One view as the teachers want it.

    Attributes:
        pixels: resolution -> uint8 [R, R, 3]; empty if the image cannot be decoded.
        digest: of the canvas.
        parameters: of the view, JSON.
        reason: why there are no pixels, else None.
    """

    pixels: Mapping[int, np.ndarray]
    digest: str | None
    parameters: str | None
    reason: str | None


class _Pass(NamedTuple):
    """One compute batch: where it lies in the table, its views, each output on its device."""

    start: int
    drawn: list[Drawn]
    tokens: dict[Output, Features]


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
        self._configs = {teacher.name: teacher for teacher in teachers}
        self._teachers: dict[str, Teacher] = {}
        self._device = device
        self._images = ImageReader()
        self._decoders = ThreadPoolExecutor(decode_threads, thread_name_prefix="decode")
        self._computing = threading.Lock()  # one call computes while another writes

    def measure(
        self,
        policy: CentreView | AugmentedView,
        samples: pl.DataFrame,
        outputs: Sequence[Output],
        compute_batch: int,
        num_tokens: int = 0,
    ) -> dict[Output, Measured]:
        """Measure the moments of view 0 of some samples, in float64.

        Args:
            policy: of the views.
            samples: rows of the sample table.
            outputs: what to measure.
            compute_batch: pictures a forward pass, padded.
            num_tokens: patch tokens to bring along, at most.

        Raises:
            ValueError: weights that cannot be loaded, or an image file that is gone.
        """
        parts: dict[Output, list[tuple[np.ndarray, np.ndarray]]] = {each: [] for each in outputs}
        with self._computing:
            for batch in self._passes(policy, samples, 0, outputs, compute_batch):
                decoded = np.array([drawn.reason is None for drawn in batch.drawn])
                for output, features in batch.tokens.items():
                    summary = features.summary.cpu().numpy()
                    patches = features.patches.flatten(1, 2).cpu().numpy()
                    finite = decoded & np.isfinite(summary).all(1)
                    finite &= np.isfinite(patches).all((1, 2))
                    parts[output].append((summary[finite], patches[finite]))
        return {output: _measured(tokens, num_tokens) for output, tokens in parts.items()}

    def extract(self, stores: Sequence[Store], view: int, shard: ShardRange) -> list[ShardRecord]:
        """Compute and write one shard of one view for several stores.

        Each image is read, decoded and drawn once for all of them.

        Args:
            stores: of one dataset, view policy and compute batch.
            view: view number.
            shard: which rows.

        Returns:
            one record a store; nothing is committed.

        Raises:
            ValueError: weights that cannot be loaded or are not those a store was made with; an
                image file that is gone or is another one than was indexed.
            StoreError: a file cannot be written.
        """
        spec, samples = stores[0].spec, stores[0].samples.shard(shard.shard)
        compute_batch = int(str(stores[0].provenance["compute_batch"]))
        outputs = [_output(store) for store in stores]
        drawn: list[Drawn] = []
        patches = [
            np.empty((len(shard), *store.row_shape), store.codec.storage_dtype) for store in stores
        ]
        summaries: list[list[np.ndarray]] = [[] for _ in stores]
        escapes: list[list[Escapes]] = [[] for _ in stores]
        starts: list[int] = []
        reasons: list[list[str | None]] = [[] for _ in stores]
        with self._computing:
            for store in stores:
                _check_teacher(self._teacher(store.spec.teacher.name).spec, store)
            for batch in self._passes(spec.views, samples, view, outputs, compute_batch):
                drawn += batch.drawn
                starts.append(batch.start)
                rows = slice(batch.start, batch.start + len(batch.drawn))
                for number, store in enumerate(stores):
                    features = batch.tokens[outputs[number]]
                    encoded = encode(store.codec, features.patches.flatten(1, 2))
                    summary = features.summary.cpu().numpy()
                    patches[number][rows] = encoded.data
                    escapes[number].append(encoded.escapes)
                    summaries[number].append(summary)
                    reasons[number] += [
                        image.reason or _summary_reason(own) or other
                        for image, own, other in zip(
                            batch.drawn, summary, encoded.reasons, strict=True
                        )
                    ]
        made_by = provenance(self._device, compute_batch, torch.get_num_threads())
        return [
            write_shard(
                store,
                view,
                shard,
                patches[number],
                _rows(samples, drawn, reasons[number], np.concatenate(summaries[number])),
                made_by,
                Escapes.joined(escapes[number], starts),
            )
            for number, store in enumerate(stores)
        ]

    def _teacher(self, name: str) -> Teacher:
        if name not in self._teachers:
            config = self._configs[name]
            self._teachers[name] = load_teacher(
                name, config.encoder, config.weights, config.dtype, self._device
            )
        return self._teachers[name]

    def _passes(
        self,
        policy: CentreView | AugmentedView,
        samples: pl.DataFrame,
        view: int,
        outputs: Sequence[Output],
        compute_batch: int,
    ) -> Iterator[_Pass]:
        """Walk over samples in compute batches; the next one is decoded while this one computes."""
        resolutions = sorted({resolution for _, resolution in outputs})
        draw = partial(self._draw, policy, view, resolutions)

        def decode(start: int) -> list[Future[Drawn]]:
            rows = samples.slice(start, compute_batch).iter_rows(named=True)
            return [self._decoders.submit(draw, sample) for sample in rows]

        ahead = decode(0)
        for start in range(0, len(samples), compute_batch):
            coming, ahead = ahead, decode(start + compute_batch)
            drawn = [future.result() for future in coming]
            pixels = {side: _stacked(drawn, side) for side in resolutions}
            tokens = {}
            for name, side in outputs:
                tokens[name, side] = padded_forward(
                    self._teacher(name), pixels[side], compute_batch, self._device
                )
            yield _Pass(start, drawn, tokens)

    def _draw(
        self,
        policy: CentreView | AugmentedView,
        view: int,
        resolutions: Sequence[int],
        sample: Mapping[str, object],
    ) -> Drawn:
        data = self._images.read(sample, verify=True)
        try:
            drawn = views.make_view(data, policy, str(sample["sample_id"]), view)
        except views.ImageError as error:
            return Drawn({}, None, None, str(error))
        pixels = {side: views.resize(drawn.canvas, side) for side in resolutions}
        parameters = json.dumps(drawn.parameters.to_json_dict(), sort_keys=True)
        return Drawn(pixels, drawn.digest, parameters, None)


def provenance(device: str, compute_batch: int, compute_threads: int) -> dict[str, object]:
    """Return what else may move a feature's last bits: recorded, never identity (law 1)."""
    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return {
        "compute_batch": compute_batch,
        "compute_threads": compute_threads,
        "device": kind,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pillow": PIL.__version__,
    }


def _output(store: Store) -> Output:
    return store.spec.teacher.name, store.spec.resolution


def _check_teacher(loaded: TeacherSpec, store: Store) -> None:
    if loaded != store.spec.teacher:
        raise ValueError(
            f"teacher {loaded.name!r} has weights {loaded.weights[:12]} here, "
            f"{store.directory} was made with {store.spec.teacher.weights[:12]}: every machine "
            "wants the same weights file"
        )


def _stacked(drawn: Sequence[Drawn], side: int) -> np.ndarray:
    """Stack pictures, uint8 [n, R, R, 3]; black where there is none, its row is invalid."""
    none = np.zeros((side, side, 3), np.uint8)
    return np.stack([each.pixels.get(side, none) for each in drawn])


def _summary_reason(summary: np.ndarray) -> str | None:
    return None if np.isfinite(summary).all() else "the teacher's summary is not finite"


def _rows(
    samples: pl.DataFrame,
    drawn: Sequence[Drawn],
    reasons: Sequence[str | None],
    summary: np.ndarray,
) -> pl.DataFrame:
    """Build the table of one shard's rows as `cache.writer` wants it."""
    return pl.DataFrame(
        {
            "sample_id": samples["sample_id"],
            "valid": [reason is None for reason in reasons],
            "reason": pl.Series(reasons, dtype=pl.String),
            "view_digest": pl.Series([each.digest for each in drawn], dtype=pl.String),
            "parameters": pl.Series([each.parameters for each in drawn], dtype=pl.String),
            "summary": pl.Series(summary, dtype=pl.Array(pl.Float32, summary.shape[1])),
        }
    )


def _measured(parts: Sequence[tuple[np.ndarray, np.ndarray]], num_tokens: int) -> Measured:
    summary = np.concatenate([part for part, _ in parts])
    patches = np.concatenate([part.reshape(-1, part.shape[-1]) for _, part in parts])
    kept = min(num_tokens, len(patches))
    tokens = patches[np.arange(kept) * len(patches) // max(kept, 1)]
    if not len(summary):
        return Measured(None, None, tokens)
    return Measured(Moments.of(summary), Moments.of(patches), tokens)
