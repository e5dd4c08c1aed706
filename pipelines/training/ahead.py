"""Micro-batches on the device, the next one brought there while this one is worked on.

Its bytes cross and its targets are decoded on a stream of their own, which begins once the device
is done with this one's gradients: so both fill the time in which the host looks at the gradient
and starts the next step, and the memory of this one's targets is theirs to use. A CPU has no
streams and does the same in the same order; what is computed does not depend on it.
"""

from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.features.buffers import Crossing
from pipelines.features.sources import Targets
from pipelines.training.batches import Batch


@dataclass(frozen=True)
class Arrived:
    """A micro-batch on the device, or on its way there.

    Attributes:
        batch: as it was made.
    """

    batch: Batch
    _pixels: Tensor
    _valid: Tensor
    _targets: dict[str, Targets]
    _seen: torch.cuda.Event | None
    _decoded: torch.cuda.Event | None

    def pixels(self) -> Tensor:
        """Return the student's input; the current stream waits for it, the host does not."""
        _wait(self._seen)
        return self._pixels

    def targets(self) -> tuple[dict[str, Targets], Tensor]:
        """Return teacher -> normalised tokens, and which rows are valid; as `pixels`."""
        _wait(self._decoded)
        return self._targets, self._valid


class Ahead:
    """Brings micro-batches to one device.

    Args:
        device: that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cross = device, Crossing()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: Arrived | None = None

    def take(self, batch: Batch) -> Arrived:
        """Return a micro-batch on the device: the one that was sent, or sent now."""
        sent, self._sent = self._sent, None
        if sent is not None and sent.batch.pixels is batch.pixels:
            return sent
        return self._bring(batch)

    def send(self, coming: "Future[Batch] | None") -> None:
        """Send the next micro-batch, if it is made; call once nothing refers to this one's.

        What failed in its making is raised where the batch is asked for.
        """
        self._sent = None
        made = coming is not None and coming.done() and not coming.cancelled()
        if coming is not None and made and coming.exception() is None:
            self._sent = self._bring(coming.result())

    def _bring(self, batch: Batch) -> Arrived:
        if self._stream is not None:
            # Its memory may be what kernels under way still read: it is written to after them.
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            pixels = self._cross(batch.pixels, self._device)
            seen = self._mark()
            valid = self._cross(torch.from_numpy(batch.valid), self._device)
            targets = batch.targets(self._device)
            return Arrived(batch, pixels, valid, targets, seen, self._mark())

    def _mark(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()


def _wait(event: torch.cuda.Event | None) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
