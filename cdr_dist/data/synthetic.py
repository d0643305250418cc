"""Synthetic logs of two domains with planted truth: which source categories help, and which mislead.

A user has *own tastes* that rule the target domain, and *other tastes* that have nothing to do with it; each a yes or
a no. Whether the user likes an item follows from the taste that rules the item's category: one of the own tastes in
the target and in *helpful* source categories, one of the others in *harmful* categories, none in *neutral* ones (likes
are coin flips). One embedding of the user has to serve all of them, so what the harmful and neutral categories teach it
is lost to the target.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cdr_dist.data.hashing import key
from cdr_dist.errors import UserError


@dataclass(frozen=True)
class Planted:
    """Size and shape of the logs; docs/demo-data.md says what the defaults were chosen by.

    `Planted(neutral=0, harmful=0)` is a source that only helps, `Planted(helpful=0)` one that never does.
    """

    users: int = 4000
    own_tastes: int = 4
    """Tastes of a user that rule the target; its categories and the helpful ones are split among them."""
    other_tastes: int = 12
    """Tastes that the target knows nothing of; the harmful categories are split among them. With the own ones more than
    a row of the tables has values, so that the tastes compete for them."""
    target_behaviours: int = 10
    """Per user; the last two are validation and test. Two a taste to train on: not enough to be certain."""
    source_behaviours: int = 80
    """Per user, all before the target's."""
    target_categories: int = 8
    target_items: int = 8
    """Few, in both domains: the label depends on an item's category only, and rare items are merely memorised."""
    source_items: int = 36
    helpful: int = 8
    """Source categories that follow the own tastes."""
    neutral: int = 4
    """Source categories whose likes are coin flips."""
    harmful: int = 24
    """Source categories that follow the other tastes; many more than the helpful ones: joint training suffers."""
    certainty: float = 0.8
    """Probability that a target item is rated as the ruling taste says: high where liked, low where not."""
    source_certainty: float = 0.9
    """The same in the source: it tells more about the user than the target's own few behaviours do."""
    seed: int = 8

    def __post_init__(self) -> None:
        for name in ("users", "own_tastes", "other_tastes", "source_behaviours", "target_categories"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("helpful", "neutral", "harmful"):
            _check(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _check(self.target_behaviours >= 3, "target_behaviours", self.target_behaviours, "at least 3")
        _check(len(self.kinds) >= 1, "helpful + neutral + harmful", len(self.kinds), "at least 1")
        for name in ("certainty", "source_certainty"):
            _check(0.5 <= getattr(self, name) <= 1.0, name, getattr(self, name), "between 0.5 and 1")
        for items, categories in (("target_items", self.target_categories), ("source_items", len(self.kinds))):
            _check(getattr(self, items) >= categories, items, getattr(self, items), f"at least {categories}, one each")

    @property
    def kinds(self) -> list[str]:
        """The kind of each source category."""
        return ["helpful"] * self.helpful + ["neutral"] * self.neutral + ["harmful"] * self.harmful


def _check(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"planted data: {name}={value}: must be {wanted}")


@dataclass(frozen=True)
class PlantedLogs:
    """Logs (user_id, item_id, timestamp, rating, category) and the truth: the kind of each source category, or user."""

    source: pl.DataFrame
    target: pl.DataFrame
    truth: pl.DataFrame


def planted_logs(shape: Planted) -> PlantedLogs:
    """A pure function of the shape and its seed."""
    random = np.random.default_rng(int(key("planted", shape.seed)))
    own = random.random((shape.own_tastes, shape.users)) < 0.5
    others = random.random((shape.other_tastes, shape.users)) < 0.5
    coin_flips = np.zeros(shape.users, dtype=bool)
    source_likes = [*_split(own, shape.helpful), *[coin_flips] * shape.neutral, *_split(others, shape.harmful)]
    target_likes = _split(own, shape.target_categories)
    certainty = [0.5 if kind == "neutral" else shape.source_certainty for kind in shape.kinds]
    source = _log(random, "s", source_likes, certainty, shape.source_behaviours, shape.source_items, first_time=0)
    certainty = [shape.certainty] * shape.target_categories
    after = shape.source_behaviours
    target = _log(random, "t", target_likes, certainty, shape.target_behaviours, shape.target_items, first_time=after)
    truth = pl.DataFrame({"category": [f"s{c:02d}" for c in range(len(shape.kinds))], "kind": shape.kinds})
    return PlantedLogs(source, target, truth)


def _split(tastes: NDArray[np.bool_], categories: int) -> list[NDArray[np.bool_]]:
    """[tastes, users] -> one [users] a category, in turn."""
    return [tastes[number % len(tastes)] for number in range(categories)]


def _log(
    random: np.random.Generator,
    prefix: str,
    likes: list[NDArray[np.bool_]],
    certainty: list[float],
    behaviours: int,
    items: int,
    first_time: int,
) -> pl.DataFrame:
    """likes[c] [users]: who likes category c; ratings say so with certainty[c]."""
    users, categories = len(likes[0]), len(likes)
    user = np.repeat(np.arange(users), behaviours)
    item = random.integers(0, items, len(user))
    category = item % categories
    truthful = random.random(len(user)) < np.array(certainty)[category]
    high = np.stack(likes)[category, user] == truthful
    return pl.DataFrame(
        {
            "user_id": [f"u{u:06d}" for u in user],
            "item_id": [f"{prefix}{i:06d}" for i in item],
            "timestamp": np.tile(np.arange(first_time, first_time + behaviours), users),
            "rating": np.where(high, 5.0, 1.0),
            "category": [f"{prefix}{c:02d}" for c in category],
        }
    )
