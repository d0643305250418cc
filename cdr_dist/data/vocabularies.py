"""Vocabularies: what occurs in the partitions, merged, sorted by key (bytewise) and numbered from 2."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.crash_points import durable
from cdr_dist.data import partitions, spill, storage
from cdr_dist.data.dataset import FIRST_ID, ITEM_VOCAB_SCHEMA, UNKNOWN, VOCAB_SCHEMA, Shard
from cdr_dist.data.partitions import Partition

OTHERS = "others"
"""The category of an item for which none is known."""


@dataclass(frozen=True)
class Items:
    """One domain's items. `items`: item_id, known (may training see it), category, id, category_id; by item_id."""

    items: pl.DataFrame
    categories: pl.DataFrame  # key, id

    @property
    def known(self) -> pl.DataFrame:
        return self.items.filter(pl.col("id") >= FIRST_ID)


def merge_items(parts: Sequence[Partition], domain: str, categories: pl.DataFrame | None, train_only: bool) -> Items:
    """The items of a domain over all partitions; in memory stay the distinct items and one partition."""
    merged, pending = _merge_items([]), []
    for part in parts:
        pending.append(partitions.read_ordered(part, f"{domain}_items"))
        if sum(p.height for p in pending) > merged.height:  # so that the work stays linear
            merged, pending = _merge_items([merged, *pending]), []
    merged = _merge_items([merged, *pending]).sort("item_id")
    if categories is not None:
        merged = merged.drop("category").join(categories, on="item_id", how="left", maintain_order="left")
    merged = merged.with_columns(pl.col("category").fill_null(OTHERS))
    merged = number(merged, "item_id", train_only)
    kept = merged.filter(pl.col("id") >= FIRST_ID).select(key="category").unique().sort("key")
    kept = kept.with_columns(id=pl.int_range(FIRST_ID, FIRST_ID + pl.len(), dtype=pl.Int32))
    named = merged.join(kept.rename({"key": "category", "id": "category_id"}), on="category", how="left")
    unknown = pl.col("id") == UNKNOWN
    category_id = pl.when(unknown).then(UNKNOWN).otherwise("category_id").cast(pl.Int32)
    return Items(named.with_columns(category_id=category_id).sort("item_id"), kept)


def _merge_items(tables: list[pl.DataFrame]) -> pl.DataFrame:
    empty = pl.DataFrame(schema={"item_id": pl.String, "category": pl.String, "known": pl.Boolean})
    rows = pl.concat([empty, *tables])
    return rows.group_by("item_id").agg(pl.col("category").min(), pl.col("known").any())


def merge_users(parts: Sequence[Partition], train_only: bool) -> pl.DataFrame:
    """All users by user_id: id, partition, known, and first_example, the example_id of their first behaviour."""
    tables = [partitions.read_ordered(p, "users").with_columns(partition=pl.lit(p.number)) for p in parts]
    users = pl.concat(tables).sort("user_id")
    assert users["user_id"].is_unique().all(), "a user's behaviours went to two partitions"
    first = pl.col("behaviours").cum_sum() - pl.col("behaviours")
    return number(users.with_columns(first_example=first), "user_id", train_only)


def number(rows: pl.DataFrame, by: str, train_only: bool) -> pl.DataFrame:
    """Adds `id`: 2, 3, … in the order of `by`; with `train_only` 1 (unknown) where training cannot know it."""
    known = pl.col("known") if train_only else pl.lit(True)
    ids = pl.when(known).then(known.cast(pl.Int32).cum_sum() + (FIRST_ID - 1)).otherwise(UNKNOWN)
    if not train_only:
        ids = pl.int_range(FIRST_ID, FIRST_ID + pl.len())
    return rows.sort(by).with_columns(id=ids.cast(pl.Int32))


def spill_users(uri: str, users: pl.DataFrame, buckets: int) -> str:
    """Gives every partition its users' id and first_example, in the partition's own order."""
    columns = users.select("id", "first_example").to_arrow(compat_level=pl.CompatLevel.oldest())
    return spill.write(uri, columns, users["partition"].to_numpy(), buckets)


def write_vocabulary(folder: str, name: str, rows: pl.DataFrame, key: str) -> Shard:
    """Writes `vocab/NAME.parquet`: the real keys only; ids 0 (padding) and 1 (unknown) have no row."""
    schema = ITEM_VOCAB_SCHEMA if name.endswith("_item") else VOCAB_SCHEMA
    columns = {"id": rows["id"], "key": rows[key]}
    if schema is ITEM_VOCAB_SCHEMA:
        columns["category"] = rows["category_id"]
    table = pl.DataFrame(columns).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 20)
    path = f"vocab/{name}.parquet"
    with durable("prepare.vocabulary"):
        storage.write_bytes(storage.join(folder, path), sink.getvalue())
    groups = pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata
    rows_of_groups = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    return Shard(path, table.num_rows, rows_of_groups, len(sink.getvalue()), storage.sha256(sink.getvalue()))
