"""Decoding on CUDA in as few passes as there can be: one to look up, one product, one of waves.

The plain twins (`codec_torch`, `grid_torch`) say what is computed; this says it by the kernels of
`pipelines.features.kernels`. What differs is rounding: below 2e-5 of a token's root mean square.

A product with the basis in float32 is a tenth as fast on an H100 as one of float16. So both sides
are split in two float16, and float16's range asks for factors: values are divided by a power of
two, columns of the basis each by their own, and what they make by a bound that no code exceeds.

Shapes: n rows, F frequencies that are kept, D channels, N tokens.
"""

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache.codec.grid import PLANES, GridCodec
from cache.codec.quantised import QuantisedCodec
from cache.codec.rotation import cosine_transform
from eupe.normalise import Normaliser
from pipelines.features.codec_steps import Butterfly, Turn, directions, tensor

COMPILERS = ("cc", "gcc", "clang")
"""One of which torch's own compilers call, unless CC names another."""
TENSOR_CORES = (8, 0)
"""Compute capability from which Triton has what is used here."""
GROUPS = 8
"""Of frequencies that are multiplied with the basis together, at most."""
ALIGNED = 8
"""Directions are kept in multiples of it: 16 bytes of float16."""
LARGEST_VALUE = 256.0
LARGEST_WEIGHT = 16.0
LARGEST_TURNED = 32768.0
"""Of float16's 65,504."""


def has_compiler() -> bool:
    """Return True if there is a C compiler, which Triton and torch.compile call."""
    return any(map(shutil.which, (os.environ.get("CC") or "cc", *COMPILERS)))


