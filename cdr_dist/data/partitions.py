"""From raw logs to user partitions: read and scatter by user, then order, split and list what occurs in each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import polars as pl

from cdr_dist.data import hashing, interactions, sequences, spill, splits, storage
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
    domain: str  # whose rows are read; empty: all
    partitions: int
    scratch: str  # the folder of this file's spill files
    options: PrepareOptions


def scatter(log: Log) -> tuple[list[str], int]:
    """Reads one file and scatters its interactions by user. Returns the spill files, in file order, and their rows."""
    files, found = [], 0
    for number, rows in enumerate(_pieces(log)):
        uri, bucket = storage.join(log.scratch, f"{number:05d}.arrow"), interactions.user_bucket
        table = rows.to_arrow(compat_level=pl.CompatLevel.oldest())
        files.append(spill.write(uri, table, bucket(rows["user_id"], log.partitions), log.partitions))
        found += rows.height
    return files, found


def _pieces(log: Log) -> Iterator[pl.DataFrame]:
    pending: list[pl.DataFrame] = []
    for batch in interactions.read(log.uri, log.options, log.role, log.has_item_file, log.prefix, log.domain):
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
    splits: list[int]  # examples of train, valid, test
    positives: list[int]  # those of them with label 1
    source_log_users: int
    target_log_users: int
    cold_users: int  # users without examples
    left_out: dict[str, int]  # target behaviours of the logs' users that make no example: why -> how many
    sequences: list[int]  # rows of sequences_train, valid, test


def order(partition: Partition) -> PartitionCounts:
    """Orders one partition by (user, timestamp, input row), splits it and writes what occurs in it.

    Users are numbered in the order of their ids, items of a domain likewise, both within the partition.
    """
    options = partition.options
    source, target = (_interactions(files, partition.number) for files in (partition.source, partition.target))
    in_source, in_target = source.select("user_id").unique(), target.select("user_id").unique()
    everyone = pl.concat([in_source, in_target]).unique()
    target, left_out = _without_unknown(_with_history(target, source, options), in_source, options)
    of_examples = target.filter("example").select("user_id").unique()
    kept = of_examples.join(in_source, on="user_id", how="semi") if options.users == "both" else of_examples
    users = kept.sort("user_id").with_row_index("user")
    cold = everyone.join(kept, on="user_id", how="anti").sort("user_id").with_row_index("user")
    if not options.cold_users:
        cold = cold.clear()
    _order_cold(partition, source, target, cold)
    of_cold = source.join(cold, on="user_id", how="semi") if options.sequences else source.clear()
    source_items = _items(pl.concat([source.join(users, on="user_id", how="semi"), of_cold]))
    target_items = _items(target.join(users, on="user_id", how="semi"))
    source, of_cold = (_ordered(rows, of, source_items) for rows, of in ((source, users), (of_cold, cold)))
    target = _ordered(target, users, target_items)
    source_rows, target_rows = behaviours(source, users.height), behaviours(target, users.height)

    keys, made = hashing.of_keys(users["user_id"].to_arrow()), target["example"].to_numpy()
    split = splits.split_of_behaviours(target_rows, options, keys, made)
    trains = split == splits.TRAIN
    limits = splits.validation_times(target_rows, options, split)
    seen = source_rows.timestamp < limits[source_rows.user]
    user_known = np.zeros(users.height, dtype=bool)
    user_known[target_rows.user[trains]] = True
    user_known[source_rows.user[seen]] = True

    pretrained = [(source_rows, keys), (behaviours(of_cold, cold.height), hashing.of_keys(cold["user_id"].to_arrow()))]
    to_pretrain = _Sequences.of(pretrained, source_items.height, options)
    liked = source_rows.label > 0

    outputs = {
        "source": source,
        "target": target.drop("example").with_columns(split=split),
        "users": users.with_columns(behaviours=target_rows.of_user, known=user_known),
        "source_items": source_items.with_columns(
            known=(_counts(source_rows, seen, source_items) + to_pretrain.count) > 0,
            count=to_pretrain.count if options.sequences else _counts(source_rows, liked, source_items),
        ),
        "target_items": target_items.with_columns(
            known=_counts(target_rows, trains, target_items) > 0,
            count=_counts(target_rows, trains & (target_rows.label > 0), target_items),
        ),
    }
    for name, rows in outputs.items():
        _spill(partition.file(name), rows)
    return PartitionCounts(
        users.height,
        source.height,
        target.height,
        np.bincount(split, minlength=3)[:3].tolist(),
        np.bincount(split[target_rows.label > 0], minlength=3)[:3].tolist(),
        in_source.height,
        in_target.height,
        cold.height,
        left_out,
        to_pretrain.rows,
    )


def _with_history(target: pl.DataFrame, source: pl.DataFrame, options: PrepareOptions) -> pl.DataFrame:
    """Adds `example`: whether a behaviour is later than `least_history` positive source behaviours of its user."""
    if not options.least_history:
        return target.with_columns(example=pl.lit(True))
    time = pl.col("timestamp").sort().get(options.least_history - 1, null_on_oob=True)
    last = source.filter(pl.col("label") > 0).group_by("user_id").agg(time.alias("last"))
    joined = target.join(last, on="user_id", how="left", maintain_order="left")
    return joined.with_columns(example=(pl.col("timestamp") > pl.col("last")).fill_null(False)).drop("last")


def _without_unknown(
    target: pl.DataFrame, in_source: pl.DataFrame, options: PrepareOptions
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The behaviours whose item is known, and how many of users that might have examples make none: why -> number."""
    known = target["item_id"].is_not_null()
    looked_at = target.join(in_source, on="user_id", how="semi") if options.users == "both" else target
    unknown = looked_at["item_id"].is_null()
    left_out = {"unknown_targets": int(unknown.sum()), "short_targets": int((~unknown & ~looked_at["example"]).sum())}
    return target.filter(known), left_out


