"""The global shuffle of each split, and the shards that come of it; the rows of users are one, too.

Every example has a random 64-bit key, a function of (seed, example_id) alone. A split is sorted by it: a bucket is a
range of keys, a shard is a range of buckets, and neither partitions nor workers show in a shard's bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.crash_points import durable
from cdr_dist.data import hashing, spill, storage
from cdr_dist.data.dataset import EXAMPLE_SCHEMA, FOLDERS, PARQUET, ROW_GROUP_ROWS, SCHEMAS, Shard

BUCKET_ROWS = 50_000
"""Rows of a bucket, about: what is sorted in memory at a time."""


def shuffle_key(seed: int, example_id: np.ndarray) -> np.ndarray:
    return hashing.mix(hashing.key(seed, "shuffle"), example_id)


@dataclass(frozen=True)
class Buckets:
    """How the keys of each split are cut: `shards[split]` shards of `per_shard[split]` buckets each."""

    seed: int
    shards: list[int]
    per_shard: list[int]

    @classmethod
    def for_rows(cls, seed: int, rows: list[int], rows_per_shard: int) -> Buckets:
        shards = [-(-n // rows_per_shard) for n in rows]
        per_shard = [max(1, -(-n // max(s, 1) // BUCKET_ROWS)) for n, s in zip(rows, shards, strict=True)]
        return cls(seed, shards, per_shard)

    @property
    def counts(self) -> np.ndarray:
        return np.array(self.shards) * np.array(self.per_shard)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def of(self, split: np.ndarray, example_id: np.ndarray) -> np.ndarray:
        """The bucket of each row; those of train come first, then valid, test, users."""
        first = np.cumsum(self.counts) - self.counts
        return first[split] + hashing.integers(shuffle_key(self.seed, example_id), self.counts[split])

    def of_shard(self, split: int, shard: int) -> range:
        first = int(self.counts[:split].sum()) + shard * self.per_shard[split]
        return range(first, first + self.per_shard[split])


@dataclass(frozen=True)
class ShardTask:
    """One shard to write from spill files."""

    folder: str
    split: int
    number: int
    buckets: Buckets
    files: list[str]


def write_shard(task: ShardTask) -> Shard:
    """Writes one shard, in the order of the shuffle's keys, ROW_GROUP_ROWS rows a group."""
    schema = SCHEMAS[FOLDERS[task.split]]
    groups = row_groups(_sorted_buckets(task), schema)
    return write_groups(task.folder, shard_path(task.split, task.number), groups, schema)


def shard_path(split: int, number: int) -> str:
    return f"{FOLDERS[split]}/part-{number:05d}.parquet"


def write_groups(folder: str, path: str, groups: Iterable[pa.Table], schema: pa.Schema = EXAMPLE_SCHEMA) -> Shard:
    """Writes a Parquet file with a row group for each table."""
    rows = []
    with durable("prepare.shard"), storage.open_output(storage.join(folder, path)) as file:
        hashed = _Hashed(file)
        with pq.ParquetWriter(hashed, schema, **PARQUET) as writer:
            for group in groups:
                writer.write_table(group, row_group_size=max(1, group.num_rows))
                rows.append(group.num_rows)
    return Shard(path, sum(rows), rows, hashed.bytes, hashed.digest.hexdigest())


def _sorted_buckets(task: ShardTask) -> Iterator[pa.Table]:
    for bucket in task.buckets.of_shard(task.split, task.number):
        rows = spill.read(task.files, bucket)
        keys = shuffle_key(task.buckets.seed, rows["example_id"].to_numpy())
        yield rows.take(pa.array(np.argsort(keys)))


def row_groups(tables: Iterable[pa.Table], schema: pa.Schema) -> Iterator[pa.Table]:
    """The same rows, ROW_GROUP_ROWS a table."""
    pending = schema.empty_table()
    for table in tables:
        pending = pa.concat_tables([pending, table])
        while pending.num_rows >= ROW_GROUP_ROWS:
            yield pending.slice(0, ROW_GROUP_ROWS).combine_chunks()
            pending = pending.slice(ROW_GROUP_ROWS)
    if pending.num_rows:
        yield pending.combine_chunks()


class _Hashed:
    """A file that is being written, its bytes counted and hashed on the way."""

    closed = False

    def __init__(self, file: Any) -> None:
        self.file, self.digest, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        self.digest.update(content)
        self.bytes += len(content)
        self.file.write(content)
        return len(content)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None: ...

    def close(self) -> None: ...
