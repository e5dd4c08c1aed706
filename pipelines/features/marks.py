"""What tables of rows say: summaries, which rows are valid, and what their views looked like."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cache.reader import Reader


class Marks(NamedTuple):
    """What is known of rows, n of them, without a look at their patches.

    Attributes:
        summaries: float32 [n, D].
        valid: bool [n].
        digests: [n], of the views' canvases.
    """

    summaries: np.ndarray
    valid: np.ndarray
    digests: list[str | None]


def marks(
    readers: Sequence[Reader], rows: np.ndarray, view_numbers: np.ndarray, lenient: bool = False
) -> Marks:
    """Read what stores of one teacher and resolution say of rows, each of the first that has it.

    Args:
        readers: of the stores.
        rows: int64 [n].
        view_numbers: int64 [n].
        lenient: True if rows may be in none of them: nothing is held against those.

    Raises:
        StoreError: a row or view that is in none of them.
    """
    *_, last = readers
    summaries = np.full((len(rows), last.store.spec.summary_dim), np.nan, np.float32)
    valid, digests = np.ones(len(rows), bool), np.full(len(rows), None, object)
    left = np.ones(len(rows), bool)
    for reader in readers:
        here = left.copy()
        if lenient or reader is not last:
            here[left] = ~reader.records.absent(rows[left], view_numbers[left])
        if here.any():
            selected = reader.select(rows[here], view_numbers[here])
            summaries[here], valid[here] = selected.summaries, selected.valid
            digests[here] = selected.digests
        left &= ~here
    return Marks(summaries, valid, digests.tolist())
