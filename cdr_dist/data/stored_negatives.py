"""The negatives stored with a validation or test row, a pure function of (seed, example_id), data and options.

uniform: every item that is not excluded is as likely. popularity: an item's weight is its training behaviours to a
power, so that one that training does not have is never drawn. With replacement draws are independent. Without, they
are made one after the other, each by weight among the items that are neither excluded nor drawn before: as if draws
that hit such an item were made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data import hashing
from cdr_dist.data.behaviours import Behaviours, Ints
from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.errors import UserError

Floats = NDArray[np.float64]

BLOCK_DRAWS = 1 << 22
SPARE = 0.5, 0.05
"""Least share of all weight that is free to the last draw, where draws are repeated until they fit (uniform; by
popularity, where looking at all items takes longer). With less, that could go on for long: all items are looked at."""


@dataclass(frozen=True)
class Catalogue:
    """Target items, whose ids start at 2, and how they are drawn; popularity [items]: their weights; None: uniform."""

    items: int
    count: int
    popularity: Floats | None = None
    replacement: bool = False

    @cached_property
    def weight(self) -> Floats:
        return np.ones(self.items) if self.popularity is None else self.popularity

    @cached_property
    def ends(self) -> Floats:
        return np.cumsum(self.weight)

    @property
    def needed(self) -> int:
        """Items that must be left to a row."""
        return 1 if self.replacement else self.count

    def free(self, avoided: Floats) -> np.ndarray:
        """Whether so much weight stays free for every draw that those which do not fit may be repeated."""
        most = 0.0 if self.replacement else float(np.sort(self.weight)[::-1][: self.count].sum())
        return self.weight.sum() - avoided - most >= SPARE[self.popularity is not None] * self.weight.sum()

    def at(self, bits: np.ndarray) -> Ints:
        """64 random bits -> items."""
        if self.popularity is None:
            return hashing.integers(bits, self.items) + FIRST_ID
        return _drawn(self.ends, hashing.uniform(bits)) + FIRST_ID


@dataclass(frozen=True)
class Rows:
    """Validation and test rows: their users, examples and items, [n] each."""

    user: Ints
    example_id: Ints
    item: Ints

    def at(self, rows: Ints) -> Rows:
        return Rows(self.user[rows], self.example_id[rows], self.item[rows])


def stored_negatives(seed: int, rows: Rows, excluded: Behaviours, catalogue: Catalogue) -> Ints:
    """Item ids [n, count]. excluded: what no row of a user gets, besides its own item.

    UserError: a row is left too few items.
    """
    taken, n = _Taken.of(excluded, catalogue.items), catalogue.items
    if len(rows.user) and (left := int(taken.left(rows, catalogue.weight > 0).min())) < catalogue.needed:
        drawable = f"{int((catalogue.weight > 0).sum())} target items"
        drawable += "" if catalogue.popularity is None else " that training has"
        raise UserError(
            f"eval_negatives={catalogue.count}: the catalogue has {drawable}, of which one user leaves {left}; "
            "take fewer negatives"
        )
    found = np.empty((len(rows.user), catalogue.count), dtype=np.int64)
    free = catalogue.free(catalogue.weight.sum() - taken.left(rows, catalogue.weight))
    key = hashing.key(seed, "negatives")
    of_all = _independent if catalogue.replacement else _ranked
    for draw, some, width in (
        (of_all, np.flatnonzero(~free), n),
        (_rejected, np.flatnonzero(free), 2 * catalogue.count),
    ):
        step = max(1, BLOCK_DRAWS // width)
        for first in range(0, len(some), step):
            block = some[first : first + step]
            found[block] = draw(key, rows.at(block), taken, catalogue)
    return found


@dataclass(frozen=True)
class _Taken:
    """Pairs of a user and an item that is not drawn for them, as codes in order."""

    codes: Ints
    width: int
    users: int

    @classmethod
    def of(cls, excluded: Behaviours, items: int) -> _Taken:
        width = items + FIRST_ID
        codes = np.unique(excluded.user * np.int64(width) + excluded.item)
        return cls(codes[codes % width >= FIRST_ID], width, excluded.users)

    def has(self, rows: Rows, item: Ints) -> np.ndarray:
        """Of items [n, m], whether a row must not have them."""
        return self._excluded(rows.user[:, None], item) | (item == rows.item[:, None])

    def left(self, rows: Rows, of: np.ndarray) -> Floats:
        """What is left of the items' values `of` [items] to each row [n]."""
        user, item = self.codes // self.width, self.codes % self.width - FIRST_ID
        of_user = np.bincount(user, weights=of[item], minlength=self.users)
        own = (rows.item >= FIRST_ID) & ~self._excluded(rows.user, rows.item)
        return of.sum() - of_user[rows.user] - np.where(own, of[np.maximum(rows.item - FIRST_ID, 0)], 0)

    def _excluded(self, user: Ints, item: Ints) -> np.ndarray:
        codes = user * self.width + item
        if not len(self.codes):
            return np.zeros(codes.shape, dtype=bool)
        at = np.searchsorted(self.codes, codes)
        return (at < len(self.codes)) & (self.codes[np.minimum(at, len(self.codes) - 1)] == codes)


