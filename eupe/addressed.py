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

    splitmix64 under the address's bits as key: one hash of text for a whole array of draws. Each
    step of it can be undone, so that different numbers have different bits.
    """
    x = numbers.astype(np.uint64)
    x += np.uint64(1)
    x *= _GOLDEN  # wraps, as meant
    x += np.uint64(bits(address))
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def shuffled(count: int, address: str) -> npt.NDArray[np.int64]:
    """Return the numbers below `count` in the order of their bits at an address: int64 [count].

    The order is `np.argsort(hashed(np.arange(count), address))`, found by sorting numbers that hold
    the highest of the bits and the place; the few that are equal in those are put right at the end.
    """
    width = np.uint64(max(count - 1, 1).bit_length())
    keys = hashed(np.arange(count), address)
    keys >>= width
    keys <<= width
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    order = (keys & ((np.uint64(1) << width) - np.uint64(1))).view(np.int64)
    keys >>= width
    equal = np.flatnonzero(keys[1:] == keys[:-1])
    places = np.union1d(equal, equal + 1)
    unsure = order[places]
    order[places] = unsure[np.argsort(hashed(unsure, address))]
    return order


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
