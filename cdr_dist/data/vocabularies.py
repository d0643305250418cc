"""Vocabularies: what occurs in the partitions, merged, sorted by key (bytewise) and numbered from 2.

Where an earlier dataset is extended, its keys keep their ids and what is new is numbered behind them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.crash_points import durable
from cdr_dist.data import interactions, partitions, spill, storage
from cdr_dist.data.dataset import FIRST_ID, ITEM_VOCAB_SCHEMA, UNKNOWN, VOCAB_SCHEMA, Shard
from cdr_dist.data.earlier import Earlier, Numbered
from cdr_dist.data.feature_names import USER
from cdr_dist.data.partitions import Partition
from cdr_dist.data.prepare_options import PrepareOptions

OTHERS = "others"
"""The category of an item for which none is known."""


@dataclass(frozen=True)
class Items:
    """One domain's items, those of an earlier dataset included.

    items: item_id, known (may training see it), count (of positives), category, id, category_id and a list of value ids
    for each declared column; by item_id.
    """

    items: pl.DataFrame
    categories: pl.DataFrame  # key, id
    values: dict[str, pl.DataFrame]  # declared column -> key, id

    @property
    def known(self) -> pl.DataFrame:
        return self.items.filter(pl.col("id") >= FIRST_ID)


@dataclass(frozen=True)
class Users:
    """keys: key, id and a list of value ids for each declared column. values: declared column -> key, id."""

    keys: pl.DataFrame
    values: dict[str, pl.DataFrame]


def merge_items(
    parts: Sequence[Partition], domain: str, described: pl.DataFrame | None, earlier: Earlier | None = None
) -> Items:
    """The items of a domain over all partitions; in memory stay the distinct items and one partition.

    described: what item files say of items (`interactions.read_items`).
    """
    options = parts[0].options
    merged, pending = _merge_items([]), []
    for part in parts:
        pending.append(partitions.read_ordered(part, f"{domain}_items"))
        if sum(p.height for p in pending) > merged.height:  # so that the work stays linear
            merged, pending = _merge_items([merged, *pending]), []
    merged = _merge_items([merged, *pending, _all_classes(options, domain)]).sort("item_id")
    if described is not None:
        merged = merged.join(described, on="item_id", how="left", maintain_order="left", suffix="_described")
        merged = merged.with_columns(pl.coalesce("category_described", "category").alias("category"))
    if earlier is not None and earlier.knows(domain):
        merged = _with_earlier(merged, earlier.items(domain))
    merged = merged.with_columns(pl.col("category").fill_null(_others(options, domain)))

    def before(name: str) -> Numbered:
        return earlier.numbered(f"{domain}_{name}") if earlier else Numbered.nothing()

    of_classes = domain == "target" and options.classes > 0
    merged = number(merged, "item_id", options.vocab == "train" and not of_classes, before("item"))
    known = merged.filter(pl.col("id") >= FIRST_ID)
    kept = _number_keys(known["category"].unique(), before("category"))
    named = merged.join(kept.rename({"key": "category", "id": "category_id"}), on="category", how="left")
    unknown = pl.col("id") == UNKNOWN
    category_id = pl.when(unknown).then(UNKNOWN).otherwise("category_id").cast(pl.Int32)
    named = named.with_columns(category_id=category_id).sort("item_id")
    values = {}
    for column in options.features_of(domain):
        shared = _shared(known[column], options.feature_items)
        values[column] = _number_keys(shared, before(column))
        named = named.with_columns(_value_ids(named[column], values[column]))
    return Items(named, kept, values)


def _all_classes(options: PrepareOptions, domain: str) -> pl.DataFrame:
    """A row for every class, as of an item that never occurs."""
    numbers = [str(n) for n in range(options.classes if domain == "target" else 0)]
    items = pl.DataFrame({"item_id": pl.Series(numbers, dtype=pl.String)})
    nothing = {"category": pl.lit(None, dtype=pl.String), "known": pl.lit(False), "count": pl.lit(0, dtype=pl.Int64)}
    return items.select("item_id", **nothing)


def _with_earlier(items: pl.DataFrame, earlier: pl.DataFrame) -> pl.DataFrame:
    """Those that occur no more as well; of the others, what is not said any more is as it was."""
    said = [column for column in earlier.columns if column != "item_id"]
    both = items.join(earlier, on="item_id", how="full", coalesce=True, suffix="_earlier")
    as_it_was = [pl.coalesce(column, f"{column}_earlier").alias(column) for column in said]
    return both.select("item_id", pl.col("known").fill_null(False), pl.col("count").fill_null(0), *as_it_was)


def _others(options: PrepareOptions, domain: str) -> pl.Expr:
    """The category of an item without one: of its own domain's items, where several share the role."""
    several = domain == "source" and options.several_sources
    own = pl.col("item_id").str.extract(r"^([^:]*:)") if several else pl.lit("")
    return own + OTHERS


def _shared(lists: pl.Series, least: int) -> pl.Series:
    """The values that at least so many items have."""
    counted = lists.explode().drop_nulls().alias("key").value_counts(name="items")
    return counted.filter(pl.col("items") >= least)["key"]


def _number_keys(keys: pl.Series, before: Numbered) -> pl.DataFrame:
    """key, id of these keys and of all that were there before, by id."""
    new = pl.DataFrame({"key": keys.cast(pl.String)}).join(before.keys, on="key", how="anti").sort("key")
    ids = pl.int_range(before.rows, before.rows + pl.len(), dtype=pl.Int32)
    return pl.concat([before.keys, new.select("key", id=ids)])


