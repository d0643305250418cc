"""Examples of one user partition: for every target behaviour its histories, candidates and negatives."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl
import pyarrow as pa

from cdr_dist.data import hashing, partitions, spill, splits, storage
from cdr_dist.data.behaviours import Behaviours, Ints, Slices, most_recent
from cdr_dist.data.dataset import EXAMPLE_SCHEMA, FIRST_ID, FOLDERS, SEQUENCES, UNKNOWN, USERS
from cdr_dist.data.partitions import Partition
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.sequences import in_sequences, sequence_rows
from cdr_dist.data.shuffle import Buckets
from cdr_dist.data.stored_negatives import Catalogue, Rows, stored_negatives
from cdr_dist.data.user_rows import user_rows

TARGET_CANDIDATES = 1000
CHUNK_BYTES = 1 << 28
"""Size of the tables that are built at once: rows are cut so that a user with a long history cannot fill memory."""


@dataclass(frozen=True)
class Build:
    """One partition, and what all partitions together have settled."""

    partition: Partition
    user_ids: str  # spill files: of the users, by partition
    cold_ids: str  # of the users without examples, likewise
    items: dict[str, str]  # of each domain's items: item_id, known, id, category_id; count, where draws go by it
    target_items: int
    buckets: Buckets
    scratch: str


@dataclass(frozen=True)
class Built:
    files: list[str]  # spill files by bucket
    user_files: list[str]  # the same of the users' rows
    sequence_files: list[str]  # the same of the sequences
    rows: list[int]  # train, valid, test
    unknown: list[int]  # rows of each split whose user or item id is unknown
    unseen_user: list[int]  # rows of each split whose user has no training row
    unseen_item: list[int]  # rows of each split whose item is in no training row
    empty: list[int]  # rows of each split before which their user has no positive source behaviour
    source: list[int]  # positive source behaviours of users with examples, and in sequences
    unknown_source: list[int]  # those of them whose item is unknown


def build(task: Build) -> Built:
    """Writes one partition's examples, scattered into the buckets of the shuffle."""
    examples = Examples.read(task)
    files = []
    for number, rows in enumerate(examples.chunks()):
        uri = storage.join(task.scratch, f"{task.partition.number:05d}-{number:05d}.arrow")
        made = np.arange(rows.start, rows.stop)[examples.split[rows] != splits.NO_EXAMPLE]
        bucket = task.buckets.of(examples.split[made], examples.example_id[made])
        order = np.argsort(bucket, kind="stable")  # made in this order, the table need not be copied into it
        table = examples.table(made[order])
        files.append(spill.write(uri, table, bucket[order], task.buckets.total))
    cold = _Cold.read(task)
    users = _users(task, examples, cold)
    user_files = [_spilled(task, USERS, users, np.full(users.num_rows, FOLDERS.index(USERS)))]
    sequence_files = [_sequences(task, examples, cold)] if task.partition.options.sequences else []
    of_split = [np.bincount(examples.split[mask], minlength=3)[:3].tolist() for mask in examples.counted()]
    longest = task.partition.options.sequences
    history = _unknown_among(examples.source, examples.source.label > 0)
    pretrained = sum(_unknown_among(of, in_sequences(of, longest)) for of in (examples.source, cold.source))
    (unknown, source) = np.stack([history, np.asarray(pretrained)], axis=1).tolist()
    all_, no_id, no_user, no_item, empty = of_split
    return Built(files, user_files, sequence_files, all_, no_id, no_user, no_item, empty, source, unknown)


def _spilled(task: Build, name: str, rows: pa.Table, folder: np.ndarray) -> str:
    """Writes rows into the buckets of their folders, numbers in FOLDERS."""
    bucket = task.buckets.of(folder, rows["example_id"].to_numpy())
    uri = storage.join(task.scratch, f"{task.partition.number:05d}-{name}.arrow")
    return spill.write(uri, rows, bucket, task.buckets.total)


