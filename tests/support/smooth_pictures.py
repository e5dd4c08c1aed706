"""Rows of patches as teachers give them: smooth over the grid, few strong directions."""

import numpy as np

from cache.codec.encoded import Fitting
from cache.codec.grid import GridCodec


def pictures(grid: tuple[int, int], dim: int, count: int, seed: int = 0) -> np.ndarray:
    """Rows [count, N, D]: smooth over the grid, few strong directions, channels of all widths."""
    rng = np.random.default_rng(seed)
    own = np.random.default_rng(1)  # what every picture of this teacher has in common
    spread, mean = np.exp(own.standard_normal(dim)), own.standard_normal(dim)
    turn = np.linalg.qr(own.standard_normal((dim, dim)))[0]
    i, j = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    power = (1 + np.hypot(i, j)[:, None]) ** -3.0 * (1 + np.arange(dim)) ** -1.5
    y = rng.standard_normal((count, len(power), dim)) * np.sqrt(power)
    waves = np.kron(_cosines(grid[0]), _cosines(grid[1]))
    rows = np.einsum("fn,rfd->rnd", waves, y) @ turn.T
    return (rows / np.sqrt(power.mean()) * spread + mean).astype(np.float32)


def _cosines(size: int) -> np.ndarray:
    k, n = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.cos(np.pi * (2 * n + 1) * k / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def moments_of(rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
    tokens = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    centred = tokens - tokens.mean(axis=0)
    return len(tokens), tokens.mean(axis=0), centred.T @ centred


def grid_codec(
    name: str, grid: tuple[int, int], dim: int, measured: int = 10_000, seed: int = 0
) -> GridCodec:
    """Return a codec fitted to pictures and so many tokens: few give a rotation, not a basis."""
    sample = pictures(grid, dim, 40, seed)
    _, mean, scatter = moments_of(sample)
    scatter *= measured / (40 * grid[0] * grid[1])
    return GridCodec.fitted(name, Fitting((measured, mean, scatter), grid, sample))


def token_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest difference, in root mean squares of its token; of a NaN, NaN."""
    size = np.sqrt(np.square(theirs, dtype=np.float64).mean(-1, keepdims=True))
    return float((np.abs(ours - theirs) / size).max())
