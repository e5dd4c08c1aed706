"""Codecs on the device: stored bytes to normalised float32 tokens, and tokens to stored bytes.

Equal to the numpy oracles of `cache.codec` to one float16 step. The narrow bytes cross to the
device; there they are unpacked, looked up, rotated back and sent through ONE affine map per
channel, the codec's own and the loss normaliser's multiplied together (docs/design.md, law 9).

The rotation is (C_m (x) H_2^k) (s * x) (`cache.codec.rotation`). Sylvester's H_2^k is H_a (x) H_b
for any a * b = 2^k, so the whole of it is two small matrix products, L X R with X = x as [m a, b],
L = C_m (x) H_a and R = H_b: 2 (m a + b) operations a channel, about 4 sqrt(D), in two passes over
memory where butterflies need k.

Shapes: T tokens, D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cache.codec.encoded import NOT_FINITE, Codec, Encoded, Escapes
from cache.codec.plain import PlainCodec, unfit
from cache.codec.quantised import QuantisedCodec
from cache.codec.rotation import Rotation, hadamard
from eupe.normalise import Normaliser
from pipelines.features.buffers import Crossing

CPU_CHUNK = 1 << 18
"""Coefficients worked on at a time on a CPU, so that intermediate results stay in its caches."""


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
class Dequantiser:
    """Constants that turn unit codes into normalised tokens, on one device.

    tokens = (inverse rotation of (levels[code] * scale)) @ mix * gain + offset; what a codec or
    normaliser does not have is None.
    """

    levels: Tensor
    butterfly: Butterfly | None
    mix: Tensor | None
    gain: Tensor | None
    offset: Tensor

    @classmethod
    def of(cls, codec: QuantisedCodec, normaliser: Normaliser | None) -> "Dequantiser":
        """Multiply the codec's affine map with the normaliser's, in float64."""
        mean, gain = codec.mean.astype(np.float64), codec.std.astype(np.float64)
        levels = np.arange(-128, 128, dtype=np.float32) if codec.levels is None else codec.levels
        butterfly = None
        if codec.rotation is not None:
            gain = gain * codec.rotation.signs
            butterfly = Butterfly.of(codec.rotation)
        if normaliser is None:
            return cls(_tensor(levels), butterfly, None, _tensor(gain), _tensor(mean))
        shift = mean - normaliser.mean.double().cpu().numpy()
        scale = normaliser.scale.double().cpu().numpy()
        if normaliser.rotation is None:
            return cls(
                _tensor(levels), butterfly, None, _tensor(gain * scale), _tensor(shift * scale)
            )
        # A dense rotation swallows the codec's: one product [T, D] x [D, D] for both.
        rotation = normaliser.rotation.double().cpu().numpy()
        mix = gain[:, None] * (rotation * scale[:, None]).T
        if codec.rotation is not None:
            unrotate = codec.rotation.inverse(np.eye(len(gain), dtype=np.float32))
            mix = (unrotate * codec.rotation.signs) @ mix
        offset = (rotation @ shift) * scale
        return cls(_tensor(levels), None, _tensor(mix), None, _tensor(offset))

    def to(self, device: torch.device) -> "Dequantiser":
        """Copy to a device."""
        butterfly = self.butterfly and Butterfly(*(part.to(device) for part in self.butterfly))
        mix, gain = (None if part is None else part.to(device) for part in (self.mix, self.gain))
        return Dequantiser(self.levels.to(device), butterfly, mix, gain, self.offset.to(device))

    def __call__(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Turn codes uint8 [T, D] and scales float32 [T, 1] into tokens float32 [T, D]."""
        tokens = torch.take(self.levels, codes.long()).mul_(scales)
        if self.butterfly is not None:
            tokens = self.butterfly.inverse(tokens)
        if self.mix is not None:
            return torch.addmm(self.offset, tokens, self.mix)
        assert self.gain is not None  # one of the two is there
        return torch.addcmul(self.offset, tokens, self.gain, out=tokens)


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


class PlainRows:
    """The twin of `PlainCodec`."""

    def __init__(self, codec: PlainCodec, normaliser: nn.Module | None) -> None:
        self.apart = normaliser
        self._stored_as = getattr(torch, codec.name)
        self._cross = Crossing()

    def __call__(self, stored: np.ndarray, device: torch.device) -> Tensor:
        """Widen on the device (see `RowDecoder`)."""
        # numpy has no bfloat16 and torch takes no uint16: bits cross as int16.
        bits = stored.view(np.int16) if stored.dtype == np.uint16 else stored
        narrow = self._cross(torch.from_numpy(bits), device)
        return narrow.view(self._stored_as).float()


