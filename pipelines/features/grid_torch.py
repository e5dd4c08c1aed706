"""The grid codecs on the device: rows of stored bytes to normalised tokens, and back.

Frequencies of one picture keep very different numbers of directions: the mean of the grid most of
them, the highest frequencies a few or none. So the product with the basis is taken before the
cosine transform over the grid is undone, for frequencies that keep about as many directions
together, and only over those that are kept: at 1 bit some half of [N, D] x [D, D]. The loss
normaliser is multiplied into the basis; what is constant over the grid is added to its mean
frequency alone.

Shapes: n rows, N = H W tokens or frequencies, D channels.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cache.codec.encoded import NOT_FINITE, Encoded, Escapes
from cache.codec.grid import FAR, PLANES, WIDER, GridCodec, Packed
from cache.codec.rotation import cosine_transform
from eupe.normalise import Normaliser
from pipelines.features import fused
from pipelines.features.buffers import Crossing, to_host
from pipelines.features.codec_steps import Turn, chunks, directions, pack, tensor, unpack
from pipelines.features.fused import GROUPS, GridDecoding

CPU_CHUNK = 1 << 20
"""Coefficients of whole rows worked on at a time on a CPU: products want many tokens of each
frequency, caches few of them."""


class Section(NamedTuple):
    """The codes of one width; see `cache.codec.grid.Packed`.

    Of codes that do not cross bytes a byte is looked up whole: its codes' values stand together.

    levels: float32 [2^width], of codes.
    table: float32 [256, codes], of the codes of a byte; None where a code has several planes.
    """

    packed: Packed
    levels: Tensor
    table: Tensor | None

    @classmethod
    def of(cls, packed: Packed, device: torch.device) -> "Section":
        """Make the tables of one width."""
        levels, table = tensor(packed.levels).to(device), None
        if PLANES[packed.width] == (packed.width,):
            every = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
            table = levels[unpack(every, PLANES[packed.width], 8 // packed.width).long()]
        return cls(packed, levels, table)

    def values(self, data: Tensor) -> Tensor:
        """Look up the values of rows uint8 [n, B], in the order of `stand`: float32 [n, m]."""
        each = self.packed
        codes = data[:, each.start : each.start + each.num_bytes]
        if self.table is not None:
            values = self.table.index_select(0, codes.flatten().int())
            return values.view(len(data), codes.shape[1] * self.table.shape[1])
        return torch.take(self.levels, unpack(codes, PLANES[each.width], len(each.places)).long())

    def stand(self) -> tuple[np.ndarray, int]:
        """Say where the values of codes stand, int64 [k], among how many, m."""
        each, number = self.packed, np.arange(len(self.packed.places))
        if self.table is None:
            return number, len(number)
        per_byte = self.table.shape[1]
        field, byte = np.divmod(number, each.num_bytes)
        return byte * per_byte + field, each.num_bytes * per_byte


class Group(NamedTuple):
    """Frequencies that are multiplied with the basis together; f of them, k directions each.

    start: of their values among a row's.
    places: int64 [f], of them on the grid.
    spread: float32 [f, k].
    bands: int64 [f].
    """

    start: int
    places: Tensor
    spread: Tensor
    bands: Tensor

    def coefficients(self, values: Tensor, scales: Tensor) -> Tensor:
        """Scale a row's values [n, P] by spread and by band (scales [n, bands]): [n, f, k]."""
        own = values[:, self.start : self.start + self.spread.numel()]
        scaled = own.view(len(own), *self.spread.shape) * self.spread
        return scaled.mul_(scales[:, self.bands, None])


