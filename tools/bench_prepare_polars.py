"""The baseline of `prepare`: the same rows by polars, in blocks of users so that they fit into memory.

It does a little less: no checks, no checksums, and rows are shuffled within their block only.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

BLOCK_USERS = 50_000
FIRST_ID, HISTORY, CANDIDATES, TARGET_CANDIDATES, THRESHOLD = 2, 50, 100, 1000, 3.0
ROW_GROUP_ROWS = 20_000


def polars(logs: Path, out: Path) -> None:
    """Defaults of prepare: labels by rating, leave_last, users of both domains, histories of the past."""
    read = {d: pl.read_parquet(logs / d / "*.parquet") for d in ("source", "target")}
    users = read["target"].select("user_id").unique().join(read["source"].select("user_id").unique(), on="user_id")
    user = numbered(users, "user_id", "user")
    rows = {d: with_ids(read.pop(d), user, out / "vocab", d) for d in ("source", "target")}
    write(user.rename({"user_id": "key", "user": "id"}), out / "vocab/user.parquet")
    rows["target"] = rows["target"].with_row_index("example_id")
    for first in range(FIRST_ID, FIRST_ID + user.height, BLOCK_USERS):
        block = pl.col("user").is_between(first, first + BLOCK_USERS - 1)
        found = examples(rows["target"].filter(block), rows["source"].filter(block))
        for number, split in enumerate(("train", "valid", "test")):
            part = found.filter(pl.col("split") == number).drop("split").sample(fraction=1.0, shuffle=True, seed=8)
            write(part, out / split / f"part-{first:09d}.parquet")


def numbered(rows: pl.DataFrame, by: str, name: str) -> pl.DataFrame:
    return rows.unique(by).sort(by).with_row_index(name, offset=FIRST_ID).with_columns(pl.col(name).cast(pl.Int32))


def with_ids(log: pl.DataFrame, user: pl.DataFrame, vocab: Path, domain: str) -> pl.DataFrame:
    """user, item, category, timestamp, label by (user, timestamp); writes the vocabularies."""
    log = log.join(user, on="user_id")
    items = numbered(log.group_by("item_id").agg(key=pl.col("category").min()), "item_id", "item")
    categories = numbered(items.select("key"), "key", "category")
    items = items.join(categories, on="key")
    write(items.select("item_id", "item", "category"), vocab / f"{domain}_item.parquet")
    write(categories, vocab / f"{domain}_category.parquet")
    label = (pl.col("rating") > THRESHOLD).cast(pl.Float32)
    found = log.drop("category").join(items.drop("key"), on="item_id", maintain_order="left")
    found = found.select("user", "item", "category", "timestamp", label=label)
    return found.sort("user", "timestamp", maintain_order=True)


def examples(target: pl.DataFrame, source: pl.DataFrame) -> pl.DataFrame:
    """The rows of one block of users, both inputs ordered by user and time."""
    place, count = pl.int_range(pl.len()).over("user"), pl.len().over("user").cast(pl.Int64)
    target = target.with_columns(place=place, count=count)
    from_end = pl.col("count") - pl.col("place")
    split = pl.when(pl.col("count") < 3).then(0).when(from_end == 1).then(2).when(from_end == 2).then(1).otherwise(0)
    positives = pl.col("label").cast(pl.Int64)
    before = (positives.cum_sum() - positives).over("user")
    target = target.with_columns(split=split.cast(pl.Int8), target_before=before)

    source = source.with_columns(before=(positives.cum_sum() - positives).over("user").cast(pl.Int32))
    liked = source.filter(pl.col("label") > 0).with_columns(source_before=pl.int_range(1, pl.len() + 1).over("user"))
    target = target.join_asof(
        liked.select("user", "timestamp", "source_before"),
        on="timestamp",
        by="user",
        allow_exact_matches=False,
        check_sortedness=False,
    )
    limit = pl.when(pl.col("count") < 3).then(pl.col("count") - 1).otherwise(pl.col("count") - 2)
    limits = target.filter(pl.col("place") == limit).select("user", limit="timestamp")
    seen = source.join(limits, on="user", maintain_order="left").filter(pl.col("timestamp") < pl.col("limit"))
    trained = target.filter(pl.col("split") == 0)

    target = target.join(lists(target.filter(pl.col("label") > 0), "target_history", 10**9), on="user", how="left")
    target = target.join(lists(liked, "source_history", 10**9), on="user", how="left")
    earlier = (pl.col("source_before").fill_null(0) - HISTORY).clip(lower_bound=0).cast(pl.Int32)
    target = target.with_columns(source_history_first=earlier)
    for domain in ("target", "source"):
        before = pl.col(f"{domain}_before").fill_null(0)
        start, length = (before - HISTORY).clip(lower_bound=0), before.clip(upper_bound=HISTORY)
        target = target.with_columns(
            pl.col(f"{domain}_history_{part}").list.slice(start, length).fill_null([]) for part in ("item", "category")
        )
    target = target.join(
        lists(seen, "source_candidates", CANDIDATES, "label", "timestamp", "before"), on="user", how="left"
    )
    target = target.join(lists(trained, "target_candidates", TARGET_CANDIDATES, "label"), on="user", how="left")
    position = pl.when(pl.col("split") == 0).then(pl.col("place")).otherwise(-1).cast(pl.Int32)
    return target.with_columns(position=position).drop("place", "count", "target_before", "source_before")


def lists(rows: pl.DataFrame, name: str, most: int, *more: str) -> pl.DataFrame:
    """A user's last rows as lists."""
    columns = [pl.col(part).tail(most).alias(f"{name}_{part}") for part in ("item", "category", *more)]
    return rows.group_by("user", maintain_order=True).agg(columns)


def write(rows: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.write_parquet(path, compression="zstd", row_group_size=ROW_GROUP_ROWS)