def _value_ids(lists: pl.Series, values: pl.DataFrame) -> pl.Series:
    """Each item's ids in the order of its values; what has none is unknown, once."""
    ids = pl.element().replace_strict(values["key"], values["id"], default=UNKNOWN, return_dtype=pl.Int32)
    found = lists.fill_null(pl.lit([], dtype=lists.dtype)).list.eval(ids)
    return found.list.unique(maintain_order=True).alias(lists.name)


def _merge_items(tables: list[pl.DataFrame]) -> pl.DataFrame:
    schema = {"item_id": pl.String, "category": pl.String, "known": pl.Boolean, "count": pl.Int64}
    rows = pl.concat([pl.DataFrame(schema=schema), *tables]).filter(pl.col("item_id").is_not_null())
    return rows.group_by("item_id").agg(pl.col("category").min(), pl.col("known").any(), pl.col("count").sum())


def merge_users(parts: Sequence[Partition], before: Numbered) -> pl.DataFrame:
    """All users by user_id: id, partition, known, and first_example, the example_id of their first behaviour."""
    tables = [partitions.read_ordered(p, "users").with_columns(partition=pl.lit(p.number)) for p in parts]
    users = pl.concat(tables).sort("user_id")
    assert users["user_id"].is_unique().all(), "a user's behaviours went to two partitions"
    first = pl.col("behaviours").cum_sum() - pl.col("behaviours")
    train_only = parts[0].options.vocab == "train"
    return number(users.with_columns(first_example=first), "user_id", train_only, before)


def describe_users(keys: pl.DataFrame, options: PrepareOptions, earlier: Earlier | None) -> Users:
    """keys: key, id of all users of the dataset. What the user file says of them, or, of one it does not name, what an
    earlier dataset's said."""
    columns = options.features_of(USER)
    if not columns:
        return Users(keys, {})
    said = keys.join(interactions.read_users(options), left_on="key", right_on="user_id", how="left")
    if earlier is not None:
        said = said.join(earlier.users(), on="key", how="left", suffix="_earlier")
        said = said.with_columns(pl.coalesce(column, f"{column}_earlier").alias(column) for column in columns)
    said, values = said.sort("id"), {}
    for column in columns:
        before = earlier.numbered(f"{USER}_{column}") if earlier else Numbered.nothing()
        values[column] = _number_keys(_shared(said[column], options.feature_items), before)
        said = said.with_columns(_value_ids(said[column], values[column]))
    return Users(said.select("key", "id", *columns), values)


def number(rows: pl.DataFrame, by: str, train_only: bool, before: Numbered) -> pl.DataFrame:
    """Adds `id`, in the order of `by`: that of before, or the next one; with `train_only` 1 (unknown) where training
    cannot know it."""
    earlier = before.keys.rename({"key": by, "id": "earlier"})
    named = rows.sort(by).join(earlier, on=by, how="left", maintain_order="left")
    known = pl.col("known") if train_only else pl.lit(True)
    new = (known & pl.col("earlier").is_null()).cast(pl.Int32)
    next_id = pl.when(new == 1).then(before.rows - 1 + new.cum_sum()).otherwise(UNKNOWN)
    return named.with_columns(id=pl.coalesce("earlier", next_id).cast(pl.Int32)).drop("earlier")


def spill_users(uri: str, users: pl.DataFrame, buckets: int) -> str:
    """Gives every partition its users' id and first_example, in the partition's own order."""
    columns = users.select("id", "first_example").to_arrow(compat_level=pl.CompatLevel.oldest())
    return spill.write(uri, columns, users["partition"].to_numpy(), buckets)


def spill_cold(uri: str, parts: Sequence[Partition], before: Numbered) -> str:
    """Gives every partition the ids of its users without examples: that of before, or unknown."""
    ids = []
    for part in parts:
        keys = partitions.read_ordered(part, "cold").rename({"user_id": "key"})
        ids.append(keys.join(before.keys, on="key", how="left", maintain_order="left")["id"].fill_null(UNKNOWN))
    partition = np.repeat([part.number for part in parts], [len(of) for of in ids])
    columns = pl.DataFrame({"id": pl.concat(ids)}).to_arrow(compat_level=pl.CompatLevel.oldest())
    return spill.write(uri, columns, partition, len(parts))


def write_vocabulary(folder: str, name: str, rows: pl.DataFrame, key: str, features: Iterable[str] = ()) -> Shard:
    """Writes `vocab/NAME.parquet` by id: the real keys only; ids 0 (padding) and 1 (unknown) have no row.

    features: declared columns.
    """
    rows = rows.sort("id")
    schema, columns = VOCAB_SCHEMA, {"id": rows["id"], "key": rows[key]}
    if key == "item_id":
        columns |= {"category": rows["category_id"], "count": rows["count"]}
        schema = ITEM_VOCAB_SCHEMA
    columns |= {column: rows[column] for column in features}
    for column in features:
        schema = schema.append(pa.field(column, pa.list_(pa.int32())))
    table = pl.DataFrame(columns).to_arrow(compat_level=pl.CompatLevel.oldest()).cast(schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=1 << 20)
    path = f"vocab/{name}.parquet"
    with durable("prepare.vocabulary"):
        storage.write_bytes(storage.join(folder, path), sink.getvalue())
    groups = pq.ParquetFile(pa.BufferReader(sink.getvalue())).metadata
    rows_of_groups = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
    return Shard(path, table.num_rows, rows_of_groups, len(sink.getvalue()), storage.sha256(sink.getvalue()))
