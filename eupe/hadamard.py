"""Hadamard matrices of every order that Sylvester's and Paley's constructions reach (numpy)."""

import math

import numpy as np
import numpy.typing as npt

from eupe.errors import BadInput


def hadamard(order: int) -> npt.NDArray[np.float64]:
    """Return an orthogonal matrix [order, order] whose entries all have magnitude order^-1/2.

    The Kronecker product of a Paley matrix, of type I (q + 1, q a prime = 3 mod 4) or II
    (2 (q + 1), q a prime = 1 mod 4), and Sylvester's of order 2^k. This covers the usual widths:
    192, 384, 768, 1024, 1152, 1280, 1536, 4096.

    Raises:
        BadInput: an order out of reach.
    """
    core = order
    while core >= 1:
        paley = _paley(core)
        if paley is not None:
            matrix = paley
            while len(matrix) < order:
                matrix = np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), matrix)
            return matrix / math.sqrt(order)
        if core % 2:
            break
        core //= 2
    raise BadInput(f"no Hadamard matrix of order {order} is constructed here")


def _paley(order: int) -> npt.NDArray[np.float64] | None:
    if order in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    if order % 4:
        return None
    if _is_prime(order - 1):  # type I: order - 1 is 3 mod 4
        skew = _conference(order - 1, border=-1.0)
        return np.eye(order) + skew
    half = order // 2
    if half % 4 == 2 and _is_prime(half - 1):  # type II: half - 1 is 1 mod 4
        symmetric = _conference(half - 1, border=1.0)
        signs, diagonal = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
        return np.kron(symmetric, signs) + np.kron(np.eye(half), diagonal)
    return None


def _conference(q: int, border: float) -> npt.NDArray[np.float64]:
    """Return quadratic residues mod q as signs, zero diagonal, with a border: [q + 1, q + 1]."""
    residue = np.full(q, -1.0)
    residue[[x * x % q for x in range(1, q)]] = 1.0
    residue[0] = 0.0
    index = np.arange(q)
    matrix = np.ones((q + 1, q + 1))
    matrix[1:, 1:] = residue[(index[:, None] - index) % q]
    matrix[1:, 0] = border
    matrix[0, 0] = 0.0
    return matrix


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
