"""The simplest recommender: an item's score is how much everybody liked it in training."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cdr_dist.data import storage
from cdr_dist.data.dataset import FIRST_ID, Manifest
from cdr_dist.evaluation.metrics import ScoredRows, gains_at_ranks

PRIOR = 20.0
"""Ratings' worth of belief in the mean share of likes: an item with few ratings stands near it."""
TRAINED = "target_candidates_item"
"""What the user of a row trained on."""


def popularity(folder: str, manifest: Manifest, split: str) -> ScoredRows:
    """Every row of a split with its stored negatives, in the order of `Predictions.gather`.

    The score is log(1 + behaviours in training) where labels are sampled, else the share of likes among the item's
    training ratings, drawn towards that of all by PRIOR ratings.
    """
    sampled, of_item = manifest.label == "sampled", _of_items(folder, manifest)
    columns = ["example_id", "user", "item", "label"]
    rows = _read(folder, manifest, split, [*columns, "negatives_item"])
    own = rows.select(columns)
    negatives = rows.select("example_id", "user", item="negatives_item").explode("item").drop_nulls("item")
    parts = [own, negatives.with_columns(label=pl.lit(0.0, dtype=pl.Float32)).select(columns)] if sampled else [own]
    every = pl.concat(parts).sort("example_id", -pl.col("label"), maintain_order=True)
    user, example = (every[name].to_numpy().astype(np.int64) for name in ("user", "example_id"))
    return ScoredRows(user, every["label"].to_numpy().astype(np.float64), of_item[every["item"].to_numpy()], example)


def full_ranking(folder: str, manifest: Manifest, split: str, ks: Sequence[int]) -> dict[str, float]:
    """`hr@K`, `ndcg@K`, `mrr@K` of a split's positives among all target items but those that their users trained on.

    Items that score alike count as tied (`evaluation.metrics.gains_at_ranks`).
    """
    score = _of_items(folder, manifest)
    inside = np.sort(score[FIRST_ID:])
    rows = _read(folder, manifest, split, ["item", "label", TRAINED]).filter(pl.col("label") > 0)
    own = score[rows["item"].to_numpy()]
    above = len(inside) - np.searchsorted(inside, own, side="right")
    tied = np.searchsorted(inside, own, side="right") - np.searchsorted(inside, own, side="left")
    tied += rows["item"].to_numpy() < FIRST_ID  # an unknown item is none of `inside`, and ties with itself
    pairs = rows.select("item", TRAINED).with_row_index("row").explode(TRAINED).drop_nulls(TRAINED).unique()
    row, theirs = (pairs[name].to_numpy() for name in ("row", TRAINED))
    others = theirs != pairs["item"].to_numpy()
    np.subtract.at(above, row, others & (score[theirs] > own[row]))
    np.subtract.at(tied, row, others & (score[theirs] == own[row]))
    return gains_at_ranks(above, tied, ks)


def training_behaviours(folder: str, manifest: Manifest) -> np.ndarray:
    """Of every user id, how many training rows there are, [users]."""
    users = _read(folder, manifest, "train", ["user"])["user"].to_numpy()
    return np.bincount(users, minlength=manifest.rows["user"])


def _of_items(folder: str, manifest: Manifest) -> NDArray[np.float64]:
    train = _read(folder, manifest, "train", ["item", "label"])
    size = manifest.rows["target_item"]
    item, label = train["item"].to_numpy(), train["label"].to_numpy().astype(np.float64)
    count, likes = np.bincount(item, minlength=size), np.bincount(item, weights=label, minlength=size)
    if manifest.label == "sampled":
        return np.log1p(count)
    return (likes + PRIOR * label.mean()) / (count + PRIOR)


def _read(folder: str, manifest: Manifest, split: str, columns: list[str]) -> pl.DataFrame:
    shards = [storage.join(folder, shard.path) for shard in manifest.shards[split]]
    return pl.concat(pl.read_parquet(io.BytesIO(storage.read_bytes(uri)), columns=columns) for uri in shards)
