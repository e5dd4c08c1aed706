"""The grid codecs, a picture's patches together: half a bit to four bits a coefficient.

Patch tokens of one picture resemble each other, and most of a teacher's features lie in few
directions of their space. So a row [N, D], N = H W, is transformed along both
(`cache.codec.grid_transform`). What is left are N D nearly independent coefficients of very
different variance: one for each frequency over the grid and direction of the channels.

    code = nearest Lloyd-Max level of coefficient / (scale x spread)

Each coefficient's variance is fitted on whole rows of the store's sample, and bits are allotted by
it: every bit goes to the coefficient whose error it lessens most, which is reverse water-filling in
whole bits. Most coefficients of high frequency get none. A row has one float16 scale for each band
of frequencies (an octave): pictures are busier or calmer than the sample.

A row is uint8 [1, B], B fixed by rate, N and D: the scales, float16 little endian, then for each
width from 1 to 8 bits the codes of the coefficients that have it, in order of band, frequency and
direction, packed in planes (`cache.codec.quantised.pack`); zeros to the end.

A token whose relative error |x' - x| / |x| would exceed the codec's bound is an escape: its float32
values are kept. So are the worst tokens of a row whose own relative error would exceed the bound of
rows. A token far larger than its neighbours would drown them: where a row has escapes, it is tried
without such tokens, and what needs fewer escapes is kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import NOT_FINITE, Encoded, Escapes, Fitting, Floats, Kind
from cache.codec.grid_transform import GridTransform
from cache.codec.quantised import Codes, lloyd_max, pack, packed_bytes, unpack
from eupe.errors import BadInput

FIT = "grid"
"""The fit rule: directions from the store's moments, spreads from whole rows of its sample."""


class Rate(NamedTuple):
    """What sets the grid codecs apart.

    Attributes:
        bits: a coefficient, all told.
        worst_error: bound of a token's relative error; its cosine is at least sqrt(1 - bound^2).
        worst_row_error: bound of a row's.
        mean_cosine: documented; a build whose sample falls below it is refused.
    """

    bits: float
    worst_error: float
    worst_row_error: float
    mean_cosine: float


RATES = {
    "grid0.5": Rate(0.5, 0.95, 0.80, 0.83),  # worst cosine 0.31
    "grid1": Rate(1, 0.85, 0.65, 0.90),  # 0.53
    "grid1.5": Rate(1.5, 0.75, 0.55, 0.94),  # 0.66
    "grid2": Rate(2, 0.65, 0.45, 0.962),  # 0.76
    "grid3": Rate(3, 0.45, 0.30, 0.985),  # 0.89
    "grid4": Rate(4, 0.30, 0.20, 0.994),  # 0.95
}

FOR_ESCAPES = 1 / 64
"""Share of the bits that is left to escapes: a row takes so much less than its rate."""
FOR_SCALES = 1 / 16
"""Share of a row that scales may take, at most: a small row has fewer bands."""
FAR = 16.0
"""Of the median token's energy: such a token may be taken out of a row."""
PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}
"""Bits of a code -> of each of its planes, lowest first."""
DISTORTION = np.array(
    [1, 0.363380, 0.117482, 0.0345478, 0.00950101, 0.00250467, 0.000644240, 0.000163478, 4.11983e-5]
)
"""Of a unit Gaussian, by Lloyd-Max levels of 0 to 8 bits (`quantised.lloyd_max`)."""
NEIGHBOURS = 4
"""Directions on either side whose variances a variance leans on."""
PRIOR_ROWS = 8
"""That the neighbours count for."""
WIDER = (1.0, 1.5, 2.25)
"""Of a band's root mean square: scales that codes are looked for by, so that few large coefficients
among small ones do not leave the range of their levels. The decoder knows nothing of it."""
SMALLEST_SPREAD = 1e-6  # of the largest
CHUNK = 1 << 23  # coefficients worked on at a time: 34 MB of float32


