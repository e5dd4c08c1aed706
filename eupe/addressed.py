"""Randomness by address: what is drawn under a name is the same on every machine, for ever (law 2).

An address is a string that names the draw: who draws, the seed of the run or policy, and what it is
drawn for. Its sha256 is the randomness; nothing is consumed, so nothing depends on what was drawn
before. Addresses are never changed: another string is another draw.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

MOST_BITS = 256
"""Bits of one address."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bits(address: str, count: int = 64) -> int:
    """Return the random bits of an address: its sha256, lowest first, as a number below 2^count.

    Args:
        address: of the draw.
        count: bits wanted, at most MOST_BITS.
    """
    return int.from_bytes(hashlib.sha256(address.encode()).digest(), "little") % (1 << count)


def hashed(numbers: npt.NDArray[np.int64], address: str) -> npt.NDArray[np.uint64]:
    """Return 64 random bits for each number at an address: uint64 [n] of int64 [n].

    splitmix64 under the address's bits as key: one hash of text for a whole array of draws.
    """
    key = np.uint64(bits(address))
    x = (numbers.astype(np.uint64) + np.uint64(1)) * _GOLDEN + key  # wraps, as meant
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def named(names: Iterable[str], address: str) -> npt.NDArray[np.uint64]:
    """Return 64 random bits for each name at an address, uint64 [n]: `bits` of both, joined."""
    digests = (hashlib.sha256(f"{address}{name}".encode()).digest() for name in names)
    return np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8")


def uniforms(address: str, count: int) -> list[float]:
    """Return numbers in [0, 1) at an address, 53 random bits each.

    The raw stream of a bit generator is what numpy promises never to change (NEP 19).
    """
    raw = np.random.PCG64(bits(address, MOST_BITS)).random_raw(count)
    return [int(drawn >> 11) * 2.0**-53 for drawn in raw.tolist()]
