"""Codecs on the device: stored bytes to normalised float32 tokens, and tokens to stored bytes.

Equal to the numpy oracles of `cache.codec` to one float16 step. The narrow bytes cross to the
device; there they are unpacked, looked up, rotated back and sent through ONE affine map per
channel, the codec's own and the loss normaliser's multiplied together (docs/design.md, law 9).

Shapes: T tokens, D channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cache.codec.encoded import NOT_FINITE, Codec, Encoded, Escapes
from cache.codec.grid import GridCodec
from cache.codec.nothing import NothingCodec, encoded
from cache.codec.plain import PlainCodec, unfit
from cache.codec.quantised import QuantisedCodec
from eupe.normalise import Normaliser
from pipelines.features import fused
from pipelines.features.buffers import Crossing, to_host
from pipelines.features.codec_steps import RowDecoder, Turn, chunks, divisor, pack, tensor, unpack
from pipelines.features.fused import Lookup
from pipelines.features.grid_torch import GridRows, encode_grid

CPU_CHUNK = 1 << 18
"""Coefficients of tokens worked on at a time on a CPU, so that intermediate results stay in its
caches."""


@dataclass(frozen=True)
class Dequantiser:
    """Constants that turn unit codes into normalised tokens, on one device."""

    levels: Tensor
    turn: Turn

    @classmethod
    def of(cls, codec: QuantisedCodec, normaliser: Normaliser | None) -> "Dequantiser":
        """Make them of a codec and of what the loss wants done."""
        levels = np.arange(-128, 128, dtype=np.float32) if codec.levels is None else codec.levels
        return cls(tensor(levels), Turn.of(codec.mean, codec.std, codec.rotation, normaliser))

    def to(self, device: torch.device) -> "Dequantiser":
        """Copy to a device."""
        return Dequantiser(self.levels.to(device), self.turn.to(device))

    def __call__(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Turn codes uint8 [T, D] and scales float32 [T, 1] into tokens float32 [T, D]."""
        return self.turn(torch.take(self.levels, codes.long()).mul_(scales))


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
        own = normaliser if isinstance(normaliser, Normaliser) else None
        self.apart = None if own is not None else normaliser
        self._codec, self._dequantiser = codec, Dequantiser.of(codec, own)
        self._on: dict[torch.device, tuple[Dequantiser, Lookup | None]] = {}
        self._cross = Crossing()

    def __call__(self, stored: np.ndarray, device: torch.device) -> Tensor:
        """Unpack, look up and rotate back on the device (see `RowDecoder`)."""
        codec, narrow = self._codec, self._cross(torch.from_numpy(stored), device)
        if device not in self._on:
            look_up = Lookup.of_tokens(codec, device) if fused.usable(device) else None
            self._on[device] = self._dequantiser.to(device), look_up
        (dequantise, look_up), dim = self._on[device], len(codec.mean)
        num_rows, num_tokens = len(narrow), narrow.shape[-1] // (codec.token_bytes + 2)
        flat, split = narrow.view(num_rows, narrow.shape[-1]), num_tokens * codec.token_bytes
        # Copied: of a single row the slice is contiguous as it is, and may begin at an odd byte.
        halves = flat[:, split:].clone(memory_format=torch.contiguous_format)
        scales = halves.view(torch.float16).float()
        if look_up is not None:
            units = look_up(flat, (num_tokens, dim), scales)
            return dequantise.turn(units.view(-1, dim)).view_as(units)
        packed, scales = flat[:, :split].reshape(-1, codec.token_bytes), scales.view(-1, 1)
        if device.type != "cpu":
            tokens = dequantise(unpack(packed, codec.how.planes, dim), scales)
            return tokens.view(num_rows, num_tokens, dim)
        tokens = torch.empty(len(packed), dim)
        for part in chunks(len(packed), dim, CPU_CHUNK):
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
                values = torch.from_numpy(escapes.values).to(device, non_blocking=True)
                if self._normaliser is not None:
                    values = self._normaliser.to(device)(values)
                row, token = (
                    torch.from_numpy(place.astype(np.int64)).to(device, non_blocking=True)
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
    quantise = _quantiser(codec, patches.device)
    whole = [slice(None)] if patches.device.type != "cpu" else chunks(len(tokens), dim, CPU_CHUNK)
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
        to_host(data).reshape(shape),
        valid,
        [None if fine else NOT_FINITE for fine in valid.tolist()],
        Escapes(row, token.astype(np.int32), tokens[places].cpu().numpy()),
    )


@lru_cache(maxsize=8)
def _quantiser(codec: QuantisedCodec, device: torch.device) -> "_Quantiser":
    return _Quantiser(codec, device)


class _Quantiser:
    """What `QuantisedCodec` does to tokens, on one device."""

    def __init__(self, codec: QuantisedCodec, device: torch.device) -> None:
        self._codec, self._allowed = codec, codec.how.worst_error**2
        self._back = Dequantiser.of(codec, None).to(device)
        self._mean, self._std = (tensor(part).to(device) for part in (codec.mean, codec.std))
        if codec.rotation is not None and codec.levels is not None:
            self._signs = tensor(codec.rotation.signs).to(device)
            self._edges = tensor((codec.levels[1:] + codec.levels[:-1]) / 2).to(device)

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encode [T, D]: packed codes, scales float16 [T], and whether the bound holds [T]."""
        z = (tokens - self._mean) / self._std
        if self._back.turn.butterfly is None:
            scales = (z.abs().amax(1) / 127).half()
            codes = torch.round(z / divisor(scales)).clip(-127, 127).nan_to_num()
            codes = (codes + 128).to(torch.uint8)
        else:
            z = self._back.turn.butterfly.forward(z * self._signs)
            rms = z.double().square().mean(1).sqrt()
            codes = torch.bucketize(z / divisor(rms), self._edges, out_int32=True)
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
    data = to_host(bits).view(codec.storage_dtype)
    valid = (finite & kept).cpu().numpy()
    return Encoded(data, valid, reasons, Escapes.none(patches.shape[-1]))


def _encode_nothing(codec: NothingCodec, patches: Tensor) -> Encoded:
    return encoded(torch.isfinite(patches).all(-1).all(-1).cpu().numpy(), patches.shape[-1])


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
    GridCodec: Twin(GridRows, encode_grid),
    NothingCodec: Twin(OracleRows, _encode_nothing),
}
"""Class of codec -> its twin."""


def twin(codec: Codec) -> Twin:
    """Return a codec's twin; the oracle itself, slower and on the host, where it has none."""
    return TWINS.get(type(codec), Twin(OracleRows, _encode_by_oracle))