class Packed(NamedTuple):
    """How the coefficients of one width lie in a row; k of them.

    width: bits of a code.
    places: int64 [k], their places in a row's coefficients [N D], in order of band, then rising.
    band: int64 [k], of each.
    start: of their bytes in the row.
    num_bytes: that they take.
    levels: float32 [2^width], of their codes.
    """

    width: int
    places: npt.NDArray[np.int64]
    band: npt.NDArray[np.int64]
    start: int
    num_bytes: int
    levels: Floats


@dataclass(frozen=True, eq=False)
class GridCodec:
    """A grid codec, fitted to one store.

    Attributes:
        name: grid0.5 ... grid4.
        transform: of rows to coefficients.
        bits: uint8 [N, D], of each coefficient; 0: it is not kept.
        spread: float32 [N, D], each coefficient's standard deviation in the sample.
        levels: width -> float32 [2^width].
    """

    name: str
    transform: GridTransform
    bits: Codes
    spread: Floats
    levels: Mapping[int, Floats]

    @classmethod
    def fitted(cls, name: str, fitting: Fitting) -> "GridCodec":
        """Fit directions to moments, and spreads and bits to whole rows.

        Raises:
            BadInput: no moments, grid or rows to fit to, or none that are finite.
        """
        moments, grid, rows = fitting
        if moments is None or grid is None or rows is None or not len(rows):
            raise BadInput(f"codec {name}: is fitted to whole rows of patches too; give them")
        transform = GridTransform.fitted(name, grid, moments)
        nothing = np.zeros(transform.shape, np.uint8)
        codec = cls(name, transform, nothing, nothing.astype(np.float32), {})
        power = np.zeros(transform.shape)
        for part in codec._chunks(rows):
            found = transform.coefficients(transform.standardised(part))
            power += np.square(found, dtype=np.float64).sum(axis=0)
        variance = power / len(rows)
        if not np.isfinite(variance).all():
            raise BadInput(f"codec {name}: the rows that it is fitted to are not finite")
        variance = steadied(variance, len(rows), transform.rotation is None)
        bits = codec._allotted(variance)
        wide = np.sqrt(variance)
        spread = np.maximum(wide, SMALLEST_SPREAD * (wide.max() or 1.0)).astype(np.float32)
        levels = {int(width): lloyd_max(int(width)) for width in np.unique(bits) if width}
        return cls(name, transform, bits, spread, levels)

    @classmethod
    def from_stored(cls, said: Mapping[str, Any], arrays: Mapping[str, Any]) -> "GridCodec":
        """Undo `to_json_dict` and `arrays`: the same codec, to the last bit."""
        rows, columns = said["grid"]
        mean, std, basis = arrays["mean"], arrays["std"], arrays["basis"]
        transform = GridTransform((rows, columns), mean, std, basis.reshape(len(mean), -1))
        widths = [int(width) for width in np.unique(arrays["bits"]) if width]
        ends = np.cumsum([0, *(2**width for width in widths)])
        return cls(
            said["name"],
            transform,
            arrays["bits"].reshape(transform.shape),
            arrays["spread"].reshape(transform.shape),
            {
                width: arrays["levels"][start:stop]
                for width, start, stop in zip(widths, ends, ends[1:], strict=False)
            },
        )

    @property
    def rate(self) -> Rate:
        """Bits and bounds."""
        return RATES[self.name]

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
        """True: a token that would exceed a bound is kept as it is."""
        return True

    def storage_shape(self, num_tokens: int, dim: int) -> tuple[int, int]:
        """Return (1, bytes of a row)."""
        if (num_tokens, dim) != self.bits.shape:
            wanted = "{} tokens of {} channels".format(*self.bits.shape)
            raise ValueError(f"codec {self.name}: fitted to {wanted}, not {num_tokens} of {dim}")
        return 1, row_bytes(self.name, num_tokens, dim)

    @property
    def num_bands(self) -> int:
        """Bands of frequencies, each with its scale."""
        return int(self.bands.max()) + 1

    @cached_property
    def bands(self) -> npt.NDArray[np.int64]:
        """Band of each frequency, int64 [N]: 0 for the mean, then octaves of the higher of (i, j).

        A small row has fewer: the octaves above share the last one's scale.
        """
        i, j = np.divmod(np.arange(len(self.bits)), self.transform.grid[1])
        octave = np.ceil(np.log2(np.maximum(i, j) + 1)).astype(np.int64)
        most = int(row_bytes(self.name, *self.bits.shape) * FOR_SCALES / 2)
        return np.asarray(np.minimum(octave, max(most, 1) - 1))

    @cached_property
    def packed(self) -> list[Packed]:
        """How a row's codes lie behind its scales, by width, rising."""
        flat, out, start = self.bits.reshape(-1), [], 2 * self.num_bands
        band = np.repeat(self.bands, self.bits.shape[1])
        in_order = np.argsort(band, kind="stable")
        for width, levels in self.levels.items():
            places = in_order[flat[in_order] == width]
            num_bytes = packed_bytes(len(places), PLANES[width])
            out.append(Packed(width, places, band[places], start, num_bytes, levels))
            start += num_bytes
        return out

    def encode(self, patches: Floats) -> Encoded:
        """Encode float32 [n, N, D]; rows that are not finite are invalid, with the reason."""
        num_rows, num_tokens, dim = patches.shape
        shape = num_rows, *self.storage_shape(num_tokens, dim)
        patches = np.asarray(patches, np.float32)
        finite = np.asarray(np.isfinite(patches).all(axis=(1, 2)))
        data = np.zeros((num_rows, shape[-1]), np.uint8)
        bad = np.zeros((num_rows, num_tokens), bool)
        start = 0
        for part in self._chunks(patches):
            rows = slice(start, start := start + len(part))
            whole = np.where(finite[rows, None, None], part, self.transform.mean)
            data[rows], bad[rows] = self._encode_rows(whole)
        row, token = np.nonzero(bad & finite[:, None])
        reasons = [None if fine else NOT_FINITE for fine in finite.tolist()]
        escapes = Escapes(row, token.astype(np.int32), patches[row, token])
        return Encoded(data.reshape(shape), finite, reasons, escapes)

    def decode(self, data: npt.NDArray[np.generic], escapes: Escapes | None = None) -> Floats:
        """Decode uint8 [n, 1, bytes of a row], with the escapes of those rows, to [n, N, D]."""
        flat = data.reshape(len(data), data.shape[-1]).view(np.uint8)
        out = np.empty((len(flat), *self.bits.shape), np.float32)
        start = 0
        for part in self._chunks(flat):
            out[start : start + len(part)] = self._decode_rows(part)
            start += len(part)
        if escapes is not None:
            out[escapes.row, escapes.token] = escapes.values
        return out

    def to_json_dict(self) -> dict[str, object]:
        """What a decoder needs beside `arrays`."""
        said: dict[str, object] = {
            "name": self.name,
            "grid": list(self.transform.grid),
            "bands": self.num_bands,
        }
        if self.transform.rotation is not None:
            said["rotation"] = self.transform.rotation.to_json_dict()
        return said

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Fitted values, too many for JSON, flattened."""
        levels = [np.empty(0, np.float32), *self.levels.values()]
        return {
            "mean": self.transform.mean,
            "std": self.transform.std,
            "basis": self.transform.basis.reshape(-1),
            "bits": self.bits.reshape(-1),
            "spread": self.spread.reshape(-1),
            "levels": np.concatenate(levels),
        }

    def _chunks(self, rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        size = max(1, CHUNK // max(self.bits.size, 1))
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _allotted(self, variance: npt.NDArray[np.float64]) -> Codes:
        """Give out the bits of a row: as many as go into its bytes once they are packed."""
        room = row_bytes(self.name, *variance.shape) - 2 * self.num_bands
        num_bits = 8 * room
        while True:
            bits = allot(variance.reshape(-1), num_bits)
            taken = sum(
                packed_bytes(int(np.count_nonzero(bits == width)), planes)
                for width, planes in PLANES.items()
            )
            if taken <= room:
                return bits.reshape(variance.shape)
            num_bits -= 8 * (taken - room)

    def _encode_rows(self, patches: Floats) -> tuple[Codes, npt.NDArray[np.bool_]]:
        """Encode rows [k, N, D]: their bytes, and which tokens are escapes."""
        z = self.transform.standardised(patches)
        data, bad = self._tried(z, patches, np.zeros(patches.shape[:2], bool))
        hard = np.flatnonzero(bad.any(axis=1))
        if not len(hard):
            return data, bad
        far = _far(z[hard])
        without = np.where(far[..., None], np.float32(0), z[hard])
        again, still = self._tried(without, patches[hard], far)
        better = still.sum(axis=1) < bad[hard].sum(axis=1)
        data[hard[better]], bad[hard[better]] = again[better], still[better]
        return data, bad

    def _tried(
        self, z: Floats, patches: Floats, taken_out: npt.NDArray[np.bool_]
    ) -> tuple[Codes, npt.NDArray[np.bool_]]:
        """Quantise standardised rows and compare what comes back with the patches."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            data = self._quantised(self.transform.coefficients(z).reshape(len(z), -1))
            error = self._decode_rows(data) - patches
        squared = np.square(error, dtype=np.float64).sum(axis=2)
        size = np.square(patches, dtype=np.float64).sum(axis=2)
        return data, escaping(squared, size, taken_out, self.rate)

    def _quantised(self, y: Floats) -> Codes:
        """Return the bytes of rows whose coefficients are y, float32 [k, N D]."""
        data = np.zeros((len(y), row_bytes(self.name, *self.bits.shape)), np.uint8)
        spread, count = self.spread.reshape(-1), np.zeros(self.num_bands)
        power, least = np.zeros((2, len(y), self.num_bands))
        units = []
        for each in self.packed:
            units.append(y[:, each.places] / spread[each.places])
            _add(power, each.band, np.square(units[-1], dtype=np.float64))
            count += np.bincount(each.band, minlength=self.num_bands)
        rms = np.sqrt(power / np.maximum(count, 1)).astype(np.float32)
        divisor = np.where(rms > 0, rms, np.float32(1))
        codes = [np.zeros(unit.shape, np.uint8) for unit in units]
        scales = np.zeros_like(power)
        for wider in WIDER:
            along, size = np.zeros((2, len(y), self.num_bands))
            found = []
            for each, unit in zip(self.packed, units, strict=True):
                edges = (each.levels[1:] + each.levels[:-1]) / 2
                scaled = unit / (wider * divisor[:, each.band])
                found.append(np.searchsorted(edges, scaled).astype(np.uint8))
                weight = np.square(spread[each.places], dtype=np.float64)
                level = each.levels[found[-1]].astype(np.float64)
                _add(along, each.band, weight * level * unit)
                _add(size, each.band, weight * level * level)
            # The scale that serves these codes best, in the least-squares sense, and what it saves.
            best = along / np.where(size > 0, size, 1)
            better = along * best > least
            least, scales = np.where(better, along * best, least), np.where(better, best, scales)
            for each, kept, new in zip(self.packed, codes, found, strict=True):
                np.copyto(kept, new, where=better[:, each.band])
        halves = scales.astype("<f2")
        lost = ~np.isfinite(halves).all(axis=1)  # out of float16's range: every token escapes
        halves[lost] = 0
        data[:, : 2 * self.num_bands] = halves.view(np.uint8)
        for each, kept in zip(self.packed, codes, strict=True):
            kept[lost] = 0
            data[:, each.start : each.start + each.num_bytes] = pack(kept, PLANES[each.width])
        return data

    def _decode_rows(self, data: Codes) -> Floats:
        """Decode the bytes of rows, uint8 [k, B]."""
        scales = np.ascontiguousarray(data[:, : 2 * self.num_bands]).view("<f2").astype(np.float32)
        spread = self.spread.reshape(-1)
        y = np.zeros((len(data), self.bits.size), np.float32)
        for each in self.packed:
            section = data[:, each.start : each.start + each.num_bytes]
            codes = unpack(section, PLANES[each.width], len(each.places))
            y[:, each.places] = each.levels[codes] * (scales[:, each.band] * spread[each.places])
        return self.transform.patches(y.reshape(len(data), *self.bits.shape))