@dataclass(frozen=True)
class Examples:
    """All target behaviours of some users, arrays in their order, and the user's behaviours around them."""

    options: PrepareOptions
    target_items: int
    target: Behaviours
    source: Behaviours
    split: np.ndarray
    user_id: np.ndarray  # of each user: vocabulary id
    first_example: Ints  # of each user
    item_trains: np.ndarray  # of each target row: is its item in any training row
    target_category: np.ndarray  # of each target row, as source_category of each source row
    source_category: np.ndarray
    target_counts: np.ndarray | None = None  # of each target item: training behaviours, where draws go by them

    @classmethod
    def read(cls, task: Build) -> Examples:
        users = pl.DataFrame(pl.from_arrow(spill.read([task.user_ids], task.partition.number)))
        target, target_items, split = _with_ids(task, "target", users.height)
        source, source_items, _ = _with_ids(task, "source", users.height)
        ids = [items["id"].to_numpy().astype(np.int64) for items in (target_items, source_items)]
        kinds = [items["category_id"].to_numpy() for items in (target_items, source_items)]
        return cls(
            task.partition.options,
            task.target_items,
            Behaviours(target.users, target.user, ids[0][target.item], target.timestamp, target.label),
            Behaviours(source.users, source.user, ids[1][source.item], source.timestamp, source.label),
            split,
            users["id"].to_numpy(),
            users["first_example"].to_numpy().astype(np.int64),
            target_items["known"].to_numpy()[target.item],
            kinds[0][target.item],
            kinds[1][source.item],
            _training_counts(task),
        )

    @cached_property
    def example_id(self) -> Ints:
        """Counts the target behaviours in the order of (user key, time): the same however users are partitioned."""
        return self.first_example[self.target.user] + self.target.place

    @cached_property
    def limits(self) -> Ints:
        return splits.validation_times(self.target, self.options, self.split)

    def counted(self) -> tuple[np.ndarray, ...]:
        """Masks over the rows: all, unknown user or item, user that never trains, item that never trains, no source."""
        unknown = (self.user_id[self.target.user] == UNKNOWN) | (self.target.item == UNKNOWN)
        trains = np.bincount(self.target.user[self.split == splits.TRAIN], minlength=self.target.users) > 0
        no_source = self.source_history[1].lengths == 0
        return np.ones(len(self.split), dtype=bool), unknown, ~trains[self.target.user], ~self.item_trains, no_source

    @cached_property
    def target_history(self) -> tuple[np.ndarray, Slices]:
        """The rows that may be history, and the slice of them that is each row's target history.

        history=past: the positives before this behaviour, of any split: what a test row may know is all before it.
        history=train: all positive training behaviours, the same for every row of a user, this one included.
        """
        options, target = self.options, self.target
        if options.history == "train":
            kept = (target.label > 0) & (self.split == splits.TRAIN)
            starts = target.where(kept).starts
            return kept, most_recent(starts[target.user], starts[target.user + 1], options.history_length)
        kept = target.label > 0
        starts = target.where(kept).starts
        return kept, most_recent(starts[target.user], np.cumsum(kept) - kept, options.history_length)

    @cached_property
    def source_history(self) -> tuple[np.ndarray, Slices]:
        """As `target_history`, of source behaviours strictly before this one (or before validation)."""
        options, kept = self.options, self.source.label > 0
        positives = self.source.where(kept)
        times = self.limits[self.target.user] if options.history == "train" else self.target.timestamp
        ends = positives.first_not_before(self.target.user, times)
        return kept, most_recent(positives.starts[self.target.user], ends, options.history_length)

    @cached_property
    def source_before(self) -> Ints:
        """Of each source row: the user's positive source behaviours before it."""
        kept = self.source.label > 0
        return np.cumsum(kept) - kept - self.source.where(kept).starts[self.source.user]

    @cached_property
    def source_candidates(self) -> tuple[np.ndarray, Slices]:
        """A user's source behaviours strictly before validation, of known items, sampled down to `candidates`."""
        options, source = self.options, self.source
        kept = (source.timestamp < self.limits[source.user]) & (source.item != UNKNOWN)
        many = kept & (np.bincount(source.user[kept], minlength=source.users) > options.candidates)[source.user]
        rows = np.flatnonzero(many)
        bits = hashing.mix(
            hashing.key(options.seed, "candidates"), self.first_example[source.user[rows]], source.place[rows]
        )
        drawn = rows[np.lexsort((bits, source.user[rows]))]
        place = np.arange(len(drawn)) - np.searchsorted(source.user[drawn], source.user[drawn])
        kept[drawn[place >= options.candidates]] = False
        starts = source.where(kept).starts
        return kept, Slices(starts[self.target.user], starts[self.target.user + 1])

    @cached_property
    def target_candidates(self) -> tuple[np.ndarray, Slices]:
        """A user's training behaviours, the most recent 1,000."""
        kept = self.split == splits.TRAIN
        starts = self.target.where(kept).starts
        return kept, most_recent(starts[self.target.user], starts[self.target.user + 1], TARGET_CANDIDATES)

    @cached_property
    def position(self) -> np.ndarray:
        kept, slices = self.target_candidates
        place = np.cumsum(kept) - kept - slices.starts
        return np.where(kept, np.maximum(place, -1), -1).astype(np.int32)

    @cached_property
    def _row_bytes(self) -> Ints:
        slices = (self.target_history, self.source_history, self.source_candidates, self.target_candidates)
        lengths = np.stack([of_row.lengths for _, of_row in slices])
        return 64 + np.array([8, 8, 20, 12]) @ lengths

    def chunks(self) -> Iterator[slice]:
        """Slices of the rows whose tables are about CHUNK_BYTES each."""
        chunk = np.cumsum(self._row_bytes) // CHUNK_BYTES
        bounds = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(chunk)]
        return (slice(a, b) for a, b in itertools.pairwise(bounds) if b > a)

    def table(self, rows: slice | Ints) -> pa.Table:
        """The examples (EXAMPLE_SCHEMA) of some of the rows."""
        target, source = self.target, self.source
        columns = {
            "example_id": self.example_id[rows],
            "user": self.user_id[target.user[rows]],
            "item": target.item[rows].astype(np.int32),
            "category": self.target_category[rows],
            "label": target.label[rows],
            "timestamp": target.timestamp[rows],
            "position": self.position[rows],
            "source_history_first": self._source_history_first[rows],
            "negatives_item": self._negatives(rows),
        }
        of_target = {"item": target.item, "category": self.target_category, "label": target.label}
        of_source = {"item": source.item, "category": self.source_category, "label": source.label}
        for name, values in (
            ("target_history", of_target),
            ("source_history", of_source),
            ("source_candidates", of_source | {"timestamp": source.timestamp, "before": self.source_before}),
            ("target_candidates", of_target),
        ):
            kept, slices = getattr(self, name)
            part = slices.at(rows)
            for of, flat in values.items():
                if f"{name}_{of}" in EXAMPLE_SCHEMA.names:
                    wanted = EXAMPLE_SCHEMA.field(f"{name}_{of}").type.value_type.to_pandas_dtype()
                    columns[f"{name}_{of}"] = part.of(flat[kept].astype(wanted))
        return pa.table({name: columns[name] for name in EXAMPLE_SCHEMA.names}, schema=EXAMPLE_SCHEMA)

    @cached_property
    def _source_history_first(self) -> np.ndarray:
        kept, slices = self.source_history
        return (slices.starts - self.source.where(kept).starts[self.target.user]).astype(np.int32)

    @cached_property
    def _never_drawn(self) -> Behaviours:
        """Behaviours whose items are no negatives of their users; a row's own item never is one."""
        exclude = self.options.eval_exclude
        kept = self.target.label > 0 if exclude != "item" else np.zeros(len(self.split), dtype=bool)
        return self.target.where(kept & (self.split == splits.TRAIN) if exclude == "train" else kept)

    @cached_property
    def _catalogue(self) -> Catalogue:
        options, weight = self.options, None
        if options.eval_sampling == "popularity":
            assert self.target_counts is not None
            weight = np.where(self.target_counts > 0, self.target_counts.astype(float) ** options.eval_power, 0.0)
        return Catalogue(self.target_items, options.stored_negatives, weight, options.eval_replacement)

    def _negatives(self, rows: slice | Ints) -> pa.ListArray:
        options, evaluated = self.options, self.split[rows] != splits.TRAIN
        count = options.stored_negatives
        drawn = np.zeros(0, dtype=np.int64)
        if count:
            of = (self.target.user, self.example_id, self.target.item)
            some = Rows(*(values[rows][evaluated] for values in of))
            drawn = stored_negatives(options.seed, some, self._never_drawn, self._catalogue).ravel()
        ends = np.cumsum(evaluated * count)
        return Slices(ends - evaluated * count, ends).of(drawn.astype(np.int32))


