"""Steps that codecs share on the device: unpacking, turning tokens back, and their packing.

The rotation is (C_m (x) H_2^k) (s * x) (`cache.codec.rotation`). Sylvester's H_2^k is H_a (x) H_b
for any a * b = 2^k, so the whole of it is two small matrix products, L X R with X = x as [m a, b],
L = C_m (x) H_a and R = H_b: 2 (m a + b) operations a channel, about 4 sqrt(D), in two passes over
memory where butterflies need k.

Shapes: T tokens, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cache.codec.grid import GridCodec
from cache.codec.rotation import Rotation, hadamard
from eupe.normalise import Normaliser


class RowDecoder(Protocol):
    """The twin of a codec's `decode`: rows of one store to tokens on a device.

    Attributes:
        apart: the normaliser, where it has not been fused with the codec and is still to be
            applied.
    """

    apart: nn.Module | None

    def __call__(self, stored: np.ndarray, device: torch.device) -> Tensor:
        """Decode [n, *storage_shape], escapes left out, to float32 [n, N, D] on the device."""
        ...


class Butterfly(NamedTuple):
    """The rotation, signs apart, as two factors: left [m a, m a] and right [b, b], symmetric."""

    left: Tensor
    right: Tensor

    @classmethod
    def of(cls, rotation: Rotation) -> "Butterfly":
        """Split the Hadamard factor where the two products cost least."""
        odd = len(rotation.dense)
        sides = [1 << power for power in range(rotation.block.bit_length())]
        outer = min(sides, key=lambda side: odd * side + rotation.block // side)
        left = np.kron(rotation.dense, hadamard(np.eye(outer, dtype=np.float32)))
        right = hadamard(np.eye(rotation.block // outer, dtype=np.float32))
        return cls(torch.from_numpy(left), torch.from_numpy(right))

    def forward(self, signed: Tensor) -> Tensor:
        """Rotate [T, D] that the signs have been applied to."""
        parts = signed.view(len(signed), len(self.left), len(self.right))
        return (torch.matmul(self.left, parts) @ self.right).view_as(signed)

    def inverse(self, rotated: Tensor) -> Tensor:
        """Undo `forward`; the signs are still to be applied."""
        parts = rotated.view(len(rotated), len(self.left), len(self.right))
        return (torch.matmul(self.left.T, parts) @ self.right).view_as(rotated)


@dataclass(frozen=True)
class Turn:
    """What undoes a codec's turn of its standardised tokens, on one device.

    tokens = (inverse rotation of y) @ mix * gain + offset; what a codec or normaliser does not
    have is None.
    """

    butterfly: Butterfly | None
    mix: Tensor | None
    gain: Tensor | None
    offset: Tensor

    @classmethod
    def of(
        cls,
        mean: np.ndarray,
        std: np.ndarray,
        rotation: Rotation | None,
        normaliser: Normaliser | None,
        basis: np.ndarray | None = None,
    ) -> "Turn":
        """Multiply the codec's affine map with the normaliser's, in float64.

        Args:
            mean: that the codec takes off, [D].
            std: that it divides by, [D].
            rotation: that it turns by then; None: by the basis, or not at all.
            normaliser: what the loss wants done; None gives the teacher's features.
            basis: [D, D], a direction a column.
        """
        mean, gain = mean.astype(np.float64), std.astype(np.float64)
        butterfly = None
        if rotation is not None:
            gain = gain * rotation.signs
            butterfly = Butterfly.of(rotation)
        shift, scale, turned = mean, np.ones_like(gain), None
        if normaliser is not None:
            shift = mean - normaliser.mean.double().cpu().numpy()
            scale = normaliser.scale.double().cpu().numpy()
            if normaliser.rotation is not None:
                turned = normaliser.rotation.double().cpu().numpy()
        if turned is None:
            offset = tensor(shift * scale)
            if basis is not None:
                return cls(None, tensor(basis.T * (gain * scale)), None, offset)
            return cls(butterfly, None, tensor(gain * scale), offset)
        # A dense rotation swallows the codec's: one product [T, D] x [D, D] for both.
        mix = gain[:, None] * (turned * scale[:, None]).T
        if rotation is not None:
            unrotate = rotation.inverse(np.eye(len(gain), dtype=np.float32))
            mix = (unrotate * rotation.signs) @ mix
        if basis is not None:
            mix = basis.T.astype(np.float64) @ mix
        return cls(None, tensor(mix), None, tensor((turned @ shift) * scale))

    @classmethod
    def of_grid(cls, codec: GridCodec, normaliser: Normaliser | None) -> "Turn":
        """Make that of a grid codec: by its rotation, or by its basis."""
        transform = codec.transform
        basis = transform.basis if transform.rotation is None else None
        return cls.of(transform.mean, transform.std, transform.rotation, normaliser, basis)

    def to(self, device: torch.device) -> "Turn":
        """Copy to a device."""
        butterfly = self.butterfly and Butterfly(*(part.to(device) for part in self.butterfly))
        mix, gain = (None if part is None else part.to(device) for part in (self.mix, self.gain))
        return Turn(butterfly, mix, gain, self.offset.to(device))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Turn y float32 [T, D], which is used up, into tokens float32 [T, D]."""
        if self.butterfly is not None:
            tokens = self.butterfly.inverse(tokens)
        if self.mix is not None:
            return torch.addmm(self.offset, tokens, self.mix)
        assert self.gain is not None  # one of the two is there
        return torch.addcmul(self.offset, tokens, self.gain, out=tokens)


