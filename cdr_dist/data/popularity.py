"""Items drawn by Zipf's law, without a table of probabilities."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def zipf_ranks(uniform: NDArray[np.float64], items: int, exponent: float) -> NDArray[np.int64]:
    """Ranks 0..items-1 (0 the most popular) from numbers in (0, 1): P(rank r) about 1 / (r + 1)^exponent.

    The inverse of the continuous law over [0.5, items + 0.5], rounded: rank 0 gets up to a tenth more than its share
    (exponent 1), ranks from 2 on less than a hundredth.
    """
    low, high, power = 0.5, items + 0.5, 1.0 - exponent
    if abs(power) < 1e-9:
        place = low * (high / low) ** uniform
    else:
        place = (low**power + uniform * (high**power - low**power)) ** (1.0 / power)
    return np.clip(np.rint(place).astype(np.int64), 1, items) - 1


def scattered(rank: NDArray[np.int64], items: int) -> NDArray[np.int64]:
    """Item numbers 0..items-1, one for each rank: neighbours in popularity lie far apart, as in a sorted vocabulary."""
    step = max(1, round(items * 0.6180339887))
    while math.gcd(step, items) != 1:
        step += 1
    return rank * step % items
