"""What a codec is: what is known of it before any store, what it takes and what it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

NOT_FINITE = "patches are not finite"
"""Why a row cannot be stored, whatever the codec."""
Floats = npt.NDArray[np.float32]
Moments = tuple[int, npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""count, mean [D], scatter [D, D] (sum of outer products of deviations)."""
Arrays = Mapping[str, npt.NDArray[Any]]
"""Fitted values by name, each flattened."""


class Fitting(NamedTuple):
    """What a codec may be fitted to: a store's own measurements.

    moments: of the patches; None where nothing was measured.
    grid: (H, W) of a row's tokens.
    rows: float32 [r, N, D], whole rows of the sample; None where none were brought along.
    """

    moments: Moments | None = None
    grid: tuple[int, int] | None = None
    rows: Floats | None = None


class Escapes(NamedTuple):
    """Tokens that their codec serves badly, kept as float32 beside the codes; k of them.

    row: int64 [k], place of the row in its batch; rising as encoded, in any order as read.
    token: int32 [k], place of the token in its row.
    values: float32 [k, D].
    """

    row: npt.NDArray[np.int64]
    token: npt.NDArray[np.int32]
    values: Floats

    @classmethod
    def none(cls, dim: int) -> "Escapes":
        """No escapes, of tokens [D]."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int32), np.empty((0, dim), np.float32))

    @classmethod
    def joined(cls, parts: "list[Escapes]", starts: list[int]) -> "Escapes":
        """Join the escapes of batches whose first rows are `starts`."""
        return cls(
            np.concatenate([part.row + start for part, start in zip(parts, starts, strict=True)]),
            np.concatenate([part.token for part in parts]),
            np.concatenate([part.values for part in parts]),
        )

    @property
    def num_bytes(self) -> int:
        """What they cost in the table of rows: values, and the tokens' places."""
        return self.values.nbytes + self.token.nbytes


class Encoded(NamedTuple):
    """Patches as stored.

    data: [n, *storage_shape] in storage dtype.
    valid: bool [n].
    reasons: n entries, None where valid, else why the row cannot be stored.
    escapes: tokens kept beside the codes; empty for plain dtypes.
    """

    data: npt.NDArray[np.generic]
    valid: npt.NDArray[np.bool_]
    reasons: list[str | None]
    escapes: Escapes

    def bits_per_coefficient(self, num_tokens: int, dim: int) -> float:
        """Bits spent on a coefficient, scales and escapes included."""
        num_bytes = self.data.nbytes + self.escapes.num_bytes
        return 8 * num_bytes / (len(self.data) * num_tokens * dim)


class Codec(Protocol):
    """What store, writer and reader need of a codec, fitted where it is fitted."""

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
        """True if tokens may be kept beside the codes."""
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
        """Everything a decoder needs but `arrays`, plain data; goes into the array's attributes."""
        ...

    def arrays(self) -> Arrays:
        """Fitted values that are too many for JSON, by name, flattened; mostly none.

        Where there are some they lie in a file beside the moments (`format.codec_table`).
        """
        ...


@dataclass(frozen=True)
class Kind:
    """A codec before it knows a store; `cache.codec.known.KNOWN` lists them by name.

    Attributes:
        bits: of one coefficient; scales and escapes left out, unless they are within.
        fitted: what a store measured -> codec; without a fit rule nothing may have been.
        stored: what spec.json says (`Codec.to_json_dict`), `Codec.arrays` -> that codec, to the
            last bit.
        fit: name of the rule that fits its scaling; None if nothing is fitted.
        mean_cosine: what it documents to keep of tokens, and a build must measure before it makes
            a store; None for a codec that only rounds.
        row_bytes: (N, D) -> bytes of a row, where that is known more cheaply than by fitting one.
        of_rows: True if it is fitted to whole rows of the sample too.
    """

    bits: float
    fitted: Callable[[Fitting], Codec]
    stored: Callable[[Mapping[str, object], Arrays], Codec]
    fit: str | None = None
    mean_cosine: float | None = None
    row_bytes: Callable[[int, int], int] | None = None
    of_rows: bool = False

    @property
    def lossy(self) -> bool:
        """True if it keeps less than a number type would, so that it has to be measured."""
        return self.mean_cosine is not None