def unpack(packed: Tensor, bits: Sequence[int], dim: int) -> Tensor:
    """Codes uint8 [T, D] of planes uint8 [T, token_bytes] (layout: `cache.codec.quantised`)."""
    codes, below, start = None, 0, 0
    for width in bits:
        per_byte = 8 // width
        num_bytes = -(-dim // per_byte)
        found = packed[:, start : start + num_bytes]
        if per_byte > 1:
            fields = fields_in_turn if packed.device.type == "cpu" else fields_at_once
            found = fields(found, width)[:, :dim]
        codes = found if codes is None else codes | (found << below)
        below, start = below + width, start + num_bytes
    assert codes is not None
    return codes


def fields_in_turn(plane: Tensor, width: int) -> Tensor:
    """Return the fields of bytes uint8 [T, k], the lowest bits of all first: [T, k 8 / width].

    Of a CPU, which shifts by one number many bytes at once.
    """
    return torch.cat([(plane >> low) & (2**width - 1) for low in range(0, 8, width)], 1)


def fields_at_once(plane: Tensor, width: int) -> Tensor:
    """Return what `fields_in_turn` does in a few kernels: of a GPU, to which each costs a start."""
    low = torch.arange(0, 8, width, dtype=torch.uint8, device=plane.device)
    fields = torch.bitwise_right_shift(plane[:, None], low[:, None])
    return torch.bitwise_and(fields, 2**width - 1).flatten(1)


def pack(codes: Tensor, bits: Sequence[int]) -> Tensor:
    """Undo `unpack`."""
    planes, below = [], 0
    for width in bits:
        per_byte = 8 // width
        num_bytes = -(-codes.shape[1] // per_byte)
        fields = (codes >> below) & (2**width - 1)
        fields = nn.functional.pad(fields, (0, per_byte * num_bytes - codes.shape[1]))
        plane = fields[:, :num_bytes].clone()
        for part in range(1, per_byte):
            plane |= fields[:, part * num_bytes : (part + 1) * num_bytes] << width * part
        planes.append(plane)
        below += width
    return torch.cat(planes, 1)


def directions(codec: GridCodec) -> np.ndarray:
    """Return up to which direction each frequency of a grid codec is kept, int64 [N].

    A rotation wants all of them, or none.
    """
    dim = codec.bits.shape[1]
    width = ((codec.bits > 0) * np.arange(1, dim + 1)).max(axis=1)
    if codec.transform.rotation is not None:
        width = np.where(width > 0, dim, 0)
    return np.asarray(width)


def chunks(num_tokens: int, dim: int, at_once: int) -> list[slice]:
    """Cut tokens, or rows, of `dim` coefficients each into chunks of some `at_once` for a CPU."""
    size = max(1, at_once // dim)
    return [slice(start, start + size) for start in range(0, num_tokens, size)] or [slice(0)]


def divisor(scales: Tensor) -> Tensor:
    """Scales as a column to divide by: 1 where a scale is zero, as the token is then."""
    column = scales.float()[:, None]
    return torch.where(column > 0, column, 1.0)


def tensor(values: np.ndarray) -> Tensor:
    """Return values as float32."""
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