@cache
def usable(device: torch.device) -> bool:
    """Return True if the kernels run on a device: CUDA's, with Triton and a C compiler."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= TENSOR_CORES and has_compiler()


def level_table(levels: dict[int, np.ndarray]) -> Tensor:
    """Return one table of the levels of every width: those of w bits begin at 2^w - 1."""
    table = np.zeros(511, np.float32)
    for width, values in levels.items():
        table[2**width - 1 : 2 ** (width + 1) - 1] = values
    return torch.from_numpy(table)


def fields(count: int, planes: Sequence[int], start: int = 0) -> np.ndarray:
    """Return where the fields of so many codes lie, packed from a byte on; int64 [3, count].

    As `pipelines.features.kernels.look_up` wants them (layout: `cache.codec.quantised`).
    """
    found = np.zeros((3, count), np.int64)
    for plane, width in enumerate(planes):
        num_bytes = -(-count * width // 8)
        part, byte = np.divmod(np.arange(count), num_bytes)
        found[plane] = (start + byte) << 7 | (part * width) << 4 | width
        start += num_bytes
    return found


class Lookup(NamedTuple):
    """What `kernels.look_up` wants of a codec, on one device; see there."""

    places: Tensor
    factors: Tensor
    levels: Tensor
    byte_step: int = 0

    @classmethod
    def of_tokens(cls, codec: QuantisedCodec, device: torch.device) -> "Lookup":
        """Make that of a codec whose tokens are all alike."""
        dim, planes = len(codec.mean), codec.how.planes
        width = sum(planes)
        levels = np.arange(-128, 128, dtype=np.float32) if codec.levels is None else codec.levels
        return cls(
            _places(fields(dim, planes)[: len(planes)], device),
            torch.ones(dim, device=device),
            level_table({width: levels}).to(device),
            codec.token_bytes,
        )

    def __call__(
        self, data: Tensor, shape: tuple[int, int], scales: Tensor | None = None
    ) -> Tensor:
        """Look up rows uint8 [n, B]: float32 [n, *shape], times the scales [n, F]."""
        from pipelines.features import kernels  # imports Triton

        return kernels.look_up(
            data, self.places, self.factors, self.levels, shape, self.byte_step, scales
        )


class Group(NamedTuple):
    """Frequencies that are multiplied with the basis together: f of them, k directions each.

    places: int32 [3, f k].
    factors: float32 [f k].
    weights: float16 [3 k, D], high, low and high again; None: a rotation takes its place.
    shape: (f, k).
    """

    places: Tensor
    factors: Tensor
    weights: Tensor | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class GridDecoding:
    """Constants of one grid codec's decoding, on one device.

    Attributes:
        groups: of frequencies, those with the fewest directions first.
        levels: see `level_table`.
        num_bands: of frequencies, each with its scale.
        bands: int64 [F].
        shrink: what scales are multiplied with, so that float16 holds what is turned.
        butterfly: what turns directions to channels, where no weights do.
        matrix: high and low of the waves, float16 [N, F].
        column: float32 [D], what undoes every factor, and the gain.
        offset: float32 [D].
    """

    groups: list[Group]
    levels: Tensor
    num_bands: int
    bands: Tensor
    shrink: float
    butterfly: Butterfly | None
    matrix: tuple[Tensor, Tensor]
    column: Tensor
    offset: Tensor

    @classmethod
    def of(
        cls, codec: GridCodec, normaliser: Normaliser | None, device: torch.device
    ) -> "GridDecoding":
        """Make the constants of a codec and of what the loss wants done."""
        transform, (num_tokens, dim) = codec.transform, codec.bits.shape
        turn = Turn.of_grid(codec, normaliser)
        places = np.zeros((3, num_tokens * dim), np.int64)
        largest = np.zeros(num_tokens * dim)
        for each in codec.packed:
            places[:, each.places] = fields(len(each.places), PLANES[each.width], each.start)
            largest[each.places] = np.abs(each.levels).max()
        spread = codec.spread.astype(np.float64)
        largest = largest.reshape(num_tokens, dim) * spread
        unit = power_of_two(largest.max() / LARGEST_VALUE)
        weights, columns = None, np.ones(dim)
        if turn.mix is not None:
            weights = turn.mix.double().numpy()
            columns = power_of_two(np.abs(weights).max(axis=0) / LARGEST_WEIGHT)
            weights = weights / columns
        # Those with most directions last, and of each the widest last: sums grow as they end.
        width = directions(codec)
        order = np.argsort(width, kind="stable")
        order = order[width[order] > 0]
        groups, bound = [], 0.0
        for part in np.array_split(order, min(GROUPS, max(len(order), 1))):
            if not len(part):
                continue
            most = int(width[part].max())
            if weights is not None:
                most = min(-(-most // ALIGNED) * ALIGNED, -(-dim // ALIGNED) * ALIGNED)
            taken = np.arange(most)[::-1] if weights is not None else np.arange(most)
            own = _padded(places.reshape(3, num_tokens, dim)[:, part], most)[..., taken]
            factors = _padded(spread[part] / unit, most)[..., taken]
            bounds, product = _padded(largest[part] / unit, most)[..., taken], None
            if weights is None:
                bound = max(bound, float(np.sqrt(np.square(bounds).sum(1)).max()))
            else:
                rows = _padded(weights.T, most)[:, taken].T
                bound = max(bound, float((bounds @ np.abs(rows)).max()))
                high, low = split(rows)
                product = torch.cat([high, low, high]).to(device)
            groups.append(
                Group(
                    _places(own.reshape(3, -1), device),
                    tensor(factors.reshape(-1)).to(device),
                    product,
                    (len(part), most),
                )
            )
        shrink = 1 / power_of_two(bound / LARGEST_TURNED)
        matrix = np.kron(*(cosine_transform(side).astype(np.float64).T for side in transform.grid))
        gain = np.ones(dim) if turn.gain is None else turn.gain.double().numpy()
        high, low = split(matrix[:, order])
        return cls(
            groups,
            level_table({width: each for width, each in codec.levels.items()}).to(device),
            codec.num_bands,
            torch.from_numpy(codec.bands[order]).to(device),
            float(shrink),
            turn.to(device).butterfly,
            (high.to(device), low.to(device)),
            tensor(gain * columns * unit / shrink).to(device),
            turn.offset.to(device),
        )

    def __call__(self, data: Tensor) -> Tensor:
        """Decode rows uint8 [n, B] to tokens float32 [n, N, D]."""
        from pipelines.features import kernels  # imports Triton

        num_rows, dim = len(data), len(self.column)
        halves = data[:, : 2 * self.num_bands].clone(memory_format=torch.contiguous_format)
        scales = halves.view(torch.float16).float()
        peaks = scales.abs().amax(1)
        peaks = torch.where(peaks > 0, peaks, 1.0)
        scales = (scales * (self.shrink / peaks)[:, None])[:, self.bands].contiguous()
        by_rows = self.butterfly is not None
        shape = (num_rows, len(self.bands), dim) if by_rows else (len(self.bands), num_rows, dim)
        turned = torch.empty(shape, device=data.device)
        start = 0
        for places, factors, weights, own in self.groups:
            values = kernels.look_up(
                data, places, factors, self.levels, own, split=weights is not None
            )
            rows = slice(start, start := start + own[0])
            if weights is None:
                assert self.butterfly is not None
                turned[:, rows] = self.butterfly.inverse(values.view(-1, dim)).view_as(values)
            else:
                product(values.flatten(0, 1), weights, turned[rows].view(-1, dim))
        return kernels.waves(turned, self.matrix, scales, peaks, self.column, self.offset, by_rows)


def product(values: Tensor, weights: Tensor, out: Tensor) -> None:
    """Multiply float16 [T, K] with float16 [K, D] into float32 [T, D], added up in float32."""
    if values.device.type == "cuda":
        torch.mm(values, weights, out_dtype=torch.float32, out=out)
    else:  # each product of two float16 is a float32
        torch.mm(values.float(), weights.float(), out=out)


def split(values: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return float16 high and low, whose sum has 22 bits of the values."""
    high = np.ascontiguousarray(values, np.float16)
    low = np.ascontiguousarray(values - high.astype(np.float64), np.float16)
    return torch.from_numpy(high), torch.from_numpy(low)


def power_of_two(size: np.ndarray | float) -> np.ndarray:
    """Return the powers of two next above sizes; 1 for none."""
    size = np.asarray(size, np.float64)
    return np.where(size > 0, np.exp2(np.ceil(np.log2(np.where(size > 0, size, 1)))), 1.0)


def _padded(values: np.ndarray, count: int) -> np.ndarray:
    """Return the first so many of [..., D], zeros behind them."""
    values = values[..., :count]
    room = [(0, 0)] * (values.ndim - 1)
    return np.pad(values, [*room, (0, count - values.shape[-1])])


def _places(places: np.ndarray, device: torch.device) -> Tensor:
    """Return places as int32.

    Raises:
        ValueError: rows of more than 16 MB.
    """
    if places.size and places.max() >= 2**31:
        raise ValueError("rows of more than 16 MB have no kernel")
    return torch.from_numpy(np.ascontiguousarray(places, np.int32)).to(device)
