"""The simplest recommender: an item's score is how much everybody liked it in training."""

from __future__ import annotations

import io

import numpy as np
import polars as pl

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest
from cdr_dist.evaluation.metrics import ScoredRows

PRIOR = 20.0
"""Ratings' worth of belief in the mean share of likes: an item with few ratings stands near it."""


def popularity(folder: str, manifest: Manifest, split: str) -> ScoredRows:
    """Every row of a split with its stored negatives, in the order of `Predictions.gather`.

    The score is log(1 + behaviours in training) where labels are sampled, else the share of likes among the item's
    training ratings, drawn towards that of all by PRIOR ratings.
    """
    train = _read(folder, manifest, "train", ["item", "label"])
    size = manifest.rows["target_item"]
    item, label = train["item"].to_numpy(), train["label"].to_numpy().astype(np.float64)
    count, likes = np.bincount(item, minlength=size), np.bincount(item, weights=label, minlength=size)
    sampled = manifest.label == "sampled"
    of_item = np.log1p(count) if sampled else (likes + PRIOR * label.mean()) / (count + PRIOR)
    columns = ["example_id", "user", "item", "label"]
    rows = _read(folder, manifest, split, [*columns, "negatives_item"])
    own = rows.select(columns)
    negatives = rows.select("example_id", "user", item="negatives_item").explode("item").drop_nulls("item")
    parts = [own, negatives.with_columns(label=pl.lit(0.0, dtype=pl.Float32)).select(columns)] if sampled else [own]
    every = pl.concat(parts).sort("example_id", -pl.col("label"), maintain_order=True)
    user, example = (every[name].to_numpy().astype(np.int64) for name in ("user", "example_id"))
    return ScoredRows(user, every["label"].to_numpy().astype(np.float64), of_item[every["item"].to_numpy()], example)


def training_behaviours(folder: str, manifest: Manifest) -> np.ndarray:
    """Of every user id, how many training rows there are, [users]."""
    users = _read(folder, manifest, "train", ["user"])["user"].to_numpy()
    return np.bincount(users, minlength=manifest.rows["user"])


def _read(folder: str, manifest: Manifest, split: str, columns: list[str]) -> pl.DataFrame:
    shards = [storage.join(folder, shard.path) for shard in manifest.shards[split]]
    return pl.concat(pl.read_parquet(io.BytesIO(storage.read_bytes(uri)), columns=columns) for uri in shards)