class QuantisedRows:
    """The twin of `QuantisedCodec`; an `eupe.normalise.Normaliser` is fused with it."""

    def __init__(self, codec: QuantisedCodec, normaliser: nn.Module | None) -> None:
        fused = normaliser if isinstance(normaliser, Normaliser) else None
        self.apart = None if fused is not None else normaliser
        self._codec, self._dequantiser = codec, Dequantiser.of(codec, fused)
        self._on: dict[torch.device, Dequantiser] = {}
        self._cross = Crossing()

    def __call__(self, stored: np.ndarray, device: torch.device) -> Tensor:
        """Unpack, look up and rotate back on the device (see `RowDecoder`)."""
        codec, narrow = self._codec, self._cross(torch.from_numpy(stored), device)
        if device not in self._on:
            self._on[device] = self._dequantiser.to(device)
        dequantise, dim = self._on[device], len(codec.mean)
        num_rows, num_tokens = len(narrow), narrow.shape[-1] // (codec.token_bytes + 2)
        flat, split = narrow.view(num_rows, narrow.shape[-1]), num_tokens * codec.token_bytes
        packed = flat[:, :split].reshape(-1, codec.token_bytes)
        # Copied: of a single row the slice is contiguous as it is, and may begin at an odd byte.
        halves = flat[:, split:].clone(memory_format=torch.contiguous_format)
        scales = halves.view(torch.float16).float().view(-1, 1)
        if device.type != "cpu":
            tokens = dequantise(unpack(packed, codec.how.planes, dim), scales)
            return tokens.view(num_rows, num_tokens, dim)
        tokens = torch.empty(len(packed), dim)
        for part in _chunks(len(packed), dim):
            tokens[part] = dequantise(unpack(packed[part], codec.how.planes, dim), scales[part])
        return tokens.view(num_rows, num_tokens, dim)


class OracleRows:
    """Decodes with the codec itself, on the host: what a codec without a twin gets."""

    def __init__(self, codec: Codec, normaliser: nn.Module | None) -> None:
        self.apart = normaliser
        self._codec, self._cross = codec, Crossing()

    def __call__(self, stored: np.ndarray, device: torch.device) -> Tensor:
        """Decode on the host and copy to the device (see `RowDecoder`)."""
        return self._cross(torch.from_numpy(self._codec.decode(stored)), device)