def _ranked(key: np.uint64, rows: Rows, taken: _Taken, catalogue: Catalogue) -> Ints:
    """The `count` allowed items with the lowest random bits; by popularity, those whose clocks ring first: each rings
    after an exponential time at the rate of its weight, so that the next one is drawn by weight among those left."""
    item = np.broadcast_to(np.arange(FIRST_ID, FIRST_ID + catalogue.items), (len(rows.user), catalogue.items))
    bits = hashing.mix(key, rows.example_id[:, None], item)
    if catalogue.popularity is None:
        times = bits >> np.uint64(1)
        times[taken.has(rows, item)] = np.uint64(2**64 - 1)
        return np.argsort(times, axis=1, kind="stable")[:, : catalogue.count] + FIRST_ID
    with np.errstate(divide="ignore"):
        rings = -np.log(hashing.uniform(bits)) / catalogue.weight
    rings[taken.has(rows, item)] = np.inf
    return np.argsort(rings, axis=1, kind="stable")[:, : catalogue.count] + FIRST_ID


def _independent(key: np.uint64, rows: Rows, taken: _Taken, catalogue: Catalogue) -> Ints:
    """`count` draws by weight among the allowed items."""
    item = np.broadcast_to(np.arange(FIRST_ID, FIRST_ID + catalogue.items), (len(rows.user), catalogue.items))
    ends = np.cumsum(np.where(taken.has(rows, item), 0.0, catalogue.weight), axis=1)
    drawn = hashing.uniform(hashing.mix(key, rows.example_id[:, None], np.arange(catalogue.count)))
    return np.stack([_drawn(of_row, x) for of_row, x in zip(ends, drawn, strict=True)]) + FIRST_ID


def _rejected(key: np.uint64, rows: Rows, taken: _Taken, catalogue: Catalogue) -> Ints:
    """The first `count` of the row's draws 0, 1, … that are allowed and, without replacement, new."""
    count = catalogue.count
    result = np.empty((len(rows.user), count), dtype=np.int64)
    open_rows, width = np.arange(len(rows.user)), count + 8
    while len(open_rows):
        now = rows.at(open_rows)
        item = catalogue.at(hashing.mix(key, now.example_id[:, None], np.arange(width)))
        good = ~taken.has(now, item)
        if not catalogue.replacement:
            good &= _is_first(item)
        done = good.sum(axis=1) >= count
        chosen = good[done] & (np.cumsum(good[done], axis=1) <= count)
        result[open_rows[done]] = item[done][chosen].reshape(-1, count)
        open_rows, width = open_rows[~done], 2 * width
    return result


def _drawn(ends: Floats, uniform: Floats) -> Ints:
    """Places in running sums of weights; one of weight 0 is never found, whatever is rounded."""
    last = int(np.searchsorted(ends, ends[-1]))
    return np.minimum(np.searchsorted(ends, uniform * ends[-1], side="right"), last)


def _is_first(item: Ints) -> np.ndarray:
    order = np.argsort(item, axis=1, kind="stable")
    ordered = np.take_along_axis(item, order, axis=1)
    fresh = np.ones_like(item, dtype=bool)
    np.put_along_axis(fresh, order[:, 1:], ordered[:, 1:] != ordered[:, :-1], axis=1)
    return fresh
