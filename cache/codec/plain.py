"""Plain codecs: features rounded to a number type that outside readers know."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import NOT_FINITE, Arrays, Encoded, Escapes, Floats, Kind

BFLOAT16_NAN = 0x7FC0


@dataclass(frozen=True)
class PlainCodec:
    """Features rounded to a plain type: float32, float16, bfloat16 as its 16 bits in uint16, uint8.

    uint8 is for pixels: it keeps whole numbers from 0 to 255 exactly.
    """

    name: str

    @property
    def storage_dtype(self) -> np.dtype[np.generic]:
        """Element type of the Zarr array."""
        return np.dtype("uint16" if self.name == "bfloat16" else self.name)

    @property
    def fill_value(self) -> int | str:
        """NaN, for bfloat16 its bits; 0 for uint8, which has none."""
        return {"bfloat16": BFLOAT16_NAN, "uint8": 0}.get(self.name, "NaN")

    @property
    def has_escapes(self) -> bool:
        """False: what does not fit makes its row invalid."""
        return False

    def storage_shape(self, num_tokens: int, dim: int) -> tuple[int, int]:
        """Return (N, D): a row is stored as it is."""
        return num_tokens, dim

    def encode(self, patches: Floats) -> Encoded:
        """Round float32 [n, N, D] to nearest even.

        A row that is not finite, or leaves the type's range by rounding, is invalid, with the
        reason.
        """
        patches = np.asarray(patches, np.float32)
        kept: Floats | None = None
        if self.name == "bfloat16":
            data: npt.NDArray[np.generic] = _to_bfloat16(patches)
        elif self.name == "uint8":
            rounded = np.rint(patches)
            inside = (rounded >= 0) & (rounded <= 255)
            data = np.where(inside, rounded, 0).astype(np.uint8)
            kept = np.where(inside, rounded, np.inf)
        else:
            with np.errstate(over="ignore"):
                data = patches.astype(self.storage_dtype)
        valid, reasons = _judge(patches, self.decode(data) if kept is None else kept, self.name)
        return Encoded(data, valid, reasons, Escapes.none(patches.shape[-1]))

    def decode(self, data: npt.NDArray[np.generic], escapes: Escapes | None = None) -> Floats:
        """Widen [n, N, D] to float32; absent rows become NaN (uint8: 0), there are no escapes."""
        if self.name == "bfloat16":
            return (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return data.astype(np.float32)

    def to_json_dict(self) -> dict[str, object]:
        """Name and true dtype."""
        return {"name": self.name, "dtype": self.name}

    def arrays(self) -> Arrays:
        """Nothing is fitted."""
        return {}


def _made(name: str, *_: object) -> PlainCodec:
    return PlainCodec(name)


KINDS = {
    name: Kind(bits, fitted=partial(_made, name), stored=partial(_made, name))
    for name, bits in (("float32", 32), ("float16", 16), ("bfloat16", 16), ("uint8", 8))
}


def unfit(name: str, finite: bool, largest: float) -> str:
    """Say why a plain codec cannot keep a row, given its largest magnitude."""
    if finite:
        return f"patches overflow {name}: largest magnitude {largest:.6g}"
    return NOT_FINITE


def _to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16 bits, nearest even, NaN kept."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (np.uint32(0x7FFF) + odd)) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(BFLOAT16_NAN), rounded)


def _judge(
    patches: Floats, decoded: Floats, name: str
) -> tuple[npt.NDArray[np.bool_], list[str | None]]:
    """Say per row whether it was finite and stayed so."""
    num_rows = len(patches)
    axes = tuple(range(1, patches.ndim))
    finite = np.asarray(np.isfinite(patches).all(axis=axes))
    kept = np.asarray(np.isfinite(decoded).all(axis=axes))
    reasons: list[str | None] = [None] * num_rows
    for row in np.flatnonzero(~(finite & kept)).tolist():
        reasons[row] = unfit(name, bool(finite[row]), float(np.abs(patches[row]).max()))
    return finite & kept, reasons
