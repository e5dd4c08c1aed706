"""Bounds that benchmarks.codec sets codecs against: the best R2 of Gaussian features at a rate.

Three, each of a source with the second moments of the real features (which are not Gaussian):

    tokens   tokens are independent draws of one Gaussian: what codes of single tokens could reach
    grid     a picture is one Gaussian, its coefficients by frequency and direction independent:
             what codes of whole pictures could reach
    scalar   the same, and every coefficient is rounded by itself to a uniform grid, one step for
             all, its codes written with as many bits as their entropy: what the rounding of the
             grid codecs could reach, if rows had variable length

The first two are rate-distortion theory's reverse water-filling (Cover & Thomas, 10.3.3).
"""

import math

import numpy as np

STEPS = np.geomspace(1e-2, 20, 400)
"""Of a uniform quantiser, in standard deviations."""


def water_filled_r2(variances: np.ndarray, bits: float) -> float:
    """Return the largest R2 of independent Gaussian coefficients, by reverse water-filling.

    Args:
        variances: of the coefficients, any shape.
        bits: per coefficient.
    """
    variances = variances.reshape(-1).clip(min=0)
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        water = (low + high) / 2
        rate = 0.5 * np.log2(np.maximum(variances / water, 1)).mean() if water > 0 else np.inf
        low, high = (low, water) if rate < bits else (water, high)
    return 1 - float(np.minimum(variances, high).sum() / variances.sum())


def tokens_r2(covariance: np.ndarray, bits: float) -> float:
    """Return the bound of independent tokens with this covariance [D, D]."""
    return water_filled_r2(np.linalg.eigvalsh(covariance), bits)


def grid_variances(rows: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return the variance of each frequency and direction of rows [n, H, W, D]: [H W, D]."""
    _, basis = np.linalg.eigh(covariance)
    _, height, width, dim = rows.shape
    y = (rows - mean) @ basis
    y = np.einsum("ia,jb,nabd->nijd", cosines(height), cosines(width), y, optimize=True)
    variance: np.ndarray = np.square(y).mean(axis=0).reshape(height * width, dim)
    return variance


def cosines(size: int) -> np.ndarray:
    """Return the orthonormal cosine transform (DCT-II), [m, m]."""
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    matrix: np.ndarray = np.cos(np.pi * (2 * n + 1) * k / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def scalar_r2(variances: np.ndarray, bits: float) -> float:
    """Return the R2 of uniform quantisers with ideal entropy coding, one step for all.

    Args:
        variances: of the coefficients, any shape.
        bits: per coefficient.
    """
    spread = np.sqrt(variances.reshape(-1).clip(min=0))
    spread = spread[spread > 0]
    share = len(spread) / variances.size
    entropy, distortion = np.array([uniform_quantiser(step) for step in STEPS]).T
    low, high = np.log(spread.min() * STEPS[0]), np.log(spread.max() * STEPS[-1])
    for _ in range(100):
        middle = (low + high) / 2
        steps = np.exp(middle) / spread
        rate = share * float(np.interp(steps, STEPS, entropy).mean())
        low, high = (middle, high) if rate > bits else (low, middle)
    error = np.interp(np.exp(high) / spread, STEPS, distortion) * spread**2
    return 1 - float(error.sum() / np.square(spread).sum())


def uniform_quantiser(step: float) -> tuple[float, float]:
    """Return entropy in bits and squared error of a unit Gaussian, rounded to multiples of a step.

    Each cell is decoded to its mean.
    """
    cells = math.ceil(9 / step) + 1
    edges = (np.arange(-cells, cells + 1) + 0.5) * step
    cumulative = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
    mass = np.diff(cumulative, prepend=0, append=1)
    density = np.exp(-0.5 * np.square(edges)) / math.sqrt(2 * math.pi)
    first = -np.diff(density, prepend=0, append=0)
    there = mass > 0
    entropy = -float((mass[there] * np.log2(mass[there])).sum())
    return entropy, 1 - float((np.square(first[there]) / mass[there]).sum())