class Decoder:
    """Decodes the rows of one store and normalises them for the loss.

    Args:
        codec: of the store, fitted.
        normaliser: what the loss wants done to patches [..., D]; None gives the teacher's features.
    """

    def __init__(self, codec: Codec, normaliser: nn.Module | None = None) -> None:
        self._normaliser = normaliser
        self._rows: RowDecoder = twin(codec).decoder(codec, normaliser)

    def __call__(
        self,
        stored: np.ndarray,
        escapes: Escapes | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Decode rows as `cache.reader` gives them.

        Args:
            stored: [n, *storage_shape] in storage dtype, writable.
            escapes: of those rows; only a codec that has escapes has them.
            device: to decode on; pinned memory crosses without waiting.

        Returns:
            patches, normalised, float32 [n, N, D] on the device; what rows that are not valid hold
            does not matter.
        """
        device = torch.device(device)
        with torch.no_grad():
            patches = self._rows(stored, device)
            if self._rows.apart is not None:
                patches = self._rows.apart.to(device)(patches)
            if escapes is not None and len(escapes.row):
                values = torch.from_numpy(escapes.values).to(device)
                if self._normaliser is not None:
                    values = self._normaliser.to(device)(values)
                row, token = (
                    torch.from_numpy(place.astype(np.int64)).to(device)
                    for place in (escapes.row, escapes.token)
                )
                patches[row, token] = values
        return patches


def encode(codec: Codec, patches: Tensor) -> Encoded:
    """Encode patches on the device they are on; what comes to the host is what is stored.

    Args:
        codec: of the store, fitted.
        patches: float32 [n, N, D].

    Returns:
        as `Codec.encode`: codes may differ from the oracle's where a coefficient lies within
        rounding of the edge between two.
    """
    return twin(codec).encode(codec, patches)


def _encode_quantised(codec: QuantisedCodec, patches: Tensor) -> Encoded:
    num_rows, num_tokens, dim = patches.shape
    shape = (num_rows, *codec.storage_shape(num_tokens, dim))
    tokens = patches.reshape(-1, dim)
    quantise = _Quantiser(codec, patches.device)
    whole = [slice(None)] if patches.device.type != "cpu" else _chunks(len(tokens), dim)
    parts = [quantise(tokens[part]) for part in whole]
    packed, scales, good = (torch.cat(column) for column in zip(*parts, strict=True))
    finite = torch.isfinite(patches).all(-1).all(-1)
    bad = ~good & finite.repeat_interleave(num_tokens)
    packed[bad], scales[bad] = 0, 0
    places = torch.nonzero(bad).view(-1)
    row, token = np.divmod(places.cpu().numpy(), num_tokens)
    codes = packed.view(num_rows, num_tokens * codec.token_bytes)
    data = torch.cat([codes, scales.view(num_rows, num_tokens).view(torch.uint8)], 1)
    valid = finite.cpu().numpy()
    return Encoded(
        data.cpu().numpy().reshape(shape),
        valid,
        [None if fine else NOT_FINITE for fine in valid.tolist()],
        Escapes(row, token.astype(np.int32), tokens[places].cpu().numpy()),
    )


class _Quantiser:
    """What `QuantisedCodec` does to tokens, on one device."""

    def __init__(self, codec: QuantisedCodec, device: torch.device) -> None:
        self._codec, self._allowed = codec, codec.how.worst_error**2
        self._back = Dequantiser.of(codec, None).to(device)
        self._mean, self._std = (_tensor(part).to(device) for part in (codec.mean, codec.std))
        if codec.rotation is not None and codec.levels is not None:
            self._signs = _tensor(codec.rotation.signs).to(device)
            self._edges = _tensor((codec.levels[1:] + codec.levels[:-1]) / 2).to(device)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode [T, D]: packed codes, scales float16 [T], and whether the bound holds [T]."""
        z = (tokens - self._mean) / self._std
        if self._back.butterfly is None:
            scales = (z.abs().amax(1) / 127).half()
            codes = torch.round(z / _divisor(scales)).clip(-127, 127).nan_to_num()
            codes = (codes + 128).to(torch.uint8)
        else:
            z = self._back.butterfly.forward(z * self._signs)
            rms = z.double().square().mean(1).sqrt()
            codes = torch.bucketize(z / _divisor(rms), self._edges, out_int32=True)
            taken = torch.take(self._back.levels, codes.long())
            codes = codes.to(torch.uint8)
            # The scale that serves these codes best, in the least-squares sense.
            scales = ((z * taken).sum(1) / (taken * taken).sum(1)).half()
        error = self._back(codes, scales.float()[:, None]) - tokens
        squared, size = (each.double().square().sum(1) for each in (error, tokens))
        good = squared <= self._allowed * size  # not finite is not good
        return pack(codes, self._codec.how.planes), scales, good


def _encode_plain(codec: PlainCodec, patches: Tensor) -> Encoded:
    finite = torch.isfinite(patches).all(-1).all(-1)
    if codec.name == "uint8":
        rounded = patches.round()
        inside = (rounded >= 0) & (rounded <= 255)
        narrow = torch.where(inside, rounded, 0).to(torch.uint8)
        kept = inside.all(-1).all(-1)
    else:
        narrow = patches.to(getattr(torch, codec.name))
        kept = torch.isfinite(narrow).all(-1).all(-1)
    largest = patches.abs().amax((1, 2))
    reasons: list[str | None] = [None] * len(patches)
    for row in torch.nonzero(~(finite & kept)).view(-1).tolist():
        reasons[row] = unfit(codec.name, bool(finite[row]), float(largest[row]))
    bits = narrow.view(torch.int16) if codec.name == "bfloat16" else narrow
    data = bits.cpu().numpy().view(codec.storage_dtype)
    valid = (finite & kept).cpu().numpy()
    return Encoded(data, valid, reasons, Escapes.none(patches.shape[-1]))


def _encode_by_oracle(codec: Codec, patches: Tensor) -> Encoded:
    return codec.encode(patches.cpu().numpy())


class Twin(NamedTuple):
    """A codec in torch.

    Attributes:
        decoder: (codec, normaliser) -> `RowDecoder`.
        encode: (codec, patches float32 [n, N, D]) -> `Encoded`.
    """

    decoder: Callable[[Any, nn.Module | None], RowDecoder]
    encode: Callable[[Any, Tensor], Encoded]


TWINS: dict[type, Twin] = {
    PlainCodec: Twin(PlainRows, _encode_plain),
    QuantisedCodec: Twin(QuantisedRows, _encode_quantised),
}
"""Class of codec -> its twin."""


def twin(codec: Codec) -> Twin:
    """Return a codec's twin; the oracle itself, slower and on the host, where it has none."""
    return TWINS.get(type(codec), Twin(OracleRows, _encode_by_oracle))


def unpack(packed: Tensor, bits: Sequence[int], dim: int) -> Tensor:
    """Codes uint8 [T, D] of planes uint8 [T, token_bytes] (layout: `cache.codec.quantised`)."""
    codes, below, start = None, 0, 0
    for width in bits:
        per_byte = 8 // width
        num_bytes = -(-dim // per_byte)
        plane, mask = packed[:, start : start + num_bytes], 2**width - 1
        fields = [(plane >> width * part) & mask for part in range(per_byte)]
        found = torch.cat(fields, 1)[:, :dim] if per_byte > 1 else plane
        codes = found if codes is None else codes | (found << below)
        below, start = below + width, start + num_bytes
    assert codes is not None
    return codes


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


def _chunks(num_tokens: int, dim: int) -> list[slice]:
    size = max(1, CPU_CHUNK // dim)
    return [slice(start, start + size) for start in range(0, num_tokens, size)] or [slice(0)]


def _divisor(scales: Tensor) -> Tensor:
    """Scales as a column to divide by: 1 where a scale is zero, as the token is then."""
    column = scales.float()[:, None]
    return torch.where(column > 0, column, 1.0)


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))
