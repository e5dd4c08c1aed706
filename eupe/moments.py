"""Moments: count, mean and scatter of tokens, mergeable in any order (numpy, float64)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Float64

Vector = Float64[np.ndarray, " d"]
Matrix = Float64[np.ndarray, "d d"]


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and scatter of tokens, measured once: EUPE (arXiv:2603.22387), Fig. 3.

    Attributes:
        count: tokens seen.
        mean: [D], float64.
        scatter: sum of (x - mean)(x - mean)^T, [D, D], float64.
    """

    count: int
    mean: Vector
    scatter: Matrix

    @classmethod
    def of(cls, tokens: npt.ArrayLike) -> "Moments":
        """Measure tokens [n, D] of any float dtype, in float64.

        Raises:
            ValueError: no tokens, another shape, or a value that is not finite.
        """
        x = np.asarray(tokens, dtype=np.float64)
        if x.ndim != 2 or not len(x):
            raise ValueError(f"moments of an array {x.shape}: wants tokens [n, D] with n > 0")
        mean = x.mean(0)
        centred = x - mean
        scatter = centred.T @ centred
        if not np.isfinite(scatter).all():
            bad = np.flatnonzero(~np.isfinite(x).all(1))
            raise ValueError(
                f"moments: {len(bad)} of {len(x)} tokens are not finite, first {bad[:1]}"
            )
        return cls(len(x), mean, scatter)

    def covariance(self) -> Matrix:
        """Return the population covariance [D, D]."""
        return self.scatter / self.count

    def std(self) -> Vector:
        """Return the population standard deviation of each coordinate [D]."""
        return np.sqrt(np.diag(self.scatter) / self.count)


def merge(a: Moments, b: Moments) -> Moments:
    """Return the moments of both sets of tokens together (Chan, Golub and LeVeque, 1979).

    Raises:
        ValueError: moments of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"moments of widths {len(a.mean)} and {len(b.mean)} do not merge")
    count = a.count + b.count
    shift = b.mean - a.mean
    mean = a.mean + shift * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, mean, scatter)


def mixed(parts: Sequence[Moments], shares: Sequence[float]) -> Moments:
    """Return the moments of tokens that are drawn from several sets, however many were measured.

    Args:
        parts: of each set.
        shares: of all draws that fall to it; they sum to 1.

    Returns:
        mean and covariance of a draw; the count is that of all parts.
    """
    if len(parts) == 1:
        return parts[0]
    count = sum(part.count for part in parts)
    mean = np.add.reduce([s * part.mean for part, s in zip(parts, shares, strict=True)])
    covariance = np.add.reduce(
        [
            s * (part.covariance() + np.outer(part.mean - mean, part.mean - mean))
            for part, s in zip(parts, shares, strict=True)
        ]
    )
    return Moments(count, mean, covariance * count)
