"""The transform of the grid codecs: a row of patches to nearly independent coefficients, and back.

    z = (x - mean) / std        [H, W, D]
    y = C_H z C_W, times basis  [H, W, D]       frequencies (i, j), directions

C is the orthonormal cosine transform (DCT-II). The basis has the directions of largest variance of
the standardised tokens, the widest first: the KLT of the store's own second moments. Where fewer
tokens were measured than make these out, the seeded rotation of the rotated codecs stands in for
them: the grid is used, the channels' covariance is not.
"""

from dataclasses import dataclass, field

import numpy as np

from cache.codec.encoded import Floats, Moments
from cache.codec.quantised import standard
from cache.codec.rotation import Rotation, cosine_transform

TOKENS_A_CHANNEL = 4
"""Measured, at least, where directions of largest variance are to be made out."""


@dataclass(frozen=True, eq=False)
class GridTransform:
    """The transform of rows [N, D], N = H W, of one store.

    Attributes:
        grid: (H, W) of a row's tokens.
        mean: float32 [D].
        std: float32 [D], above zero.
        basis: float32 [D, D], a direction a column; of width 0 where the rotation stands in.
        rotation: that stands in; None where there is a basis.
    """

    grid: tuple[int, int]
    mean: Floats
    std: Floats
    basis: Floats
    rotation: Rotation | None = field(init=False)

    def __post_init__(self) -> None:
        rotated = not self.basis.size
        object.__setattr__(self, "rotation", Rotation(len(self.mean)) if rotated else None)

    @classmethod
    def fitted(cls, name: str, grid: tuple[int, int], moments: Moments) -> "GridTransform":
        """Fit the transform of a codec to the moments of a store's tokens."""
        mean, std = standard(name, moments)
        count, _, scatter = moments
        basis = np.zeros((len(mean), 0), np.float32)
        if count >= TOKENS_A_CHANNEL * len(mean):
            each = std.astype(np.float64)
            _, found = np.linalg.eigh(scatter / each / each[:, None])
            basis = np.ascontiguousarray(found[:, ::-1], np.float32)
        return cls(grid, mean, std, basis)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of a row."""
        return self.grid[0] * self.grid[1], len(self.mean)

    def standardised(self, patches: Floats) -> Floats:
        """Return patches [..., D] less the mean, in standard deviations."""
        with np.errstate(over="ignore", invalid="ignore"):
            z: Floats = (patches - self.mean) / self.std
        return z

    def coefficients(self, z: Floats) -> Floats:
        """Transform standardised rows [n, N, D] along channels and grid."""
        (rows, columns), dim = self.grid, z.shape[-1]
        with np.errstate(over="ignore", invalid="ignore"):
            turned = z @ self.basis if self.rotation is None else self.rotation.forward(z)
            down = cosine_transform(rows) @ turned.reshape(len(z), rows, columns * dim)
            across = cosine_transform(columns) @ down.reshape(len(z), rows, columns, dim)
        return np.asarray(across.reshape(z.shape), np.float32)

    def patches(self, coefficients: Floats) -> Floats:
        """Undo `coefficients` and `standardised`: float32 [n, N, D]."""
        (rows, columns), (num_rows, _, dim) = self.grid, coefficients.shape
        parts = coefficients.reshape(num_rows, rows, columns, dim)
        across = cosine_transform(columns).T @ parts
        down = cosine_transform(rows).T @ across.reshape(num_rows, rows, columns * dim)
        turned = down.reshape(coefficients.shape)
        z = turned @ self.basis.T if self.rotation is None else self.rotation.inverse(turned)
        return np.asarray(z * self.std + self.mean, np.float32)
