"""Synthetic logs of two domains with planted truth: which source categories help, and which mislead.

Every user has a taste that rules the target domain and an unrelated one. Whether a user likes an item depends on a
taste and the item's category. In *helpful* source categories the ruling taste is the target's own; in *harmful* ones it
is the unrelated one; in *neutral* ones likes are coin flips. The same embedding of the user has to serve all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cdr_dist.data.hashing import key


@dataclass(frozen=True)
class Planted:
    """Size and shape of the logs."""

    users: int = 3000
    tastes: int = 8
    target_behaviours: int = 6
    """Per user; the last two are test and validation."""
    source_behaviours: int = 40
    target_items: int = 600
    source_items: int = 2000
    target_categories: int = 10
    helpful: int = 10
    """Source categories that follow the target's taste."""
    neutral: int = 0
    harmful: int = 10
    """Source categories that follow the unrelated taste."""
    certainty: float = 0.9
    """Probability that a liked category's item is rated high, and a disliked one's low."""
    seed: int = 8


@dataclass(frozen=True)
class PlantedLogs:
    """Logs (user_id, item_id, timestamp, rating, category) and the truth (category, kind)."""

    source: pl.DataFrame
    target: pl.DataFrame
    truth: pl.DataFrame


def planted_logs(shape: Planted) -> PlantedLogs:
    """A pure function of the shape and its seed."""
    random = np.random.default_rng(int(key("planted", shape.seed)))
    kinds = ["helpful"] * shape.helpful + ["neutral"] * shape.neutral + ["harmful"] * shape.harmful
    own, other = random.integers(0, shape.tastes, (2, shape.users))
    ruling = np.stack([{"helpful": own, "harmful": other}.get(kind, own) for kind in kinds], axis=1)
    target_taste = np.repeat(own[:, None], shape.target_categories, axis=1)
    certainty = np.array([0.5 if kind == "neutral" else shape.certainty for kind in kinds])
    source = _log("s", shape, random, ruling, certainty, shape.source_behaviours, shape.source_items, 0)
    target = _log(
        "t",
        shape,
        random,
        target_taste,
        np.full(shape.target_categories, shape.certainty),
        shape.target_behaviours,
        shape.target_items,
        1_000,
    )
    truth = pl.DataFrame({"category": [f"s{c:02d}" for c in range(len(kinds))], "kind": kinds})
    return PlantedLogs(source, target, truth)


def _log(
    prefix: str,
    shape: Planted,
    random: np.random.Generator,
    taste: NDArray[np.int64],
    certainty: NDArray[np.float64],
    behaviours: int,
    items: int,
    after: int,
) -> pl.DataFrame:
    """taste [users, categories]: the taste that rules each user's likes in each category."""
    categories = taste.shape[1]
    # Every category is liked by half of the tastes: without the user's taste nothing can be told.
    half = np.arange(shape.tastes) < shape.tastes / 2
    liked = np.stack([random.permutation(half) for _ in range(categories)], axis=1)
    user = np.repeat(np.arange(shape.users), behaviours)
    item = random.integers(0, items, len(user))
    category = item % categories
    likes = liked[taste[user, category], category]
    high = random.random(len(user)) < np.where(likes, certainty[category], 1 - certainty[category])
    order = np.tile(np.arange(behaviours), shape.users)
    return pl.DataFrame(
        {
            "user_id": [f"u{u:06d}" for u in user],
            "item_id": [f"{prefix}{i:06d}" for i in item],
            "timestamp": order + after,
            "rating": np.where(high, 5.0, 1.0),
            "category": [f"{prefix}{c:02d}" for c in category],
        }
    )
