"""What a codec gives and takes: stored rows, which of them are valid, and escaped tokens."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NOT_FINITE = "patches are not finite"
"""Why a row cannot be stored, whatever the codec."""
Floats = npt.NDArray[np.float32]
Moments = tuple[int, npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""count, mean [D], scatter [D, D] (sum of outer products of deviations)."""


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
