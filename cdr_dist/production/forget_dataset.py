"""Users' removal from one dataset folder: vocabulary, examples, sequences and rows in users/.

Files that hold something of them are written anew under other names, in the order of before; then the manifest is
switched to these, and the old files go. So the folder is at every moment the old dataset or the new one. A vocabulary
id is given to nobody else: `rows` stays. The manifest says which checksums the dataset had `before`, so that runs which
were trained on it still know it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cdr_dist.crash_points import durable
from cdr_dist.data import hashing, storage
from cdr_dist.data.dataset import FOLDERS, SEQUENCES, SPLITS, UNKNOWN, USERS, Manifest, Shard, read_manifest
from cdr_dist.data.parquet_input import ParquetInput
from cdr_dist.data.sequences import window_ids
from cdr_dist.data.shuffle import row_groups, write_groups

log = logging.getLogger(__name__)

VOCABULARY = "vocab"
USER, USER_KEY, WINDOW = "user", "user_id", "example_id"


def forget_in_dataset(
    folder: str, keys: Sequence[str], ids: Mapping[str, int | None], still_ours: Callable[[], None]
) -> dict[str, int]:
    """ids: of the keys, as far as known -> what was removed, and how much of it; {}: nothing was there any more.

    still_ours: raises where another job has taken over. UserError: no dataset, or a damaged one.
    """
    manifest = read_manifest(folder)
    _sweep(folder, manifest, still_ours)
    numbers = pa.array(sorted(n for n in ids.values() if n is not None), pa.int32())
    texts = pa.array(sorted(keys), pa.string())
    found = _Scan(folder, manifest, numbers, texts)
    if not found.removed:
        return {}
    if found.nameless:
        log.warning(
            "%s: of %d of these users validation or test may hold rows without an id (vocab=train), which nobody can "
            "tell from others': prepare it again",
            folder,
            found.nameless,
        )
    again = len(manifest.before) + 1

    def without(shard: Shard, column: str, wanted: pa.Array) -> Shard:
        return _written_without(folder, shard, again, column, wanted) if shard.path in found.hit else shard

    whose = dict.fromkeys(SPLITS, (USER, numbers)) | {USERS: (USER_KEY, texts)}
    whose |= dict.fromkeys(SEQUENCES, (WINDOW, pa.array(sorted(found.windows), pa.int64())))
    shards = {name: [without(shard, *whose[name]) for shard in of] for name, of in manifest.shards.items()}
    changed = dataclasses.replace(
        manifest,
        shards={name: [shard for shard in of if shard.rows] for name, of in shards.items()},
        vocab=manifest.vocab | {"user": without(manifest.vocab["user"], "key", texts)},
        counts=found.counts(),
        unseen=found.unseen(),
        unknown=found.unknown(),
        before=[*manifest.before, manifest.checksum],
    )
    still_ours()
    with durable("forget.manifest"):
        storage.write_bytes(storage.join(folder, "manifest.json"), changed.to_json().encode())
    _sweep(folder, changed, still_ours)
    return found.removed


def _sweep(folder: str, manifest: Manifest, still_ours: Callable[[], None]) -> None:
    """Removes files that the manifest does not name, of a removal that was killed or has switched it."""
    named = {shard.path for of in (*manifest.shards.values(), manifest.vocab.values()) for shard in of}
    there = [f"{part}/{name}" for part in (*FOLDERS, VOCABULARY) for name in storage.names(storage.join(folder, part))]
    halves = [name for name in storage.names(folder) if name.startswith(".") and name.endswith(".part")]
    for path in [*(path for path in there if path not in named), *halves]:
        still_ours()
        with durable("forget.sweep"):
            storage.remove_file(storage.join(folder, path))


def _written_without(folder: str, shard: Shard, again: int, column: str, wanted: pa.Array) -> Shard:
    """Writes a file anew, under another name, without the rows whose `column` is wanted."""
    uri, path = storage.join(folder, shard.path), f"{shard.path.partition('.')[0]}.{again}.parquet"
    with storage.naming(uri), storage.open_input(uri) as file, durable("forget.shard"):
        table = ParquetInput(file, checksums=True)
        groups = row_groups(_kept(table, column, wanted), table.schema_arrow)
        return write_groups(folder, path, groups, table.schema_arrow)


def _kept(table: ParquetInput, column: str, wanted: pa.Array) -> Iterator[pa.Table]:
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group)
        yield rows.filter(pc.invert(pc.is_in(rows[column], wanted)))


class _Scan:
    """What a dataset holds of the users, and what it counts without them. hit: paths of the files that hold something.

    removed: what of them is there -> how much.
    """

    def __init__(self, folder: str, manifest: Manifest, numbers: pa.Array, keys: pa.Array) -> None:
        self._folder, self._manifest, self._numbers, self._keys = folder, manifest, numbers, keys
        self.hit: set[str] = set()
        self.removed: dict[str, int] = {}
        self._trained = [np.zeros(manifest.rows[name], dtype=bool) for name in ("user", "target_item")]
        self._with_examples: set[int] = set()
        self._rows, self._lost_positives = Counter[str](), Counter[str]()
        self._unknown, self._unseen = Counter[str](), Counter[tuple[str, str]]()
        for split in SPLITS:
            self._look_at(split)
        self.windows: set[int] = set()
        """example_id of their windows: who has no examples has no other name there."""
        for part in SEQUENCES:
            self._look_at_sequences(part)
        self._add("sequences", len(self.windows))
        self._people = [row for shard in manifest.shards[USERS] for row in self._own(shard)]
        self._add("rows of users", len(self._people))
        self._add("keys", self._in_vocabulary())

    def counts(self) -> dict[str, int]:
        """Behaviours of the source that the dataset knows nothing of (negative ones, without examples) stay counted."""
        counts = Counter(self._manifest.counts)
        counts["target_behaviours"] -= sum(self.removed.get(f"{split} rows", 0) for split in SPLITS)
        for split in SPLITS:
            counts[f"{split}_positives"] -= self._lost_positives[split]
        for row in self._people:
            source, target = self._sides(row)
            counts["source_log_users"] -= source
            counts["target_log_users"] -= target
            both = target and (source or self._manifest.options.get("users", "both") == "target")
            counts["users" if both else "cold_users"] -= 1
            if both and source:
                before, label = row["source_candidates_before"][-1], row["source_candidates_label"][-1]
                counts["source_behaviours"] -= before + (label > 0)
        return {name: max(0, int(counts[name])) for name in self._manifest.counts}

    def unseen(self) -> dict[str, dict[str, float]]:
        return {
            split: {what: self._unseen[split, what] / max(1, self._rows[split]) for what in of}
            for split, of in self._manifest.unseen.items()
        }

    def unknown(self) -> dict[str, float]:
        """Of source behaviours as it was."""
        of_rows = {split: self._unknown[split] / max(1, self._rows[split]) for split in SPLITS}
        return self._manifest.unknown | of_rows

    @property
    def nameless(self) -> int:
        """Users who may have examples, but no id."""
        return sum(row["user"] == UNKNOWN and self._sides(row) == (True, True) for row in self._people)

    def _sides(self, row: dict[str, Any]) -> tuple[bool, bool]:
        """Whether a user is in the log of the source, and of the target."""
        source = bool(row["source_candidates_item"])
        target = bool(row["seen_item"] or row["target_history_item"] or row["user"] in self._with_examples)
        return source, target or not source

    def _add(self, what: str, number: int) -> None:
        if number:
            self.removed[what] = number

    def _look_at(self, split: str) -> None:
        """train first: the others ask what it has seen."""
        mine = self._numbers.to_numpy()
        for shard in self._manifest.shards[split]:
            for user, item, label in self._columns(shard, ["user", "item", "label"]):
                gone = np.isin(user, mine)
                if gone.any():
                    self.hit.add(shard.path)
                    self._with_examples |= set(user[gone].tolist())
                    self._add(f"{split} rows", self.removed.get(f"{split} rows", 0) + int(gone.sum()))
                    self._lost_positives[split] += int((label[gone] > 0).sum())
                user, item = user[~gone], item[~gone]
                self._rows[split] += len(user)
                self._unknown[split] += int(((user == UNKNOWN) | (item == UNKNOWN)).sum())
                for name, ids, trained in zip(("user", "item"), (user, item), self._trained, strict=True):
                    if split == SPLITS[0]:
                        trained[ids] = True
                        trained[: UNKNOWN + 1] = False
                    else:
                        self._unseen[split, name] += int((~trained[ids]).sum())

    def _look_at_sequences(self, part: str) -> None:
        users = hashing.of_keys(self._keys)
        for shard in self._manifest.shards[part]:
            for example_id, first in self._columns(shard, [WINDOW, "source_history_first"]):
                numbers = np.unique(first // (self._manifest.options["sequences"] - 1))
                theirs = np.intersect1d(example_id, window_ids(users[:, None], numbers))
                self.windows |= set(theirs.tolist())
                if len(theirs):
                    self.hit.add(shard.path)

    def _columns(self, shard: Shard, columns: list[str]) -> Iterator[list[NDArray[Any]]]:
        uri = storage.join(self._folder, shard.path)
        with storage.naming(uri), storage.open_input(uri) as file:
            for batch in ParquetInput(file).iter_batches(columns=columns):
                yield [column.to_numpy(zero_copy_only=False) for column in batch.columns]

    def _own(self, shard: Shard) -> list[dict[str, Any]]:
        """The users' rows in a shard of users/."""
        uri, found = storage.join(self._folder, shard.path), []
        with storage.naming(uri), storage.open_input(uri) as file:
            table = ParquetInput(file)
            for group in range(table.num_row_groups):
                there = pc.is_in(table.read_row_group(group, columns=[USER_KEY])[USER_KEY], self._keys)
                if pc.any(there).as_py():
                    found += table.read_row_group(group).filter(there).to_pylist()
        if found:
            self.hit.add(shard.path)
        return found

    def _in_vocabulary(self) -> int:
        shard, found = self._manifest.vocab["user"], 0
        uri = storage.join(self._folder, shard.path)
        with storage.naming(uri), storage.open_input(uri) as file:
            for batch in ParquetInput(file).iter_batches(columns=["key"]):
                found += pc.sum(pc.is_in(batch.column(0), self._keys)).as_py() or 0
        if found:
            self.hit.add(shard.path)
        return found
