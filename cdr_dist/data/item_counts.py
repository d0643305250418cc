"""How often training has each target item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

from cdr_dist.data import partitions, splits
from cdr_dist.data.partitions import Partition


def training_counts(parts: Sequence[Partition]) -> pl.DataFrame:
    """item_id, count: the positive behaviours of the train split, over all partitions, one of them in memory."""
    counted = pl.DataFrame(schema={"item_id": pl.String, "count": pl.Int64})
    for part in parts:
        rows, items = (partitions.read_ordered(part, name) for name in ("target", "target_items"))
        trains = rows.filter((pl.col("split") == splits.TRAIN) & (pl.col("label") > 0))["item"]
        count = np.bincount(trains.to_numpy(), minlength=items.height)
        counted = pl.concat([counted, items.select("item_id", count=pl.Series(count, dtype=pl.Int64))])
        counted = counted.group_by("item_id").agg(pl.col("count").sum())
    return counted
