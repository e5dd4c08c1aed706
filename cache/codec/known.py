"""The codecs there are, by name: what one is, and how a spec becomes one (law 10).

A codec undoes itself: decoding returns the teacher's features. What the loss wants of them (a
normaliser) is another matter (law 9).
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import Encoded, Escapes, Floats, Moments
from cache.codec.plain import PLAIN, PlainCodec
from cache.codec.quantised import BITS, FIT, QuantisedCodec
from eupe.errors import BadInput
from eupe.spec import CodecSpec


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


def default_codec(name: str) -> CodecSpec:
    """Return the spec of a codec by name, with the rule that fits its scaling.

    Raises:
        ValueError: no codec has that name.
    """
    if name not in (*PLAIN, *BITS):
        raise BadInput(f"codec = {name!r}: wants one of {', '.join((*PLAIN, *BITS))}")
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
        raise BadInput(f"codec {spec.name}: fit = {spec.fit!r}, this version knows {rule!r}")


def row_bytes(name: str, num_tokens: int, dim: int) -> int:
    """Return the bytes of one row of N tokens [D] in a codec that is not fitted yet.

    Raises:
        ValueError: no codec has that name.
    """
    spec = default_codec(name)
    unit = None if spec.fit is None else (2, np.zeros(dim), np.eye(dim))
    codec = make_codec(spec, unit)
    return int(np.prod(codec.storage_shape(num_tokens, dim))) * codec.storage_dtype.itemsize
