"""Users of a generated dataset: their behaviours are a function of (seed, user, place), so nothing is ever stored.

Labels have something to learn: an item's category names one of a user's tastes, which the label follows with
`certainty`. Target categories and every other source category name the same tastes; the rest of the source has
tastes of its own.
"""

from __future__ import annotations

import numpy as np

from cdr_dist.data import splits
from cdr_dist.data.behaviours import Behaviours, Ints
from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.examples import Examples
from cdr_dist.data.generate_options import GenerateOptions
from cdr_dist.data.hashing import integers, key, mix, uniform
from cdr_dist.data.popularity import scattered, zipf_ranks

TASTES = 16
START, SPAN = 1_600_000_000, 365 * 24 * 3600
"""Seconds: all behaviours lie in this year."""


class Domain:
    """One domain's behaviours. Users and items are counted from 0 here; their ids start at FIRST_ID."""

    def __init__(self, options: GenerateOptions, role: str) -> None:
        self.role = role
        self.items: int = getattr(options, f"{role}_items")
        self.categories: int = getattr(options, f"{role}_categories")
        self._options = options
        self._mean = getattr(options, f"{role}_behaviours") / options.users

    def counts(self, users: Ints) -> Ints:
        """How many behaviours each user has: geometric, at least one, cut at `longest`."""
        goes_on = 1.0 - 1.0 / self._mean
        if goes_on <= 0:
            return np.ones(len(users), dtype=np.int64)
        more = np.log(uniform(mix(self._key("count"), users))) / np.log(goes_on)
        return np.minimum(1 + more.astype(np.int64), self._options.longest)

    def behaviours(self, users: Ints) -> Behaviours:
        """All behaviours of the given users, by user and time; items are ids."""
        counts = self.counts(users)
        owner = np.repeat(np.arange(len(users)), counts)
        place = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
        user = users[owner]
        draw = uniform(mix(self._key("item"), user, place))
        item = scattered(zipf_ranks(draw, self.items, self._options.exponent), self.items)
        gap = SPAN // counts[owner]
        time = START + place * gap + integers(mix(self._key("time"), user, place), gap)
        return Behaviours(len(users), owner, item + FIRST_ID, time, self._labels(user, place, item))

    def category_ids(self, items: Ints) -> Ints:
        return integers(mix(self._key("category"), items), self.categories) + FIRST_ID

    def _labels(self, user: Ints, place: Ints, item: Ints) -> np.ndarray:
        if self._options.labels == "sampled":
            return np.ones(len(user), dtype=np.float32)
        category = self.category_ids(item)
        shared = (self.role == "target") | (category % 2 == 0)
        taste = mix(key(self._options.seed, "taste"), user, np.where(shared, category, -category) % TASTES, ~shared)
        sure = uniform(mix(self._key("label"), user, place)) < self._options.certainty
        return ((taste & np.uint64(1)).astype(bool) == sure).astype(np.float32)

    def _key(self, name: str) -> np.uint64:
        return key(self._options.seed, "generated", self.role, name)


class Users:
    """Makes the examples of any users."""

    def __init__(self, options: GenerateOptions) -> None:
        self.prepared = options.prepared()
        self.source, self.target = Domain(options, "source"), Domain(options, "target")

    def examples(self, users: Ints, first_example: Ints) -> Examples:
        """users, first_example (the id of a user's first example): [n]."""
        target, source = self.target.behaviours(users), self.source.behaviours(users)
        return Examples(
            self.prepared,
            self.target.items,
            target,
            source,
            splits.split_of_behaviours(target, self.prepared),
            (users + FIRST_ID).astype(np.int32),
            first_example,
            np.ones(len(target.item), dtype=bool),  # counted apart: no user's own behaviours tell
            self.target.category_ids(target.item - FIRST_ID).astype(np.int32),
            self.source.category_ids(source.item - FIRST_ID).astype(np.int32),
        )