@dataclass(frozen=True)
class Decoding:
    """Constants of one codec's decoding, on one device.

    Attributes:
        sections: of a row's bytes, by width.
        order: int64 [P], where the sections' values and a zero behind them have what groups take.
        groups: of frequencies.
        num_bands: of frequencies, each with its scale.
        turn: back from directions to channels.
        constant: float32 [D], what is added to the mean frequency.
        waves: float32 [H, H] and [W, W], the transposed cosine transforms.
    """

    sections: list[Section]
    order: Tensor
    groups: list[Group]
    num_bands: int
    turn: Turn
    constant: Tensor
    waves: tuple[Tensor, Tensor]

    @classmethod
    def of(
        cls, codec: GridCodec, normaliser: Normaliser | None, device: torch.device
    ) -> "Decoding":
        """Make the constants of a codec and of what the loss wants done."""
        transform, (num_tokens, dim) = codec.transform, codec.bits.shape
        turn = Turn.of_grid(codec, normaliser)
        width = directions(codec)
        order = np.argsort(-width, kind="stable")
        start_of = np.zeros(num_tokens, np.int64)
        groups, start = [], 0
        for part in np.array_split(order, min(GROUPS, num_tokens)):
            most = int(width[part].max())
            start_of[part] = start + most * np.arange(len(part))
            groups.append(
                Group(
                    start,
                    torch.from_numpy(part).to(device),
                    tensor(codec.spread[part, :most]).to(device),
                    torch.from_numpy(codec.bands[part]).to(device),
                )
            )
            start += most * len(part)
        sections = [Section.of(each, device) for each in codec.packed]
        stand, behind = np.full(start, -1), 0
        for section in sections:
            places, (own, among) = section.packed.places, section.stand()
            stand[start_of[places // dim] + places % dim] = behind + own
            behind += among
        stand[stand < 0] = behind
        rows, columns = transform.grid
        waves = tensor(cosine_transform(rows).T), tensor(cosine_transform(columns).T)
        return cls(
            sections,
            torch.from_numpy(stand).to(device),
            groups,
            codec.num_bands,
            turn.to(device),
            turn.offset.to(device) * num_tokens**0.5,
            (waves[0].to(device), waves[1].to(device)),
        )

    def __call__(self, data: Tensor, out: Tensor | None = None) -> Tensor:
        """Decode rows uint8 [n, B] to tokens float32 [n, N, D], into `out` if that is given."""
        down, across = self.waves
        num_rows, num_tokens, dim = len(data), len(down) * len(across), len(self.constant)
        scales = _scales(data, self.num_bands)
        zero = torch.zeros(num_rows, 1, device=data.device)
        found = torch.cat([*(section.values(data) for section in self.sections), zero], 1)
        values = found.gather(1, self.order.expand(num_rows, -1))
        turned = torch.empty(num_rows, num_tokens, dim, device=data.device)
        for group in self.groups:
            kept = group.spread.shape[1]
            if kept == 0:
                turned.index_fill_(1, group.places, 0)
            elif self.turn.mix is not None:
                coefficients = group.coefficients(values, scales)
                turned.index_copy_(1, group.places, coefficients @ self.turn.mix[:kept])
            else:
                assert self.turn.butterfly is not None
                assert self.turn.gain is not None
                coefficients = group.coefficients(values, scales).flatten(0, 1)
                back = self.turn.butterfly.inverse(coefficients).mul_(self.turn.gain)
                turned.index_copy_(1, group.places, back.view(num_rows, len(group.bands), dim))
        turned[:, 0] += self.constant
        tokens = torch.matmul(across, turned.view(num_rows * len(down), len(across), dim))
        shape = num_rows, len(down), len(across) * dim
        into = None if out is None else out.view(shape)
        return torch.matmul(down, tokens.view(shape), out=into).view_as(turned)


class GridRows:
    """The twin of `GridCodec`; an `eupe.normalise.Normaliser` is fused with it."""

    def __init__(self, codec: GridCodec, normaliser: nn.Module | None) -> None:
        self._fused = normaliser if isinstance(normaliser, Normaliser) else None
        self.apart = None if self._fused is not None else normaliser
        self._codec = codec
        self._on: dict[torch.device, Decoding | GridDecoding] = {}
        self._cross = Crossing()

    def __call__(self, stored: np.ndarray, device: torch.device) -> Tensor:
        """Unpack, look up, turn and transform back on the device (see `RowDecoder`)."""
        data = self._cross(torch.from_numpy(stored), device).view(len(stored), stored.shape[-1])
        if device not in self._on:
            kind = GridDecoding if fused.usable(device) else Decoding
            self._on[device] = kind.of(self._codec, self._fused, device)
        decode = self._on[device]
        if device.type != "cpu" or isinstance(decode, GridDecoding):
            return decode(data)
        tokens = torch.empty(len(data), *self._codec.bits.shape)
        for part in chunks(len(data), self._codec.bits.size, CPU_CHUNK):
            decode(data[part], tokens[part])
        return tokens


def _scales(data: Tensor, num_bands: int) -> Tensor:
    """Read the scales of rows uint8 [n, B]: float32 [n, bands]."""
    # Copied: of a single row the slice is contiguous as it is, and may begin at an odd byte.
    halves = data[:, : 2 * num_bands].clone(memory_format=torch.contiguous_format)
    return halves.view(torch.float16).float()


def encode_grid(codec: GridCodec, patches: Tensor) -> Encoded:
    """Encode patches float32 [n, N, D] on the device they are on (see `codec_torch.encode`)."""
    num_rows, num_tokens, dim = patches.shape
    shape = num_rows, *codec.storage_shape(num_tokens, dim)
    quantise = _quantiser(codec, patches.device)
    finite = torch.isfinite(patches).all(-1).all(-1)
    whole = torch.where(finite[:, None, None], patches, quantise.mean)
    parts = [slice(None)]
    if patches.device.type == "cpu":
        parts = chunks(num_rows, num_tokens * dim, CPU_CHUNK)
    done = [quantise(whole[part]) for part in parts]
    data, bad = (torch.cat(column) for column in zip(*done, strict=True))
    row, token = torch.nonzero(bad & finite[:, None], as_tuple=True)
    valid = finite.cpu().numpy()
    return Encoded(
        to_host(data).reshape(shape),
        valid,
        [None if fine else NOT_FINITE for fine in valid.tolist()],
        Escapes(
            row.cpu().numpy(),
            token.cpu().numpy().astype(np.int32),
            patches[row, token].cpu().numpy(),
        ),
    )


@lru_cache(maxsize=8)
def _quantiser(codec: GridCodec, device: torch.device) -> "_Quantiser":
    return _Quantiser(codec, device)


class _Quantiser:
    """What `GridCodec` does to rows, on one device."""

    def __init__(self, codec: GridCodec, device: torch.device) -> None:
        self._codec, self._decode = codec, Decoding.of(codec, None, device)
        self._back: Decoding | GridDecoding = self._decode
        if fused.usable(device):
            self._back = GridDecoding.of(codec, None, device)
        self._rate, transform = codec.rate, codec.transform
        self.mean, self._std = (tensor(each).to(device) for each in (transform.mean, transform.std))
        self._basis = tensor(transform.basis).to(device)
        self._butterfly = self._decode.turn.butterfly
        signs = np.ones(1) if transform.rotation is None else transform.rotation.signs
        self._signs = tensor(signs).to(device)
        spread = tensor(codec.spread).view(-1)
        self._places = [torch.from_numpy(each.places).to(device) for each in codec.packed]
        self._spread = [spread[each.places].to(device) for each in codec.packed]
        self._edges = [
            tensor((each.levels[1:] + each.levels[:-1]) / 2).to(device) for each in codec.packed
        ]
        self._bands = [torch.from_numpy(each.band).to(device) for each in codec.packed]
        self._runs = [_runs(each.band) for each in codec.packed]
        counts = sum(np.bincount(each.band, minlength=codec.num_bands) for each in codec.packed)
        self._count = torch.as_tensor(np.maximum(counts, 1)).to(device)

    def __call__(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Encode rows [n, N, D]: their bytes uint8 [n, B], which tokens are escapes [n, N]."""
        z = (patches - self.mean) / self._std
        none = torch.zeros(patches.shape[:2], dtype=torch.bool, device=patches.device)
        data, bad = self._tried(z, patches, none)
        hard = torch.nonzero(bad.any(1)).view(-1)
        if not len(hard):
            return data, bad
        energy = z[hard].double().square().sum(2).nan_to_num(nan=torch.inf)
        far = energy > FAR * _median(energy)
        again, still = self._tried(z[hard].masked_fill(far[..., None], 0), patches[hard], far)
        better = still.sum(1) < bad[hard].sum(1)
        data[hard[better]], bad[hard[better]] = again[better], still[better]
        return data, bad

    def _tried(self, z: Tensor, patches: Tensor, taken_out: Tensor) -> tuple[Tensor, Tensor]:
        data = self._quantised(self._coefficients(z))
        error = self._back(data) - patches
        squared, size = (each.double().square().sum(2) for each in (error, patches))
        bad = taken_out | ~(squared <= self._rate.worst_error**2 * size)  # NaN is bad
        left = torch.where(bad, 0, squared)
        falling, worst_first = torch.sort(left, dim=1, descending=True, stable=True)
        rest = falling.sum(1, keepdim=True) - falling.cumsum(1) + falling
        above = rest > self._rate.worst_row_error**2 * size.sum(1, keepdim=True)
        return data, bad | torch.zeros_like(bad).scatter_(1, worst_first, above)

    def _add(self, into: Tensor, at: int, values: Tensor) -> None:
        """Add values [n, k] of one width up by band, into sums float64 [n, bands]."""
        for band, run in self._runs[at]:
            into[:, band] += values[:, run].sum(1, dtype=torch.float64)

    def _coefficients(self, z: Tensor) -> Tensor:
        """Transform standardised rows [n, N, D] along channels and grid: [n, N D]."""
        if self._butterfly is None:
            turned = z @ self._basis
        else:
            turned = self._butterfly.forward((z * self._signs).flatten(0, 1)).view_as(z)
        down, across = (wave.T for wave in self._decode.waves)
        num_rows, num_tokens, dim = z.shape
        rows = torch.matmul(down, turned.reshape(num_rows, len(down), len(across) * dim))
        rows = rows.view(num_rows * len(down), len(across), dim)
        return torch.matmul(across, rows).view(num_rows, num_tokens * dim)

    def _quantised(self, y: Tensor) -> Tensor:
        """Return the bytes of rows whose coefficients are y [n, N D]."""
        codec, packed = self._codec, self._codec.packed
        shape = len(y), codec.num_bands
        units = [
            y.index_select(1, places) / spread
            for places, spread in zip(self._places, self._spread, strict=True)
        ]
        sums = torch.zeros(3, *shape, dtype=torch.float64, device=y.device)
        power, least, scales = sums
        for at, unit in enumerate(units):
            self._add(power, at, unit.double().square())
        rms = (power / self._count).sqrt().float()
        divisor = torch.where(rms > 0, rms, 1.0)
        codes = [torch.zeros_like(unit, dtype=torch.uint8) for unit in units]
        for wider in WIDER:
            along, size = torch.zeros_like(sums[:2])
            found = []
            for at, unit in enumerate(units):
                band, section = self._bands[at], self._decode.sections[at]
                scaled = unit / (wider * divisor)[:, band]
                new = torch.bucketize(scaled, self._edges[at], out_int32=True)
                weighted = torch.take(section.levels, new.long()).mul_(self._spread[at])
                self._add(size, at, weighted.square())
                self._add(along, at, weighted.mul_(self._spread[at]).mul_(unit))
                found.append(new.to(torch.uint8))
            # The scale that serves these codes best, in the least-squares sense.
            best = along / torch.where(size > 0, size, 1.0)
            better = along * best > least
            least = torch.where(better, along * best, least)
            scales = torch.where(better, best, scales)
            codes = [
                torch.where(better[:, band], new, kept)
                for band, new, kept in zip(self._bands, found, codes, strict=True)
            ]
        halves = scales.half()
        lost = ~torch.isfinite(halves).all(1, keepdim=True)
        halves = halves.masked_fill(lost, 0)
        num_bytes = codec.storage_shape(*codec.bits.shape)[1]
        data = torch.zeros(len(y), num_bytes, dtype=torch.uint8, device=y.device)
        data[:, : 2 * codec.num_bands] = halves.view(torch.uint8)
        for each, kept in zip(packed, codes, strict=True):
            own = pack(kept.masked_fill(lost, 0), PLANES[each.width])
            data[:, each.start : each.start + each.num_bytes] = own
        return data


def _runs(band: np.ndarray) -> list[tuple[int, slice]]:
    """Return where each band lies among bands [k], which rise."""
    starts = np.flatnonzero(np.diff(band, prepend=-1))
    ends = [*starts[1:].tolist(), len(band)]
    return [
        (int(band[start]), slice(start, end))
        for start, end in zip(starts.tolist(), ends, strict=True)
    ]


def _median(energy: Tensor) -> Tensor:
    """Return the median of each row [n, N], between the middle two of an even number: [n, 1]."""
    rising, middle = energy.sort(1).values, energy.shape[1] // 2
    halves = rising[:, (energy.shape[1] - 1) // 2], rising[:, middle]
    return (halves[0] / 2 + halves[1] / 2)[:, None]