def row_bytes(name: str, num_tokens: int, dim: int) -> int:
    """Return the bytes of a row of N tokens [D]; one scale and one code at least."""
    return max(3, int(num_tokens * dim * RATES[name].bits * (1 - FOR_ESCAPES) / 8))


def steadied(
    variance: npt.NDArray[np.float64], num_rows: int, by_direction: bool
) -> npt.NDArray[np.float64]:
    """Lean variances [N, D] that few rows were measured for on their neighbours.

    Args:
        variance: mean squares over the rows.
        num_rows: that were measured.
        by_direction: True if the D directions fall in variance, so that a neighbour's is about as
            large; else all are draws of one.
    """
    if not by_direction:
        return np.repeat(variance.mean(axis=1, keepdims=True), variance.shape[1], axis=1)
    around = np.pad(variance, ((0, 0), (NEIGHBOURS, NEIGHBOURS)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(around, 2 * NEIGHBOURS + 1, axis=1)
    near = windows.mean(axis=2)
    return np.asarray((num_rows * variance + PRIOR_ROWS * near) / (num_rows + PRIOR_ROWS))


def allot(variance: npt.NDArray[np.float64], num_bits: int) -> Codes:
    """Give out bits, each where it lessens the squared error most; uint8 [k], at most 8 each.

    What a further bit saves falls from bit to bit, so the largest savings of all are taken.

    Args:
        variance: of each coefficient, [k].
        num_bits: to give out.
    """
    most = len(DISTORTION) - 1
    saved = (variance[:, None] * -np.diff(DISTORTION)).astype(np.float32).reshape(-1)
    num_bits = min(max(num_bits, 0), int(np.count_nonzero(saved)))
    if num_bits == 0:
        return np.zeros(len(variance), np.uint8)
    chosen = np.argpartition(-saved, num_bits - 1)[:num_bits]
    return np.bincount(chosen // most, minlength=len(variance)).astype(np.uint8)


def escaping(
    squared: npt.NDArray[np.float64],
    size: npt.NDArray[np.float64],
    taken_out: npt.NDArray[np.bool_],
    rate: Rate,
) -> npt.NDArray[np.bool_]:
    """Say which tokens of rows are escapes, so that both bounds hold; bool [k, N].

    Args:
        squared: error of each token, summed over its channels, [k, N].
        size: of each token, summed likewise.
        taken_out: tokens that were not encoded.
        rate: whose bounds.
    """
    bad = taken_out | ~(squared <= rate.worst_error**2 * size)  # not within, so that NaN is bad
    left = np.where(bad, 0, squared)
    worst_first = np.argsort(-left, axis=1, kind="stable")
    falling = np.take_along_axis(left, worst_first, axis=1)
    rest = falling.sum(axis=1, keepdims=True) - np.cumsum(falling, axis=1) + falling
    above = rest > rate.worst_row_error**2 * size.sum(axis=1, keepdims=True)
    np.put_along_axis(bad, worst_first, above | np.take_along_axis(bad, worst_first, 1), axis=1)
    return bad


def _far(z: Floats) -> npt.NDArray[np.bool_]:
    """Say which tokens of rows [k, N, D] are far larger than the row's median; bool [k, N]."""
    with np.errstate(over="ignore", invalid="ignore"):
        energy = np.square(z, dtype=np.float64).sum(axis=2)
    energy = np.where(np.isfinite(energy), energy, np.inf)
    with np.errstate(invalid="ignore"):
        far: npt.NDArray[np.bool_] = energy > FAR * np.median(energy, axis=1, keepdims=True)
    return far


def _add(
    into: npt.NDArray[np.float64], band: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> None:
    """Add values [k, m] up by their band [m], which rises, into sums [k, bands]."""
    if len(band):
        starts = np.flatnonzero(np.diff(band, prepend=-1))
        into[:, band[starts]] += np.add.reduceat(values, starts, axis=1)


def _fitted(name: str, fitting: Fitting) -> GridCodec:
    return GridCodec.fitted(name, fitting)


KINDS = {
    name: Kind(
        rate.bits,
        partial(_fitted, name),
        GridCodec.from_stored,
        FIT,
        rate.mean_cosine,
        row_bytes=partial(row_bytes, name),
        of_rows=True,
    )
    for name, rate in RATES.items()
}