@dataclass(frozen=True)
class _Cold:
    """The users without examples: keys and ids, and their behaviours by vocabulary id."""

    keys: pl.Series
    ids: np.ndarray
    target: Behaviours
    source: Behaviours

    @classmethod
    def read(cls, task: Build) -> _Cold:
        keys = partitions.read_ordered(task.partition, "cold")["user_id"]
        ids = spill.read([task.cold_ids], task.partition.number)["id"].to_numpy()
        return cls(keys, ids, *(_of_cold(task, role, len(keys)) for role in ("target", "source")))


def _training_counts(task: Build) -> np.ndarray:
    items = pl.DataFrame(pl.from_arrow(spill.read([task.items["target"]], 0))).filter(pl.col("id") >= FIRST_ID)
    found = np.zeros(task.target_items, dtype=np.int64)
    found[items["id"].to_numpy() - FIRST_ID] = items["count"].to_numpy()
    return found


def _users(task: Build, examples: Examples, cold: _Cold) -> pa.Table:
    """The rows of the partition's users (USER_SCHEMA), those without examples included."""
    length = task.partition.options.history_length
    keys = partitions.read_ordered(task.partition, "users")["user_id"].to_arrow()
    return pa.concat_tables(
        [
            user_rows(keys, examples.user_id, examples.target, examples.source, length),
            user_rows(cold.keys.to_arrow(), cold.ids, cold.target, cold.source, length),
        ]
    )


