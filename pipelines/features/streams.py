"""A device's streams: what is copied and encoded beside a teacher's computing.

On CUDA pictures come in on a stream of their own, out of page-locked memory; what was computed is
encoded and copied out on another, by a thread of its own, because encoding asks the device how many
tokens escape and waits for what it says. A CPU does each of them where it is asked for. What is
computed is the same either way, to the bit: the same kernels, on the same inputs.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from cache.codec.encoded import Codec, Encoded
from eupe.encoders import Features
from eupe.teachers import padded
from pipelines.features.buffers import Buffers, Crossing
from pipelines.features.codec_torch import encode


class Stored(NamedTuple):
    """A batch's features as a store has them; summary float32 [n, D]."""

    patches: Encoded
    summary: np.ndarray


class Streams:
    """The streams of one device and one teacher at a time.

    Args:
        device: that the teacher computes on.
        beside: False: one after the other, on the stream that is current.
    """

    def __init__(self, device: str | torch.device, beside: bool = True) -> None:
        self._device = torch.device(device)
        self._coming = self._going = self._encoder = None
        if beside and self._device.type == "cuda":
            self._coming, self._going = (torch.cuda.Stream(self._device) for _ in range(2))
            self._encoder = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._buffers, self._cross = Buffers(), Crossing()

    def arrive(self, pixels: np.ndarray, compute_batch: int) -> torch.Tensor:
        """Bring pictures to the device, black ones behind them; see `eupe.teachers.padded`.

        The current stream waits for them, the host does not.
        """
        if self._coming is None:
            return padded(pixels, compute_batch).to(self._device)
        host = self._buffers.take((compute_batch, *pixels.shape[1:]), np.uint8)
        host[: len(pixels)], host[len(pixels) :] = pixels, 0
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._coming):
            there = self._cross(torch.from_numpy(host), self._device)
        computing.wait_stream(self._coming)
        there.record_stream(computing)  # its memory is the copies'
        return there

    def encode(self, codec: Codec, features: Features) -> "Future[Stored]":
        """Begin to encode a batch's features, which the current stream computes.

        Args:
            codec: of the store.
            features: of a batch, on the device; nobody may write to them any more.
        """
        if self._encoder is None:
            done: Future[Stored] = Future()
            done.set_result(_stored(codec, features))
            return done
        computed = torch.cuda.current_stream(self._device).record_event()
        return self._encoder.submit(self._encoded, codec, features, computed)

    def _encoded(self, codec: Codec, features: Features, computed: torch.cuda.Event) -> Stored:
        """Encode beside what is computed; all is on the host when it returns."""
        assert self._going is not None
        with torch.cuda.stream(self._going):
            self._going.wait_event(computed)
            for tokens in features:
                tokens.record_stream(self._going)
            return _stored(codec, features)


def _stored(codec: Codec, features: Features) -> Stored:
    encoded = encode(codec, features.patches.flatten(1, 2))
    return Stored(encoded, features.summary.cpu().numpy())
