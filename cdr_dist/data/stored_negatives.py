"""The negatives stored with a validation or test row: uniform, without replacement, none a positive of the user."""

from __future__ import annotations

import numpy as np

from cdr_dist.data import hashing
from cdr_dist.data.behaviours import Behaviours, Ints
from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.errors import UserError

BLOCK_DRAWS = 1 << 22


def stored_negatives(seed: int, user: Ints, example_id: Ints, positives: Behaviours, items: int, count: int) -> Ints:
    """Item ids [rows, count], from `items` ids that start at 2; a pure function of (seed, example_id) and positives.

    `positives` are the users' positives of every split. UserError where a user leaves too few items.
    """
    excluded = np.unique(positives.user * np.int64(items + FIRST_ID) + positives.item)
    excluded = excluded[excluded % (items + FIRST_ID) >= FIRST_ID]
    avoided = np.bincount(excluded // (items + FIRST_ID), minlength=positives.users)[user]
    if len(user) and (left := int((items - avoided).min())) < count:
        raise UserError(
            f"eval_negatives={count}: the catalogue has {items} target items, of which one user leaves {left}; "
            "take fewer negatives"
        )
    drawn = np.empty((len(user), count), dtype=np.int64)
    # Where most of the catalogue is taken, drawing until it fits could go on for long: rank all items instead.
    dense = 2 * (avoided + count) > items
    key = hashing.key(seed, "negatives")
    for draw, rows, width in ((_ranked, np.flatnonzero(dense), items), (_rejected, np.flatnonzero(~dense), 2 * count)):
        step = max(1, BLOCK_DRAWS // width)
        for first in range(0, len(rows), step):
            block = rows[first : first + step]
            drawn[block] = draw(key, user[block], example_id[block], excluded, items, count)
    return drawn


def _taken(user: Ints, item: Ints, excluded: Ints, items: int) -> np.ndarray:
    codes = user[:, None] * (items + FIRST_ID) + item
    at = np.searchsorted(excluded, codes)
    return (at < len(excluded)) & (excluded[np.minimum(at, max(len(excluded) - 1, 0))] == codes)


def _ranked(key: np.uint64, user: Ints, example_id: Ints, excluded: Ints, items: int, count: int) -> Ints:
    """The `count` allowed items with the lowest random bits."""
    item = np.broadcast_to(np.arange(FIRST_ID, FIRST_ID + items), (len(user), items))
    bits = hashing.mix(key, example_id[:, None], item) >> np.uint64(1)
    bits[_taken(user, item, excluded, items)] = np.uint64(2**64 - 1)
    return np.argsort(bits, axis=1, kind="stable")[:, :count] + FIRST_ID


def _rejected(key: np.uint64, user: Ints, example_id: Ints, excluded: Ints, items: int, count: int) -> Ints:
    """The first `count` of the row's draws 0, 1, … that are allowed and new; at least half of all items are."""
    result = np.empty((len(user), count), dtype=np.int64)
    open_rows, width = np.arange(len(user)), count + 8
    while len(open_rows):
        bits = hashing.mix(key, example_id[open_rows, None], np.arange(width))
        item = hashing.integers(bits, items) + FIRST_ID
        good = ~_taken(user[open_rows], item, excluded, items) & _is_first(item)
        done = good.sum(axis=1) >= count
        chosen = good[done] & (np.cumsum(good[done], axis=1) <= count)
        result[open_rows[done]] = item[done][chosen].reshape(-1, count)
        open_rows, width = open_rows[~done], 2 * width
    return result


def _is_first(item: Ints) -> np.ndarray:
    order = np.argsort(item, axis=1, kind="stable")
    ordered = np.take_along_axis(item, order, axis=1)
    fresh = np.ones_like(item, dtype=bool)
    np.put_along_axis(fresh, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return fresh
