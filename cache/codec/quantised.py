"""Lossy codecs: int8 per channel, and rot4, rot3, rot2 on rotated tokens (docs/design.md, law 10).

Both standardise each channel by fitted moments and keep one float16 scale a token:

    int8   z = (x - mean) / std                     code = round(z / scale), scale = max |z| / 127
    rotB   z = rotation((x - mean) / std)           code = nearest Lloyd-Max level of z / scale

rotB is what "TurboQuant" (arXiv:2504.19874) also does: rotate, keep one scale a token, round to the
Lloyd-Max levels of a Gaussian. The scale by least squares and the escapes (below) are ours.

A row [N, D] is stored as uint8 [1, N * (token_bytes + 2)]: the packed codes of its N tokens, then
their N scales, float16 little endian. Codes of a token are packed in planes: with k codes a byte,
byte j of a plane holds codes j, j + P, j + 2 P, ... from its low bits up, P = ceil(D / k). rot3 has
a plane of low bit pairs and a plane of high bits.

A token whose relative error |x' - x| / |x| would exceed the codec's bound is an escape: its float32
values are kept beside the codes, so the bound holds for every token of finite features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import NOT_FINITE, Arrays, Encoded, Escapes, Fitting, Floats, Kind, Moments
from cache.codec.rotation import Rotation
from eupe.errors import BadInput

Codes = npt.NDArray[np.uint8]

FIT = "standardise"
"""The fit rule: mean and standard deviation of each channel from the store's moments."""


class Quantisation(NamedTuple):
    """What sets the quantised codecs apart.

    Attributes:
        planes: bits of each plane of codes, lowest first.
        worst_error: bound of a token's relative error; its cosine is at least sqrt(1 - bound^2).
            About twice the error of Gaussian features, so escapes are the exception.
        mean_cosine: documented; a build whose sample falls below it is refused.
        rotated: True if tokens are rotated before they are rounded.
    """

    planes: tuple[int, ...]
    worst_error: float
    mean_cosine: float
    rotated: bool = True

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return sum(self.planes)


QUANTISATIONS = {
    "int8": Quantisation((8,), 0.12, 0.997, rotated=False),  # worst cosine 0.993
    "rot4": Quantisation((4,), 0.25, 0.994),  # 0.968
    "rot3": Quantisation((2, 1), 0.40, 0.98),  # 0.917
    "rot2": Quantisation((2,), 0.65, 0.93),  # 0.760
}

SMALLEST_STD = 1e-6  # of the widest channel's: below it a channel is dead in the sample
CHUNK_TOKENS = 1 << 14  # encoded at a time: 50 MB of float32 at D = 768