def _sequences(task: Build, examples: Examples, cold: _Cold) -> str:
    """Writes what the partition's source users, those without examples included, have to pre-train on."""
    options = task.partition.options
    keys = partitions.read_ordered(task.partition, "users")["user_id"]
    found = [
        sequence_rows(of.to_arrow(), ids, source, options)
        for of, ids, source in ((keys, examples.user_id, examples.source), (cold.keys, cold.ids, cold.source))
    ]
    split = np.concatenate([of for _, of in found])
    return _spilled(
        task, "sequences", pa.concat_tables([rows for rows, _ in found]), FOLDERS.index(SEQUENCES[0]) + split
    )


def _unknown_among(source: Behaviours, mask: np.ndarray) -> np.ndarray:
    """Of these behaviours those whose item is unknown, and all."""
    return np.array([(source.item[mask] == UNKNOWN).sum(), mask.sum()])


def _of_cold(task: Build, role: str, users: int) -> Behaviours:
    rows = partitions.read_ordered(task.partition, f"cold_{role}")
    items = pl.DataFrame(pl.from_arrow(spill.read([task.items[role]], 0))).select("item_id", item="id")
    named = rows.join(items, on="item_id", how="left", maintain_order="left")
    return partitions.behaviours(named.with_columns(pl.col("item").fill_null(UNKNOWN)), users)


def _with_ids(task: Build, domain: str, users: int) -> tuple[Behaviours, pl.DataFrame, np.ndarray]:
    """Ordered rows, the domain's items as numbered in this partition with their global ids, and the rows' split."""
    rows = partitions.read_ordered(task.partition, domain)
    own = partitions.read_ordered(task.partition, f"{domain}_items").select("item_id")
    everywhere = pl.DataFrame(pl.from_arrow(spill.read([task.items[domain]], 0)))
    items = own.join(everywhere, on="item_id", how="left", maintain_order="left").with_columns(
        pl.col("known").fill_null(False), pl.col("id", "category_id").fill_null(UNKNOWN)
    )
    split = rows["split"].to_numpy() if "split" in rows.columns else np.zeros(0, dtype=np.int8)
    return partitions.behaviours(rows, users), items, split
