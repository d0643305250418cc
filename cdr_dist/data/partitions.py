"""From raw logs to user partitions: read and scatter by user, then order, split and list what occurs in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from cdr_dist.data import interactions, spill, splits, storage
from cdr_dist.data.behaviours import Behaviours
from cdr_dist.data.prepare_options import PrepareOptions

SPILL_ROWS = 1 << 20


@dataclass(frozen=True)
class Log:
    """One file of a domain's log, to be scattered."""

    uri: str
    role: str
    has_item_file: bool
    prefix: str  # of its items and categories
    partitions: int
    scratch: str  # the folder of this file's spill files
    options: PrepareOptions


def scatter(log: Log) -> list[str]:
    """Reads one file and scatters its interactions by user. Returns the spill files, in file order."""
    return [
        spill.write(
            storage.join(log.scratch, f"{number:05d}.arrow"),
            rows.to_arrow(compat_level=pl.CompatLevel.oldest()),
            interactions.user_bucket(rows["user_id"], log.partitions),
            log.partitions,
        )
        for number, rows in enumerate(_pieces(log))
    ]


def _pieces(log: Log) -> Iterator[pl.DataFrame]:
    pending: list[pl.DataFrame] = []
    for batch in interactions.read(log.uri, log.options, log.role, log.has_item_file, log.prefix):
        pending.append(batch)
        if sum(b.height for b in pending) >= SPILL_ROWS:
            yield pl.concat(pending)
            pending = []
    if pending:
        yield pl.concat(pending)


@dataclass(frozen=True)
class Partition:
    """One user partition, to be ordered."""

    number: int
    source: list[str]  # spill files
    target: list[str]
    scratch: str
    options: PrepareOptions

    def file(self, name: str) -> str:
        """Of this partition: `source` and `target` (ordered), `users`, `source_items` and `target_items`; of users
        without examples `cold`, `cold_source` and `cold_target`."""
        return storage.join(self.scratch, name, f"{self.number:05d}.arrow")


@dataclass(frozen=True)
class PartitionCounts:
    users: int
    source_behaviours: int
    target_behaviours: int
    splits: list[int]  # target behaviours of train, valid, test
    positives: list[int]  # those of them with label 1
    source_log_users: int
    target_log_users: int
    cold_users: int  # users without examples


def order(partition: Partition) -> PartitionCounts:
    """Orders one partition by (user, timestamp, input row), splits it and writes what occurs in it.

    Users are numbered in the order of their ids, items of a domain likewise, both within the partition.
    """
    options = partition.options
    source, target = (_interactions(files, partition.number) for files in (partition.source, partition.target))
    in_source, in_target = source.select("user_id").unique(), target.select("user_id").unique()
    kept = in_target.join(in_source, on="user_id", how="semi") if options.users == "both" else in_target
    users = kept.sort("user_id").with_row_index("user")
    everyone = pl.concat([in_source, in_target]).unique()
    cold = _order_cold(partition, source, target, everyone.join(kept, on="user_id", how="anti"))
    source, source_items = _ordered(source, users)
    target, target_items = _ordered(target, users)
    source_rows, target_rows = behaviours(source, users.height), behaviours(target, users.height)

    split = splits.split_of_behaviours(target_rows, options)
    trains = split == splits.TRAIN
    limits = splits.validation_times(target_rows, options)
    seen = source_rows.timestamp < limits[source_rows.user]
    user_known = np.zeros(users.height, dtype=bool)
    user_known[target_rows.user[trains]] = True
    user_known[source_rows.user[seen]] = True

    outputs = {
        "source": source,
        "target": target.with_columns(split=split),
        "users": users.with_columns(behaviours=target_rows.of_user, known=user_known),
        "source_items": _with_counts(source_items, source_rows, seen, source_rows.label > 0),
        "target_items": _with_counts(target_items, target_rows, trains, trains & (target_rows.label > 0)),
    }
    for name, rows in outputs.items():
        _spill(partition.file(name), rows)
    return PartitionCounts(
        users.height,
        source.height,
        target.height,
        np.bincount(split, minlength=3).tolist(),
        np.bincount(split[target_rows.label > 0], minlength=3).tolist(),
        in_source.height,
        in_target.height,
        cold,
    )


def _order_cold(partition: Partition, source: pl.DataFrame, target: pl.DataFrame, cold: pl.DataFrame) -> int:
    """Users without examples, and their behaviours with the items' keys, which need not be known -> how many users."""
    cold = cold.sort("user_id").with_row_index("user")
    if not partition.options.cold_users:
        cold = cold.clear()
    _spill(partition.file("cold"), cold.select("user_id"))
    for role, rows in (("source", source), ("target", target)):
        own = rows.join(cold, on="user_id", how="inner", maintain_order="left")
        own = own.select("user", "item_id", "timestamp", "label").sort("user", "timestamp", maintain_order=True)
        _spill(partition.file(f"cold_{role}"), own)
    return cold.height


def _spill(uri: str, rows: pl.DataFrame) -> None:
    spill.write_all(uri, rows.to_arrow(compat_level=pl.CompatLevel.oldest()))


def _interactions(files: list[str], number: int) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(spill.read(files, number))) if files else pl.DataFrame(schema=interactions.SCHEMA)


def _ordered(rows: pl.DataFrame, users: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = rows.join(users, on="user_id", how="inner", maintain_order="left")
    # A log may name several categories for an item: the least by bytes, so that no order of reading matters.
    items = rows.group_by("item_id").agg(pl.col("category").min()).sort("item_id").with_row_index("item")
    rows = rows.join(items.select("item_id", "item"), on="item_id", how="left", maintain_order="left")
    rows = rows.select("user", "item", "timestamp", "label")
    return rows.sort("user", "timestamp", maintain_order=True), items.drop("item")


def _with_counts(items: pl.DataFrame, rows: Behaviours, known: np.ndarray, counted: np.ndarray) -> pl.DataFrame:
    """known: whether an item is in a row of this mask; count: in how many of the other."""
    in_known, count = (np.bincount(rows.item[mask], minlength=items.height) for mask in (known, counted))
    return items.with_columns(known=in_known > 0, count=count)


def behaviours(rows: pl.DataFrame, users: int) -> Behaviours:
    """The columns user, item, timestamp and label of ordered rows as arrays."""
    user, item, timestamp = (rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "timestamp"))
    return Behaviours(users, user, item, timestamp, rows["label"].to_numpy())


def read_ordered(partition: Partition, name: str) -> pl.DataFrame:
    """What `order` wrote under a name."""
    return pl.DataFrame(pl.from_arrow(spill.read([partition.file(name)], 0)))
