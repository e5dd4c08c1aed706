"""Teachers: a frozen encoder with its weights and compute dtype, as its features' spec says."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Real
from torch import Tensor, nn

from eupe.costs import cost
from eupe.encoders import Encoder, Features
from eupe.replayed import Replayed
from eupe.spec import Dtype, EncoderSpec, TeacherSpec
from eupe.weights import load_state_dict, state_digest

LITTLE_WORK = 1e12
"""Operations of a batch, some 2 ms of a GPU: with fewer, starting the kernels takes longer."""
Arrive = Callable[[np.ndarray, int], Tensor]
"""(pictures uint8 [n, R, R, 3] on the host, compute batch) -> `padded` of them, on a device."""


class Teacher(nn.Module):
    """A frozen encoder in evaluation mode: uint8 pixels in, float32 features out.

    Weights and activations are in `spec.dtype`.

    Args:
        spec: who the teacher is, weights digest included.
        encoder: its encoder, already holding those weights; taken over and frozen.

    Attributes:
        replays: batches of little work are played as CUDA graphs (`eupe.replayed`).
    """

    def __init__(self, spec: TeacherSpec, encoder: Encoder):
        super().__init__()
        self.spec = spec
        self.encoder = encoder.requires_grad_(False)
        self.replays = True
        self._played: dict[torch.Size, Callable[[Tensor], Features]] = {}
        # The pixel constants stay float32. Channels last: a third less work for a CNN on a CPU.
        encoder.network.to(getattr(torch, spec.dtype)).to(memory_format=torch.channels_last)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode, whatever the model around this teacher does."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for a backward pass
    def forward(self, pixels: Real[Tensor, "b 3 r r"]) -> Features:
        """Return the teacher's features, not normalised.

        Args:
            pixels: uint8, or float in [0, 255], [B, 3, R, R], RGB.

        Returns:
            summary [B, D] and patches [B, H, W, D2], float32.
        """
        summary, patches = self.encoder(pixels)
        return Features(summary.float(), patches.float())

    def features(
        self, pixels: np.ndarray, compute_batch: int, arrive: Arrive | None = None
    ) -> Features:
        """Run over pictures in batches of one fixed size, the last one padded with black.

        Kernels may round differently by batch size; with one size a picture's features do not
        depend on how many others are asked for (docs/design.md, law 1). Stores are filled by this
        method, and a live run compares with it.

        Args:
            pixels: uint8 [n, R, R, 3], n at least 1, on the host.
            compute_batch: pictures a forward pass.
            arrive: brings a batch to the teacher's device; None: `padded`, then a copy.

        Returns:
            Features, float32 on the teacher's device: summary [n, D], patches [n, H, W, D].
        """
        return features_together([self], pixels, compute_batch, arrive)[0]

    def share(self, other: "Teacher") -> bool:
        """Take another teacher's network for one's own, if it holds all of one's own tensors.

        Args:
            other: of the same architecture, arguments, mean, std and dtype, on the same device.

        Returns:
            True if both read one network now.
        """
        theirs = other.encoder.network.state_dict()
        own = self.encoder.network.state_dict()
        if not all(name in theirs and torch.equal(own[name], theirs[name]) for name in own):
            return False
        self.encoder.network = other.encoder.network
        self._played.clear()  # what was recorded reads the weights that are let go
        return True

    def _computed(self, x: Tensor) -> Features:
        if not self.replays or x.device.type != "cuda":
            found: Features = self(x)
            return found
        shape = x.shape
        if shape not in self._played:
            work = 2 * shape[0] * cost(self.spec.encoder, shape[-1]).multiply_adds
            self._played[shape] = Replayed(self) if work < LITTLE_WORK else self
        done: Features = self._played[shape](x)
        return done

    @property
    def replayed(self) -> bool:
        """True if a batch was recorded, and is played from then on."""
        return any(isinstance(each, Replayed) and each.recorded for each in self._played.values())

    def _arrive(self, pixels: np.ndarray, compute_batch: int) -> Tensor:
        # An encoder of plain pixels has no weights.
        return padded(pixels, compute_batch).to(self.encoder.pixel_scale.device, non_blocking=True)


def features_together(
    teachers: Sequence[Teacher],
    pixels: np.ndarray,
    compute_batch: int,
    arrive: Arrive | None = None,
) -> list[Features]:
    """Return what `Teacher.features` of each of some teachers gives, by one forward of a network.

    Args:
        teachers: of one network (`Teacher.share`), mean, std and dtype.
        pixels: uint8 [n, R, R, 3], n at least 1, on the host.
        compute_batch: pictures a forward pass.
        arrive: brings a batch to the teachers' device, as of `Teacher.features`.
    """
    first = teachers[0].encoder
    parts: list[list[Features]] = [[] for _ in teachers]
    for start in range(0, len(pixels), compute_batch):
        chunk = pixels[start : start + compute_batch]
        x = (arrive or teachers[0]._arrive)(chunk, compute_batch)
        x = x.permute(0, 3, 1, 2).contiguous()
        if len(teachers) == 1:
            found = [teachers[0]._computed(x)]
        else:
            with torch.no_grad():
                found = first.several(x, [teacher.encoder for teacher in teachers])
        for own, (summary, patches) in zip(parts, found, strict=True):
            own.append(Features(summary[: len(chunk)].float(), patches[: len(chunk)].float()))
    return [Features(*(torch.cat(each) for each in zip(*own, strict=True))) for own in parts]


def padded(pixels: np.ndarray, compute_batch: int) -> Tensor:
    """Return pictures uint8 [n, R, R, 3] with black ones behind them: [compute_batch, R, R, 3]."""
    batch = np.zeros((compute_batch, *pixels.shape[1:]), np.uint8)
    batch[: len(pixels)] = pixels
    return torch.from_numpy(batch)


def load_teacher(
    name: str,
    encoder: EncoderSpec,
    weights: str,
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
) -> Teacher:
    """Load a teacher and work out its spec, with the digest of the weights as they were stored.

    Args:
        name: of the teacher, part of its identity.
        encoder: network, preprocessing, summary and layer.
        weights: URI, see eupe.weights.
        dtype: of its computation.
        device: to compute on.

    Raises:
        BadInput: weights that are absent, unreadable or of another architecture.
    """
    state = load_state_dict(weights, encoder)
    network = Encoder(encoder)
    network.network.load_state_dict(state)
    spec = TeacherSpec(name=name, encoder=encoder, weights=state_digest(state), dtype=dtype)
    return Teacher(spec, network).to(device)
