"""A seeded orthogonal rotation in O(D log D): random signs, a small dense factor, Hadamard blocks.

The width is D = m * 2^k with m odd. The rotation of a vector x is (C_m (x) H_2^k) (s * x): s random
signs, H the Hadamard matrix, C the orthonormal cosine transform (DCT-II), (x) the Kronecker
product. It spreads a few large coefficients over all, so that what it gives is close to Gaussian
whatever the features' tails are, and one table of levels serves every teacher.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np
import numpy.typing as npt

from cache.codec.encoded import Floats
from eupe.addressed import MOST_BITS, bits


@dataclass(frozen=True)
class Rotation:
    """The rotation of vectors of width `dim`.

    Attributes:
        dim: D.
        seed: of the signs.
        dense: float32 [m, m], the odd part of D.
        signs: float32 [D], each -1 or 1.
    """

    dim: int
    seed: int = 0
    dense: Floats = field(init=False, repr=False, compare=False)
    signs: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        odd = self.dim
        while odd % 2 == 0:
            odd //= 2
        object.__setattr__(self, "dense", cosine_transform(odd))
        object.__setattr__(self, "signs", _signs(self.seed, self.dim))

    @property
    def block(self) -> int:
        """Side of a Hadamard block, the even part of D."""
        return self.dim // len(self.dense)

    def to_json_dict(self) -> dict[str, object]:
        """Everything that it takes to undo it elsewhere (docs/store_format.md)."""
        return {
            "seed": self.seed,
            "cosine": len(self.dense),
            "hadamard": self.block,
            "signs": np.packbits(self.signs > 0).tobytes().hex(),
        }

    def forward(self, vectors: Floats) -> Floats:
        """Rotate vectors [..., D]."""
        parts = (vectors * self.signs).reshape(-1, len(self.dense), self.block)
        rotated: Floats = np.matmul(self.dense, hadamard(parts))
        return rotated.reshape(vectors.shape)

    def inverse(self, vectors: Floats) -> Floats:
        """Undo `forward`; H is its own inverse, the transpose is C's."""
        parts = vectors.reshape(-1, len(self.dense), self.block)
        return hadamard(np.matmul(self.dense.T, parts)).reshape(vectors.shape) * self.signs


def hadamard(vectors: Floats) -> Floats:
    """Multiply vectors [..., 2^k] by the orthonormal Hadamard matrix of Sylvester's order."""
    size = vectors.shape[-1]
    out = np.array(vectors, np.float32, order="C")  # its reshaping below is a view
    half = 1
    while half < size:
        pairs = out.reshape(-1, size // (2 * half), 2, half)
        even, odd = pairs[:, :, 0].copy(), pairs[:, :, 1]
        pairs[:, :, 0] += odd
        np.subtract(even, odd, out=odd)
        half *= 2
    out *= np.float32(size**-0.5)
    return out


@cache
def cosine_transform(size: int) -> Floats:
    """Return the orthonormal cosine transform (DCT-II) of so many values, float32 [m, m]."""
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * size)) * np.sqrt(2 / size)
    matrix[0] *= np.sqrt(0.5)
    return np.asarray(matrix, np.float32)


def _signs(seed: int, dim: int) -> Floats:
    """Draw signs float32 [D], 256 of them an address."""
    blocks = [
        bits(f"cache.rotation/{seed}/{number}", MOST_BITS).to_bytes(MOST_BITS // 8, "little")
        for number in range(-(-dim // MOST_BITS))
    ]
    drawn: npt.NDArray[np.uint8] = np.unpackbits(np.frombuffer(b"".join(blocks), np.uint8))[:dim]
    return np.where(drawn == 1, np.float32(1), np.float32(-1))
