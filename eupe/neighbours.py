"""Nearest neighbours: a float32 shortlist, ranked again in float64 with a proof that it is whole.

The answers are those of float64 alone, whatever the shortlist is computed with: float32 distances
are off by at most a bound, and a query whose shortlist could have missed a neighbour by that much
gets a longer one.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from eupe.errors import BadInput

MAX_DISTANCES = 2**26
"""Distances held at once, float32: a quarter of a gibibyte."""
AT_ONCE = 2**13
"""Vectors of a bank that are centred at once, in float64."""
BLOCK = 2**15
"""Vectors of a bank that are compared at once: many queries then share what is read of them."""
SPARE = 32
"""Candidates of a first shortlist beyond the neighbours wanted."""
LONGER = 8
"""Times as long is the next shortlist of a query whose first could have missed one."""
UNIT = 2.0**-24
"""Rounding of float32: half of the distance from 1 to the next number."""


def nearest(
    bank: Float[Tensor, "n d"], queries: Float[Tensor, "q d"], k: int
) -> tuple[Int64[Tensor, "q k"], Float[Tensor, "q k"]]:
    """Find each query's k nearest bank vectors in L2 distance.

    Equal distances go to the earlier bank row, so that the answer is one on every device.

    Args:
        bank: vectors [n, D], float32 or float64.
        queries: vectors [q, D].
        k: neighbours.

    Returns:
        rows [q, k], nearest first, and their squared distances, float64.

    Raises:
        BadInput: k that is no whole number of bank rows, or a value that is not finite.
    """
    if not 1 <= k <= len(bank):
        raise BadInput(f"k = {k}: wants 1 to the {len(bank)} vectors of the bank")
    if not bool(bank.isfinite().all() and queries.isfinite().all()):
        raise BadInput("kNN: the bank or the queries hold values that are not finite")
    shortlist = Shortlist(bank)
    rows = torch.empty(len(queries), k, dtype=torch.int64, device=bank.device)
    squares = torch.empty(len(queries), k, dtype=torch.float64, device=bank.device)
    waiting, length = torch.arange(len(queries), device=bank.device), min(len(bank), k + SPARE)
    while len(waiting):
        missed = []
        wide = max(BLOCK, length * bank.shape[1])
        per_chunk = max(1, MAX_DISTANCES // wide)
        for chunk in torch.split(waiting, per_chunk):
            found, exact, certain = shortlist.ranked(queries[chunk], k, length)
            rows[chunk], squares[chunk] = found, exact
            missed.append(chunk[~certain])
        waiting, length = torch.cat(missed), min(len(bank), LONGER * length)
    return rows, squares


class Shortlist:
    """A bank of vectors, centred and in float32, that candidates are taken from.

    Args:
        bank: vectors [n, D].
    """

    def __init__(self, bank: Tensor) -> None:
        self._bank = bank
        parts = torch.split(bank, AT_ONCE)
        sums = torch.stack([part.double().sum(0) for part in parts])
        self._centre = sums.sum(0) / len(bank)  # the smaller the vectors, the smaller the bound
        self._centred = torch.empty(bank.shape, dtype=torch.float32, device=bank.device)
        for part, own in zip(parts, torch.split(self._centred, AT_ONCE), strict=True):
            own.copy_(part - self._centre)
        squares = [own.double().square().sum(1) for own in torch.split(self._centred, AT_ONCE)]
        self._squares = torch.cat(squares)
        self._rounded = self._squares.float()
        self._longest = float(self._squares.max().sqrt())

    def ranked(self, queries: Tensor, k: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rank a shortlist of each query by float64 distance.

        Args:
            queries: vectors [q, D].
            k: neighbours.
            length: candidates of each query, at least k.

        Returns:
            rows [q, k], squared distances [q, k], and [q], True where no vector outside the
            shortlist can be as near as the k-th within it.
        """
        centred = (queries - self._centre).float()
        scores, found = self._best(centred, length)
        candidates = found.sort(dim=1).values
        apart = self._bank[candidates].double() - queries[:, None].double()
        exact = apart.square().sum(2)
        order = exact.sort(dim=1, stable=True).indices[:, :k]
        rows, squares = candidates.gather(1, order), exact.gather(1, order)
        own = centred.double().square().sum(1)
        outside = scores.max(1).values + own - self._bound(own.sqrt())
        certain = squares[:, -1] < outside
        if length == len(self._bank):
            certain = torch.ones_like(certain)
        return rows, squares, certain

    def _best(self, centred: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return the lowest scores of centred queries [q, D], and their rows, [q, length] each.

        A score is the squared distance without the query's own square, which is the same for all.
        """
        scores = centred.new_empty(len(centred), 0)
        rows = torch.empty(len(centred), 0, dtype=torch.int64, device=centred.device)
        for start in range(0, len(self._bank), BLOCK):
            block = slice(start, start + BLOCK)
            own = torch.addmm(self._rounded[block], centred, self._centred[block].T, alpha=-2)
            few = own.topk(min(length, own.shape[1]), dim=1, largest=False)
            scores = torch.cat([scores, few.values], 1)
            rows = torch.cat([rows, few.indices + start], 1)
            best = scores.topk(min(length, scores.shape[1]), dim=1, largest=False)
            scores, rows = best.values, rows.gather(1, best.indices)
        return scores, rows

    def _bound(self, lengths: Tensor) -> Tensor:
        """Bound the error of a score, twice over, for queries of these lengths [q].

        A dot product of D terms in float32 is off by at most D units of the product of lengths,
        in whatever order it is summed. Coarser products (TF32) have no bound here: all is ranked.
        """
        if torch.get_float32_matmul_precision() != "highest":
            return torch.full_like(lengths, torch.inf)
        units = 2 * (2 * self._bank.shape[1] + 16)
        return units * UNIT * (lengths + self._longest) * self._longest
