"""Sampled negatives: uniform over the items, avoiding given lists, a pure function of each row's coordinates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.hashing import integers, mix
from cdr_dist.data.lists import Lists

_ATTEMPTS = 64


def draw_negatives(
    start: np.uint64,
    coordinates: tuple[NDArray[np.int64] | int, ...],
    avoid: Lists,
    rows: NDArray[np.int64],
    items: int,
) -> NDArray[np.int64]:
    """One item id in FIRST_ID .. items - 1 for each of `rows` [n], outside that row's list of `avoid`.

    A rejected draw is repeated with the next attempt's bits. After 64 attempts (a list that covers nearly all items)
    the last stands.
    """
    along = [np.broadcast_to(np.asarray(c), rows.shape) for c in coordinates]
    drawn = np.empty(len(rows), dtype=np.int64)
    todo = np.arange(len(rows))
    for attempt in range(_ATTEMPTS):
        bits = mix(start, *(c[todo] for c in along), np.int64(attempt))
        drawn[todo] = FIRST_ID + integers(bits, items - FIRST_ID)
        todo = todo[avoid.contain(rows[todo], drawn[todo])]
        if not len(todo):
            break
    return drawn
