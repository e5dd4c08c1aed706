"""No patches at all: a store of summaries, as of a bank that neighbours are looked for in."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import NOT_FINITE, Arrays, Encoded, Escapes, Floats, Kind

NONE = "none"
"""Name of the codec."""


@dataclass(frozen=True)
class NothingCodec:
    """Keeps one byte of a row, 0: that it is there."""

    name: str = NONE

    @property
    def storage_dtype(self) -> np.dtype[np.generic]:
        """Element type of the Zarr array."""
        return np.dtype("uint8")

    @property
    def fill_value(self) -> int | str:
        """What absent rows read as, 0 like the others: the table of rows tells them apart."""
        return 0

    @property
    def has_escapes(self) -> bool:
        """False: there is nothing to escape from."""
        return False

    def storage_shape(self, num_tokens: int, dim: int) -> tuple[int, int]:
        """Return (1, 1), whatever a row has."""
        return 1, 1

    def encode(self, patches: Floats) -> Encoded:
        """Take float32 [n, N, D] for what is said of its rows: those that are not finite."""
        return encoded(np.asarray(np.isfinite(patches).all((1, 2))), patches.shape[-1])

    def decode(self, data: npt.NDArray[np.generic], escapes: Escapes | None = None) -> Floats:
        """Refuse: what was not kept cannot be had.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"codec {NONE}: the store has summaries alone, no patches")

    def to_json_dict(self) -> dict[str, object]:
        """Return the name: there is nothing to decode."""
        return {"name": self.name}

    def arrays(self) -> Arrays:
        """Nothing is fitted."""
        return {}


def encoded(finite: npt.NDArray[np.bool_], dim: int) -> Encoded:
    """Return what is stored of rows of patches that are finite or not, bool [n]."""
    data = np.zeros((len(finite), 1, 1), np.uint8)
    reasons = [None if fine else NOT_FINITE for fine in finite.tolist()]
    return Encoded(data, finite, reasons, Escapes.none(dim))


def _made(*_: object) -> NothingCodec:
    return NothingCodec()


KINDS = {NONE: Kind(0, fitted=_made, stored=_made)}
