"""What a day's own rows look like, and how that differs from the night before: what a model meets that is new.

A finding warns; it decides nothing (the gate does).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest
from cdr_dist.data.keys import Keys
from cdr_dist.data.words import check, option

CATEGORIES = 200
"""Target categories whose shares are kept, the largest; the others are one."""
REST = "(all others)"
LEAST_SHARE = 1e-4
"""What a category that is not there counts as, so that the stability index stays finite."""


@dataclass(frozen=True)
class DriftOptions:
    """From where on a difference from the night before is worth a warning."""

    rows: float = option(0.5, "drift: relative change of the day's rows and users")
    label_rate: float = option(0.2, "drift: relative change of the share of likes")
    history: float = option(0.3, "drift: relative change of the mean history length")
    unseen: float = option(0.1, "drift: change of the share of rows whose user, or item, training has not seen")
    psi: float = option(0.25, "drift: population stability index of the target categories' shares")

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(value >= 0, f"drift.{name}={value}: must not be negative")


@dataclass(frozen=True)
class Day:
    """Of a day's test rows. unseen_user, unseen_item: shares of rows that training never saw; histories: mean lengths;
    categories: shares of the largest."""

    rows: int
    users: int
    label_rate: float
    unseen_user: float
    unseen_item: float
    target_history: float
    source_history: float
    categories: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """of: in words; `change` as measured, `large` from `limit` on."""

    of: str
    before: float
    now: float
    change: float
    limit: float

    @property
    def large(self) -> bool:
        return not self.change <= self.limit


def day_of(folder: str, manifest: Manifest) -> Day:
    """The day whose rows are the test split of a dataset."""
    columns = ["user", "label", "category", "target_history_item", "source_history_item"]
    parts = [
        pl.read_parquet(io.BytesIO(storage.read_bytes(storage.join(folder, shard.path))), columns=columns).with_columns(
            pl.col("target_history_item").list.len(), pl.col("source_history_item").list.len()
        )
        for shard in manifest.shards["test"]
    ]
    rows = pl.concat(parts) if parts else pl.DataFrame(schema=dict.fromkeys(columns, pl.Int64))
    unseen = manifest.unseen["test"]
    counted = rows.group_by("category").len().sort("len", "category", descending=[True, False])
    keys = Keys(folder, manifest, "target_category").of(counted["category"].to_numpy().astype(np.int64))
    shares = dict(zip(keys.to_pylist(), (counted["len"] / max(1, rows.height)).to_list(), strict=True))
    largest = dict(list(shares.items())[:CATEGORIES])
    if len(shares) > CATEGORIES:
        largest[REST] = 1.0 - sum(largest.values())
    means = {name: _mean(rows[f"{name}_item"]) for name in ("target_history", "source_history")}
    users, likes = rows["user"].n_unique(), _mean(rows["label"])
    return Day(rows.height, users, likes, unseen["user"], unseen["item"], **means, categories=largest)


def changes(before: Day, now: Day, options: DriftOptions) -> list[Change]:
    """One of each measure."""

    def relative(of: str, name: str, limit: float) -> Change:
        a, b = float(getattr(before, name)), float(getattr(now, name))
        change = abs(b - a) / a if a else (0.0 if a == b else math.inf)
        return Change(of, a, b, change, limit)

    def absolute(of: str, name: str) -> Change:
        a, b = float(getattr(before, name)), float(getattr(now, name))
        return Change(of, a, b, abs(b - a), options.unseen)

    return [
        relative("rows", "rows", options.rows),
        relative("users", "users", options.rows),
        relative("share of likes", "label_rate", options.label_rate),
        absolute("rows of unseen users", "unseen_user"),
        absolute("rows of unseen items", "unseen_item"),
        relative("target history, mean length", "target_history", options.history),
        relative("source history, mean length", "source_history", options.history),
        Change("categories, stability index", 0.0, 0.0, stability(before.categories, now.categories), options.psi),
    ]


def stability(before: Mapping[str, float], now: Mapping[str, float]) -> float:
    """Population stability index: sum (q - p) ln(q / p) over all categories; below .1 little, above .25 much."""
    names = sorted({*before, *now})
    p, q = (np.array([max(of.get(name, 0.0), LEAST_SHARE) for name in names]) for of in (before, now))
    return float(((q - p) * np.log(q / p)).sum()) if names else 0.0


def day_from(raw: Mapping[str, Any] | None) -> Day | None:
    """As night.json holds it; None where it is not there, or of another version."""
    try:
        return Day(**raw) if raw else None
    except TypeError:
        return None


def _mean(of: pl.Series) -> float:
    found = of.mean()
    return float(found) if isinstance(found, int | float) else 0.0
