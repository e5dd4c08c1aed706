"""Codecs: how a store keeps patches, and how it gives them back. numpy, the oracle (law 10).

A codec undoes itself: decoding returns the teacher's features. What the loss wants of them (a
normaliser) is another matter (law 9).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import NOT_FINITE, Encoded, Escapes, Floats, Moments
from cache.codec.quantised import BITS, FIT, QuantisedCodec
from eupe.spec import CodecSpec

__all__ = [
    "Codec",
    "Encoded",
    "Escapes",
    "Moments",
    "PlainCodec",
    "default_codec",
    "make_codec",
    "stored_codec",
]

PLAIN = ("float32", "float16", "bfloat16", "uint8")
BFLOAT16_NAN = 0x7FC0


class Codec(Protocol):
    """What store, writer and reader need of a codec."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def storage_dtype(self) -> np.dtype[np.generic]:
        """Element type of the Zarr array."""
        ...

    @property
    def fill_value(self) -> int | str:
        """What absent rows read as, in Zarr's JSON form."""
        ...

    @property
    def has_escapes(self) -> bool:
        """Whether tokens may be kept beside the codes."""
        ...

    def storage_shape(self, num_tokens: int, dim: int) -> tuple[int, int]:
        """Shape of one row of the Zarr array."""
        ...

    def encode(self, patches: Floats) -> Encoded:
        """Encode float32 [n, N, D]."""
        ...

    def decode(self, data: npt.NDArray[np.generic], escapes: Escapes | None = None) -> Floats:
        """Decode [n, *storage_shape], with the escapes of those rows, to float32 [n, N, D]."""
        ...

    def to_json_dict(self) -> dict[str, object]:
        """Everything a decoder needs, as plain data; goes into the array's attributes."""
        ...


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
        """No: what does not fit makes its row invalid."""
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


def default_codec(name: str) -> CodecSpec:
    """Return the spec of a codec by name, with the rule that fits its scaling.

    Raises:
        ValueError: no codec has that name.
    """
    if name not in (*PLAIN, *BITS):
        raise ValueError(f"codec = {name!r}: wants one of {', '.join((*PLAIN, *BITS))}")
    return CodecSpec(name=name, fit=FIT if name in BITS else None)  # type: ignore[arg-type]


def make_codec(spec: CodecSpec, moments: Moments | None = None) -> Codec:
    """Build the codec of a spec, fitted to the moments of the patches where it is fitted.

    Args:
        spec: name and fit rule.
        moments: of the patches: count, mean [D], scatter [D, D]; plain dtypes need none.

    Raises:
        ValueError: the fit rule is not the codec's, or moments are needed and not given.
    """
    _check_fit(spec)
    if spec.fit is None:
        return PlainCodec(spec.name)
    if moments is None:
        raise ValueError(f"codec {spec.name}: is fitted to the moments of the patches; give them")
    return QuantisedCodec.fitted(spec.name, moments)


def stored_codec(spec: CodecSpec, said: Mapping[str, object]) -> Codec:
    """Return the codec that a store was created with, from what its spec.json says of it.

    Raises:
        ValueError: the fit rule is not the codec's.
    """
    _check_fit(spec)
    return PlainCodec(spec.name) if spec.fit is None else QuantisedCodec.from_json_dict(said)


def _check_fit(spec: CodecSpec) -> None:
    rule = default_codec(spec.name).fit
    if spec.fit != rule:
        raise ValueError(f"codec {spec.name}: fit = {spec.fit!r}, this version knows {rule!r}")


def row_bytes(name: str, num_tokens: int, dim: int) -> int:
    """Return the bytes of one row of N tokens [D] in a codec that is not fitted yet.

    Raises:
        ValueError: no codec has that name.
    """
    spec = default_codec(name)
    unit = None if spec.fit is None else (2, np.zeros(dim), np.eye(dim))
    codec = make_codec(spec, unit)
    return int(np.prod(codec.storage_shape(num_tokens, dim))) * codec.storage_dtype.itemsize


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