@dataclass(frozen=True)
class _Sequences:
    rows: list[int]  # of sequences_train, valid, test
    count: np.ndarray  # of each item: its behaviours in sequences_train, each once

    @classmethod
    def of(cls, users: list[tuple[Behaviours, np.ndarray]], items: int, options: PrepareOptions) -> _Sequences:
        """users: source behaviours of some users, and the hashes of their keys."""
        rows, count = np.zeros(3, dtype=np.int64), np.zeros(items, dtype=np.int64)
        for of, keys in users if options.sequences else ():
            split = sequences.split_of_users(keys, options)
            windows = sequences.window_counts(of.where(of.label > 0).of_user, options.sequences)
            rows += np.bincount(split, windows, minlength=3).astype(np.int64)
            trains = sequences.in_sequences(of, options.sequences) & (split == splits.TRAIN)[of.user]
            count += np.bincount(of.item[trains], minlength=items)
        return cls(rows.tolist(), count)


def _order_cold(partition: Partition, source: pl.DataFrame, target: pl.DataFrame, cold: pl.DataFrame) -> None:
    """Users without examples, and their behaviours with the items' keys, which need not be known."""
    _spill(partition.file("cold"), cold.select("user_id"))
    for role, rows in (("source", source), ("target", target)):
        own = rows.join(cold, on="user_id", how="inner", maintain_order="left")
        own = own.select("user", "item_id", "timestamp", "label").sort("user", "timestamp", maintain_order=True)
        _spill(partition.file(f"cold_{role}"), own)


def _spill(uri: str, rows: pl.DataFrame) -> None:
    spill.write_all(uri, rows.to_arrow(compat_level=pl.CompatLevel.oldest()))


def _interactions(files: list[str], number: int) -> pl.DataFrame:
    return pl.DataFrame(pl.from_arrow(spill.read(files, number))) if files else pl.DataFrame(schema=interactions.SCHEMA)


def _items(rows: pl.DataFrame) -> pl.DataFrame:
    """item_id and category of the items of these rows, in the order of their ids; what is unknown is one, the first."""
    # A log may name several categories for an item: the least by bytes, so that no order of reading matters.
    return rows.group_by("item_id").agg(pl.col("category").min()).sort("item_id", nulls_last=False)


def _ordered(rows: pl.DataFrame, users: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """The rows of these users by (user, time), with the numbers of users and items."""
    number = items.select("item_id").with_row_index("item")
    rows = rows.join(users, on="user_id", how="inner", maintain_order="left")
    rows = rows.join(number, on="item_id", how="left", maintain_order="left", nulls_equal=True)
    rows = rows.select("user", "item", "timestamp", "label", *(name for name in rows.columns if name == "example"))
    return rows.sort("user", "timestamp", maintain_order=True)


def _counts(rows: Behaviours, mask: np.ndarray, items: pl.DataFrame) -> np.ndarray:
    """In how many of these rows each item is."""
    return np.bincount(rows.item[mask], minlength=items.height)


def behaviours(rows: pl.DataFrame, users: int) -> Behaviours:
    """The columns user, item, timestamp and label of ordered rows as arrays."""
    user, item, timestamp = (rows[name].to_numpy().astype(np.int64) for name in ("user", "item", "timestamp"))
    return Behaviours(users, user, item, timestamp, rows["label"].to_numpy())


def read_ordered(partition: Partition, name: str) -> pl.DataFrame:
    """What `order` wrote under a name."""
    return pl.DataFrame(pl.from_arrow(spill.read([partition.file(name)], 0)))
