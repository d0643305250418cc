"""A large dataset straight as shards, without logs: users and items by the million, popularity by Zipf's law.

Every shard is a function of (options, split, number): it goes through all users, a block at a time, finds the rows
that the shuffle gives it, and makes their examples anew from their users. So memory is bounded by a shard's row
numbers and one row group, nothing is written twice, and shards are made by any number of processes. Examples are those
that prepare would make of the same behaviours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cdr_dist.data import hashing, splits, storage
from cdr_dist.data.behaviours import Behaviours, Ints
from cdr_dist.data.dataset import (
    FIRST_ID,
    ITEM_VOCAB_SCHEMA,
    POSITIVES,
    ROW_GROUP_ROWS,
    SEQUENCES,
    SPLITS,
    UNKNOWN_SOURCE,
    USER_SCHEMA,
    USERS,
    VOCAB_SCHEMA,
    VOCABULARIES,
    Manifest,
    Shard,
    read_manifest,
)
from cdr_dist.data.generate_options import GenerateOptions
from cdr_dist.data.generated_users import Users
from cdr_dist.data.shuffle import shard_path, shuffle_key, write_groups
from cdr_dist.data.tasks import run_tasks
from cdr_dist.data.user_rows import user_rows
from cdr_dist.errors import UserError

GENERATOR = 3
"""Goes up when the same options make another dataset."""
BLOCK_USERS = 1 << 18
COUNTED_USERS = 1 << 15
VOCABULARY_GROUP = 1 << 20


def generate(options: GenerateOptions) -> Manifest:
    """Writes the dataset and returns its manifest; one that is there already with the same options is kept.

    UserError: `out` holds something else, or cannot be written. The folder appears as a whole.
    """
    if not storage.is_empty(options.out):
        manifest = read_manifest(options.out)
        if manifest.options != _recorded(options):
            raise UserError(f"{options.out}: holds a dataset of other options; choose another out=")
        return manifest
    work = f"{options.out.rstrip('/')}.unfinished"
    try:
        storage.check_writable(work, options.out)
        manifest = _write(options, storage.join(work, "dataset"))
        storage.move_folder(storage.join(work, "dataset"), options.out.rstrip("/"), last="manifest.json")
    finally:
        with suppress(UserError):
            storage.remove_folder(work)
    return manifest


def _recorded(options: GenerateOptions) -> dict[str, Any]:
    return {"generator": GENERATOR} | options.content()


def _write(options: GenerateOptions, folder: str) -> Manifest:
    counts, rows = _counted(options)
    shards = [-(-n // options.rows_per_shard) for n in rows]
    trained = np.zeros((options.target_items + FIRST_ID + 7) // 8, dtype=np.uint8)
    written: dict[str, list[Written]] = {}
    for split, name in enumerate(SPLITS):  # train first: the others count the items that it has not
        tasks = [ShardTask(options, folder, split, number, shards[split], trained) for number in range(shards[split])]
        written[name] = run_tasks(write_shard, tasks, options.workers)
        for one in written[name]:
            if split == splits.TRAIN:
                trained |= one.items
    shards_of_users = range(-(-options.users // options.rows_per_shard))
    of_users = run_tasks(write_users, [(options, folder, number) for number in shards_of_users], options.workers)
    vocab = run_tasks(write_vocabulary, [(options, folder, name) for name in VOCABULARIES], options.workers)
    of_split = {name: sum(w.positives for w in found) for name, found in written.items()}
    manifest = Manifest(
        source_domain="generated-source",
        target_domain="generated-target",
        seed=options.seed,
        label=options.labels,
        eval_negatives=options.prepared().stored_negatives,
        rows={name: shard.rows + FIRST_ID for name, shard in zip(VOCABULARIES, vocab, strict=True)},
        counts=counts | dict(zip(POSITIVES, of_split.values(), strict=True)),
        unseen={
            name: {"user": 0.0, "item": sum(w.unseen_items for w in written[name]) / max(1, n)}
            for name, n in zip(SPLITS[1:], rows[1:], strict=True)
        },
        unknown=dict.fromkeys((*SPLITS, *UNKNOWN_SOURCE), 0.0),
        shards={name: [w.shard for w in found] for name, found in written.items()}
        | {USERS: of_users}
        | {name: [] for name in SEQUENCES},
        vocab=dict(zip(VOCABULARIES, vocab, strict=True)),
        sources=["generated-source"],
        options=_recorded(options),
    )
    storage.write_bytes(storage.join(folder, "manifest.json"), manifest.to_json().encode())
    return manifest


def _counted(options: GenerateOptions) -> tuple[dict[str, int], list[int]]:
    """The manifest's counts without positives, and the rows of each split."""
    users, found, rows = Users(options), {"source": 0, "target": 0}, np.zeros(len(SPLITS), dtype=np.int64)
    for block in _blocks(options):
        found["source"] += int(users.source.counts(block).sum())
        target = _places(users, block)
        found["target"] += len(target.user)
        rows += np.bincount(splits.split_of_behaviours(target, users.prepared), minlength=len(SPLITS))
    counts = {"users": options.users, "cold_users": 0}
    for role, behaviours in found.items():
        counts |= {f"{role}_items": getattr(options, f"{role}_items"), f"{role}_behaviours": behaviours}
        counts[f"{role}_log_users"] = options.users
    return counts, rows.tolist()


def _blocks(options: GenerateOptions) -> Iterator[Ints]:
    for first in range(0, options.users, BLOCK_USERS):
        yield np.arange(first, min(first + BLOCK_USERS, options.users))


