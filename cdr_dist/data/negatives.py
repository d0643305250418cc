"""Sampled negatives: uniform over the items, avoiding given lists, a pure function of each row's coordinates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.hashing import integers, mix

_ATTEMPTS = 64


def draw_negatives(
    start: np.uint64,
    coordinates: tuple[NDArray[np.int64] | int, ...],
    owner: NDArray[np.int64],
    avoid_owner: NDArray[np.int64],
    avoid_item: NDArray[np.int64],
    items: int,
) -> NDArray[np.int64]:
    """One item id in FIRST_ID .. items - 1 for each row of `owner`, outside the owner's list.

    owner [n]: whose list a row must avoid; (avoid_owner, avoid_item) [m]: the lists, in long form. A rejected draw is
    repeated with the next attempt's bits. After 64 attempts (a list that covers nearly all items) the last stands.
    """
    along = [np.broadcast_to(np.asarray(c), owner.shape) for c in coordinates]
    taken = np.sort(avoid_owner.astype(np.int64) * items + avoid_item)
    drawn = np.empty(len(owner), dtype=np.int64)
    todo = np.arange(len(owner))
    for attempt in range(_ATTEMPTS):
        bits = mix(start, *(c[todo] for c in along), np.int64(attempt))
        drawn[todo] = FIRST_ID + integers(bits, items - FIRST_ID)
        wanted = owner[todo] * items + drawn[todo]
        place = np.minimum(np.searchsorted(taken, wanted), max(len(taken) - 1, 0))
        hit = taken[place] == wanted if len(taken) else np.zeros(len(todo), dtype=bool)
        todo = todo[hit]
        if not len(todo):
            break
    return drawn
