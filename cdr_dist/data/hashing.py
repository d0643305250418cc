"""Counter-based random numbers: every draw is a pure function of its coordinates (seed, epoch, row, …).

Nothing here holds state, so a draw does not depend on the worker, the batch or the order of calls.
The mixing function is SplitMix64's finaliser (Steele, Lea & Flood 2014).
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from cdr_dist.compiled import compiled

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key(*parts: int | str) -> np.uint64:
    """A 64-bit key from names and numbers, the same on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


def _finalise(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix(start: np.uint64, *coordinates: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each (broadcast) tuple of integer coordinates."""
    with np.errstate(over="ignore"):
        state = np.asarray(start, dtype=np.uint64)
        for c in coordinates:
            values = np.asarray(c)
            if values.dtype != np.uint64:
                values = values.astype(np.int64).view(np.uint64)
            state = _finalise((state ^ values) + _GOLDEN)
        return np.asarray(state)


def integers(bits: NDArray[np.uint64], n: ArrayLike) -> NDArray[np.int64]:
    """Maps 64 random bits to 0..n-1 (n up to 2^32; the bias is below n / 2^32)."""
    n64 = np.asarray(n).astype(np.uint64)
    return (((bits >> np.uint64(32)) * n64) >> np.uint64(32)).astype(np.int64)


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Maps 64 random bits to the open interval (0, 1)."""
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * (1.0 / (1 << 53))


def of_keys(keys: pa.Array) -> NDArray[np.uint64]:
    """64 bits of each text, the same on every machine: FNV-1a over its bytes (Fowler, Noll & Vo), mixed."""
    texts = keys.cast(pa.large_string())
    _, offsets, content = texts.buffers()
    bounds = np.frombuffer(offsets, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(content, dtype=np.uint8) if content else np.zeros(0, dtype=np.uint8)
    return mix(key("text"), _fnv(letters, bounds))


@compiled()
def _fnv(letters: NDArray[np.uint8], bounds: NDArray[np.int64]) -> NDArray[np.uint64]:
    found = np.empty(len(bounds) - 1, dtype=np.uint64)
    for i in range(len(found)):
        state = np.uint64(0xCBF29CE484222325)
        for at in range(bounds[i], bounds[i + 1]):
            state = (state ^ np.uint64(letters[at])) * np.uint64(0x100000001B3)
        found[i] = state
    return found


def permutation(start: np.uint64, n: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1, a pure function of the key: the order of random numbers whose low bits are the index.

    Sorting them takes a quarter of the time that argsort does.
    """
    index = np.arange(n, dtype=np.uint64)
    low = np.uint64((1 << n.bit_length()) - 1)
    drawn = np.sort((mix(start, index) & ~low) | index)
    return (drawn & low).astype(np.int64)