@dataclass(frozen=True, eq=False)
class QuantisedCodec:
    """A lossy codec fitted to the moments of one store.

    Attributes:
        name: int8, rot4, rot3 or rot2.
        mean: float32 [D].
        std: float32 [D], above zero.
        how: planes, bounds, and whether it rotates.
        levels: float32 [2^bits] of a rotated codec, rising; None for int8.
        rotation: of a rotated codec; None for int8.
    """

    name: str
    mean: Floats
    std: Floats
    how: Quantisation = field(init=False)
    levels: Floats | None = field(init=False)
    rotation: Rotation | None = field(init=False)

    def __post_init__(self) -> None:
        how = QUANTISATIONS[self.name]
        object.__setattr__(self, "how", how)
        object.__setattr__(self, "levels", lloyd_max(how.bits) if how.rotated else None)
        object.__setattr__(self, "rotation", Rotation(len(self.mean)) if how.rotated else None)

    @classmethod
    def fitted(cls, name: str, moments: Moments) -> "QuantisedCodec":
        """Fit mean and standard deviation of each channel, as `standard` has them."""
        return cls(name, *standard(name, moments))

    @classmethod
    def from_json_dict(cls, said: Mapping[str, Any], _: Arrays) -> "QuantisedCodec":
        """Undo `to_json_dict`: the same codec, to the last bit."""
        mean, std = (np.array(said[name], np.float32) for name in ("mean", "std"))
        return cls(said["name"], mean, std)

    @property
    def storage_dtype(self) -> np.dtype[np.generic]:
        """Codes and scales are bytes."""
        return np.dtype(np.uint8)

    @property
    def fill_value(self) -> int:
        """Absent rows read as zero bytes."""
        return 0

    @property
    def has_escapes(self) -> bool:
        """True: a token that would exceed the bound is kept as it is."""
        return True

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's packed codes."""
        return packed_bytes(len(self.mean), self.how.planes)

    def storage_shape(self, num_tokens: int, dim: int) -> tuple[int, int]:
        """Return (1, bytes of a row)."""
        if dim != len(self.mean):
            raise ValueError(f"codec {self.name}: fitted to {len(self.mean)} channels, not {dim}")
        return 1, num_tokens * (self.token_bytes + 2)

    def encode(self, patches: Floats) -> Encoded:
        """Encode float32 [n, N, D]; rows that are not finite are invalid, with the reason."""
        num_rows, num_tokens, dim = patches.shape
        shape = (num_rows, *self.storage_shape(num_tokens, dim))
        tokens = np.ascontiguousarray(patches, np.float32).reshape(-1, dim)
        codes = np.zeros((len(tokens), self.token_bytes), np.uint8)
        scales = np.zeros(len(tokens), "<f2")
        bad = np.zeros(len(tokens), bool)
        finite = np.asarray(np.isfinite(patches).all(axis=(1, 2)))
        for start in range(0, len(tokens), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            codes[part], scales[part], bad[part] = self._encode_tokens(tokens[part])
        bad &= np.repeat(finite, num_tokens)
        places = np.flatnonzero(bad)
        codes[places], scales[places] = 0, 0
        row, token = np.divmod(places, num_tokens)
        escapes = Escapes(row, token.astype(np.int32), tokens[places])
        data = np.concatenate(
            [
                codes.reshape(num_rows, num_tokens * self.token_bytes),
                scales.reshape(num_rows, num_tokens).view(np.uint8),
            ],
            axis=1,
        )
        reasons = [None if fine else NOT_FINITE for fine in finite.tolist()]
        return Encoded(data.reshape(shape), finite, reasons, escapes)

    def decode(self, data: npt.NDArray[np.generic], escapes: Escapes | None = None) -> Floats:
        """Decode uint8 [n, 1, bytes of a row], with the escapes of those rows, to [n, N, D]."""
        num_rows, dim = len(data), len(self.mean)
        flat = data.reshape(num_rows, data.shape[-1]).view(np.uint8)
        num_tokens = data.shape[-1] // (self.token_bytes + 2)
        split = num_tokens * self.token_bytes
        codes = flat[:, :split].reshape(-1, self.token_bytes)
        scales = np.ascontiguousarray(flat[:, split:]).view("<f2").reshape(-1)
        out = self._decode_tokens(codes, scales).reshape(num_rows, num_tokens, dim)
        if escapes is not None:
            out[escapes.row, escapes.token] = escapes.values
        return out

    def to_json_dict(self) -> dict[str, object]:
        """Everything a decoder needs that docs/store_format.md does not say."""
        said: dict[str, object] = {
            "name": self.name,
            "bits": self.how.bits,
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
        }
        if self.rotation is not None and self.levels is not None:
            said["levels"] = [float(level) for level in self.levels]
            said["rotation"] = self.rotation.to_json_dict()
        return said

    def arrays(self) -> Arrays:
        """None: JSON holds what is fitted."""
        return {}

    def _encode_tokens(
        self, tokens: Floats
    ) -> tuple[Codes, npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Encode [k, D]: packed codes, scales, and which tokens the bound does not hold for."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            z = (tokens - self.mean) / self.std
            if self.levels is None or self.rotation is None:
                scales = (np.abs(z).max(axis=1) / 127).astype(np.float16)
                codes = np.rint(z / _divisor(scales)).clip(-127, 127)
                codes = (np.nan_to_num(codes) + 128).astype(np.uint8)
            else:
                z = self.rotation.forward(z)
                rms = np.sqrt(np.mean(np.square(z), axis=1, dtype=np.float64))
                edges = (self.levels[1:] + self.levels[:-1]) / 2
                unit = z / _divisor(rms.astype(np.float32))
                codes = np.searchsorted(edges, unit).astype(np.uint8)
                # The scale that serves these codes best, in the least-squares sense.
                taken = self.levels[codes]
                best = np.sum(z * taken, axis=1) / np.sum(taken * taken, axis=1)
                scales = best.astype(np.float16)
            packed = pack(codes, self.how.planes)
            error = self._decode_tokens(packed, scales) - tokens
            squared = np.sum(np.square(error, dtype=np.float64), axis=1)
            allowed = np.sum(np.square(tokens, dtype=np.float64), axis=1)
            good = squared <= self.how.worst_error**2 * allowed
        return packed, scales, ~good  # not good, so that NaN is bad

    def _decode_tokens(self, packed: Codes, scales: npt.NDArray[np.float16]) -> Floats:
        codes = unpack(packed, self.how.planes, len(self.mean))
        scale = scales.astype(np.float32)[:, None]
        if self.levels is None or self.rotation is None:
            z = (codes.astype(np.float32) - 128) * scale
        else:
            z = self.rotation.inverse(self.levels[codes] * scale)
        return z * self.std + self.mean


def standard(name: str, moments: Moments) -> tuple[Floats, Floats]:
    """Return mean and standard deviation of each channel that a codec is fitted with, [D] both.

    A channel that is dead in the sample may fire in other images, and gets the root mean square
    of all widths. Rotated codecs spread their error over the channels by width: with a far
    smaller one, a token in which the channel fires has to escape; with the widest, that the
    z-score takes, every other token has to. With this one a token's relative error stays what
    it is, whether the channel fires or not and however strongly.

    Raises:
        BadInput: fewer than two tokens were measured.
    """
    count, mean, scatter = moments
    if count < 2:
        raise BadInput(f"codec {name}: fitted to {count} tokens, wants at least 2")
    variance = np.diagonal(scatter) / count
    std = np.sqrt(variance)
    of_dead = float(np.sqrt(variance.mean())) or 1.0
    std = np.where(std < SMALLEST_STD * (std.max() or 1.0), of_dead, std)
    std = np.maximum(std, np.finfo(np.float32).tiny)
    return mean.astype(np.float32), std.astype(np.float32)


def _fitted(name: str, fitting: Fitting) -> QuantisedCodec:
    assert fitting.moments is not None  # `known.make_codec` asks for them
    return QuantisedCodec.fitted(name, fitting.moments)


KINDS = {
    name: Kind(
        how.bits, partial(_fitted, name), QuantisedCodec.from_json_dict, FIT, how.mean_cosine
    )
    for name, how in QUANTISATIONS.items()
}


def pack(codes: Codes, bits: Sequence[int]) -> Codes:
    """Pack codes [k, D] into planes [k, token_bytes] of so many bits each, lowest first."""
    planes, below = [], 0
    for width in bits:
        per_byte = 8 // width
        num_bytes = -(-codes.shape[1] // per_byte)
        field_codes = np.zeros((len(codes), per_byte * num_bytes), np.uint8)
        field_codes[:, : codes.shape[1]] = (codes >> np.uint8(below)) & np.uint8(2**width - 1)
        plane = np.zeros((len(codes), num_bytes), np.uint8)
        for part in range(per_byte):
            chunk = field_codes[:, part * num_bytes : (part + 1) * num_bytes]
            plane |= chunk << np.uint8(width * part)
        planes.append(plane)
        below += width
    return np.concatenate(planes, axis=1)


def packed_bytes(count: int, bits: Sequence[int]) -> int:
    """Return the bytes that so many codes take, packed in planes of so many bits."""
    return sum(-(-count * width // 8) for width in bits)


def unpack(packed: Codes, bits: Sequence[int], dim: int) -> Codes:
    """Undo `pack`: codes [k, D]."""
    codes = np.zeros((len(packed), dim), np.uint8)
    below, start = 0, 0
    for width in bits:
        per_byte = 8 // width
        num_bytes = -(-dim // per_byte)
        plane = packed[:, start : start + num_bytes]
        mask = np.uint8(2**width - 1)
        parts = [(plane >> np.uint8(width * part)) & mask for part in range(per_byte)]
        codes |= np.concatenate(parts, axis=1)[:, :dim] << np.uint8(below)
        below, start = below + width, start + num_bytes
    return codes


@cache
def lloyd_max(bits: int) -> Floats:
    """Return the 2^bits levels that quantise a unit Gaussian with least squared error, rising.

    Lloyd's iteration on the exact density (Max 1960, Lloyd 1982): each level is the mean of its
    cell, each cell ends half way between levels.
    """
    levels = np.linspace(-2.0, 2.0, 2**bits)
    for _ in range(20_000):
        edges = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
        density = np.exp(-0.5 * edges**2) / math.sqrt(2 * math.pi)
        mass = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
        new = -np.diff(density) / np.diff(mass)
        new = (new - new[::-1]) / 2  # symmetric to the last bit
        if np.abs(new - levels).max() < 1e-13:
            break
        levels = new
    return levels.astype(np.float32)


def _divisor(scales: npt.NDArray[np.floating]) -> Floats:
    """Scales as a column to divide by: 1 where a scale is zero, as the token is then."""
    column = scales.astype(np.float32)[:, None]
    return np.where(column > 0, column, np.float32(1))