def _places(users: Users, block: Ints) -> Behaviours:
    """The target behaviours of some users without what they were: only whose, and which of them."""
    user = np.repeat(np.arange(len(block)), users.target.counts(block))
    nothing = np.zeros(len(user), dtype=np.int64)
    return Behaviours(len(block), user, nothing, nothing, nothing.astype(np.float32))


@dataclass(frozen=True)
class ShardTask:
    """One shard of `shards` of a split. trained: bits, of each target item id, whether train has it."""

    options: GenerateOptions
    folder: str
    split: int
    number: int
    shards: int
    trained: np.ndarray


@dataclass(frozen=True)
class Written:
    shard: Shard
    positives: int
    unseen_items: int  # rows whose item train does not have
    items: np.ndarray  # bits, of each target item id, whether a row has it


def write_shard(task: ShardTask) -> Written:
    users = Users(task.options)
    user, place, example_id = _rows_of(task, users)
    item_ids = task.options.target_items + FIRST_ID
    trained = np.unpackbits(task.trained, count=item_ids).astype(bool)
    has, found = np.zeros(item_ids, dtype=bool), {"positives": 0, "unseen": 0}

    def groups() -> Iterator[pa.Table]:
        for first in range(0, len(user), ROW_GROUP_ROWS):
            cut = slice(first, first + ROW_GROUP_ROWS)
            some, at, which = np.unique(user[cut], return_index=True, return_inverse=True)
            examples = users.examples(some, (example_id - place)[cut][at])
            table = examples.table(examples.target.starts[which] + place[cut])
            items = table["item"].to_numpy()
            has[items] = True
            found["positives"] += int(pc.sum(table["label"]).as_py())
            found["unseen"] += int((~trained[items]).sum())
            yield table

    shard = write_groups(task.folder, shard_path(task.split, task.number), groups())
    return Written(shard, found["positives"], found["unseen"], np.packbits(has))


def _rows_of(task: ShardTask, users: Users) -> tuple[Ints, Ints, Ints]:
    """User, place within the user's target behaviours, and example_id of the shard's rows, in the shuffle's order."""
    parts, first_example = [], 0
    for block in _blocks(task.options):
        target = _places(users, block)
        example_id = first_example + np.arange(len(target.user))
        first_example += len(example_id)
        keys = shuffle_key(task.options.seed, example_id)
        mine = splits.split_of_behaviours(target, users.prepared) == task.split
        mine &= hashing.integers(keys, task.shards) == task.number
        parts.append((block[target.user[mine]], target.place[mine], example_id[mine], keys[mine]))
    user, place, example_id, keys = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(keys)
    return user[order], place[order], example_id[order]


def write_users(task: tuple[GenerateOptions, str, int]) -> Shard:
    """One shard of the users' rows, in the order of their ids."""
    options, folder, number = task
    users, first = Users(options), number * options.rows_per_shard
    last = min(first + options.rows_per_shard, options.users)

    def groups() -> Iterator[pa.Table]:
        for start in range(first, last, ROW_GROUP_ROWS):
            some = np.arange(start, min(start + ROW_GROUP_ROWS, last))
            of = users.examples(some, np.zeros(len(some), dtype=np.int64))
            keys = _keys("u", some, options.users)
            yield user_rows(keys, of.user_id, of.target, of.source, users.prepared.history_length)

    return write_groups(folder, f"{USERS}/part-{number:05d}.parquet", groups(), USER_SCHEMA)


def _item_counts(options: GenerateOptions, role: str) -> Ints:
    """Of every id of the role's items its positive behaviours, in the target those that train."""
    users, found = Users(options), np.zeros(getattr(options, f"{role}_items") + FIRST_ID, dtype=np.int64)
    for block in _blocks(options):
        for some in np.array_split(block, -(-len(block) // COUNTED_USERS)):
            of: Behaviours = getattr(users, role).behaviours(some)
            counted = of.label > 0
            if role == "target":
                counted &= splits.split_of_behaviours(of, users.prepared) == splits.TRAIN
            np.add.at(found, of.item[counted], 1)
    return found


def _keys(letter: str, numbers: Ints, of: int) -> pa.Array:
    """s0001, …"""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), len(str(of - 1)), "0")
    return pc.binary_join_element_wise(letter, digits, "")


def write_vocabulary(task: tuple[GenerateOptions, str, str]) -> Shard:
    """`vocab/NAME.parquet`: keys s0001, t0001, u0001, … in the order of their ids."""
    options, folder, name = task
    role, _, part = name.partition("_")
    domain = getattr(Users(options), role) if part else None
    counts = _item_counts(options, role) if part == "item" else None
    rows: int = options.users if domain is None else domain.items if part == "item" else domain.categories
    schema = ITEM_VOCAB_SCHEMA if part == "item" else VOCAB_SCHEMA

    def groups() -> Iterator[pa.Table]:
        for first in range(0, rows, VOCABULARY_GROUP):
            number = np.arange(first, min(first + VOCABULARY_GROUP, rows))
            columns = {"id": pa.array((number + FIRST_ID).astype(np.int32)), "key": _keys(name[0], number, rows)}
            if domain is not None and counts is not None:
                columns["category"] = pa.array(domain.category_ids(number).astype(np.int32))
                columns["count"] = pa.array(counts[number + FIRST_ID])
            yield pa.table(columns, schema=schema)

    return write_groups(folder, f"vocab/{name}.parquet", groups(), schema)
