"""The prepared dataset: its folder, its columns, its manifest.

    OUT/manifest.json                     written last; a folder without it is not a dataset
    OUT/vocab/{user,source_item,target_item,source_category,target_category}.parquet, {source,target}_COLUMN.parquet
    OUT/{train,valid,test}/part-00000.parquet …
    OUT/users/part-00000.parquet …                  every user as of the end of the logs: whom to recommend to
    OUT/sequences_{train,valid,test}/part-00000.parquet …   every source user's behaviours, to pre-train on (sequences=)
    OUT/forgotten.json                              whom jobs/forget.py has removed, if anybody

Row ids are vocabulary ids: 0 is padding, 1 is unknown, real keys start at 2. `source` and `target` are roles, so
a dataset of another pair of domains has the same columns; the domains' own names stand in the manifest. Several source
domains are one in this role: their items and categories are keyed DOMAIN:KEY, so that no two are mixed up.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from cdr_dist.data import storage
from cdr_dist.errors import UserError

SCHEMA_VERSION = 6
PADDING, UNKNOWN, FIRST_ID = 0, 1, 2
SPLITS = ("train", "valid", "test")
USERS = "users"
SEQUENCES = tuple(f"sequences_{split}" for split in SPLITS)
FOLDERS = (*SPLITS, USERS, *SEQUENCES)
"""Entries of `shards`."""
POSITIVES = tuple(f"{split}_positives" for split in SPLITS)
"""Entries of `counts`: rows with label 1."""
LEFT_OUT = ("unknown_targets", "short_targets")
"""Entries of `counts`: target behaviours without an example, for their unknown item or a history that is too short."""
UNKNOWN_SOURCE = ("source_history", "sequences")
"""Entries of `unknown` beside the splits."""
VOCABULARIES = ("user", "source_item", "target_item", "source_category", "target_category")
ROW_GROUP_ROWS = 20_000


def _list(element: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", element, nullable=False))


_ids, _labels = _list(pa.int32()), _list(pa.float32())

# A row has all of its columns, so that no reader has to look for nulls: lists decode in two thirds of the time.
EXAMPLE_SCHEMA = pa.schema(
    pa.field(name, of, nullable=False)
    for name, of in [
        ("example_id", pa.int64()),  # unique over the splits
        ("user", pa.int32()),
        ("item", pa.int32()),  # of the target domain, as is category
        ("category", pa.int32()),
        ("label", pa.float32()),
        ("timestamp", pa.int64()),
        # Positives before this behaviour, oldest first. Across domains: strictly earlier.
        ("target_history_item", _ids),
        ("target_history_category", _ids),
        ("source_history_item", _ids),
        ("source_history_category", _ids),
        ("source_history_first", pa.int32()),  # the user's positive source behaviours before those
        # The user's source behaviours strictly before the user's validation time, sampled down to 100.
        ("source_candidates_item", _ids),
        ("source_candidates_category", _ids),
        ("source_candidates_label", _labels),
        ("source_candidates_timestamp", _list(pa.int64())),
        ("source_candidates_before", _ids),  # the user's positive source behaviours before each
        # All of the user's *training* behaviours in the target domain (up to 1,000): what sampled negatives
        # must avoid, and where dev behaviours of the same user come from.
        ("target_candidates_item", _ids),
        ("target_candidates_category", _ids),
        ("target_candidates_label", _labels),
        ("position", pa.int32()),  # of this behaviour within target_candidates; -1 where it is not in it
        # Stored negatives of a validation or test row (labels by sampled negatives); empty in train.
        ("negatives_item", _ids),
    ]
)
# A row for every user, with what is known of them at the end of the logs; names as in EXAMPLE_SCHEMA.
USER_SCHEMA = pa.schema(
    pa.field(name, of, nullable=False)
    for name, of in [
        ("user_id", pa.string()),  # the key: a user without examples has no id of their own
        ("example_id", pa.int64()),  # a hash of the key, which the rows are shuffled by
        ("user", pa.int32()),
        ("target_history_item", _ids),
        ("source_history_item", _ids),
        ("source_history_first", pa.int32()),
        # The latest source behaviour, or none: what a recommendation is paired with.
        ("source_candidates_item", _ids),
        ("source_candidates_label", _labels),
        ("source_candidates_before", _ids),
        ("seen_item", _ids),  # all that the user has had to do with in the target domain, ascending
    ]
)
# A window of a source user's positive behaviours; two that follow one another share an item, so that every step from
# one item to the next is in one window.
SEQUENCE_SCHEMA = pa.schema(
    pa.field(name, of, nullable=False)
    for name, of in [
        ("example_id", pa.int64()),  # a hash of the user's key and the number of the window
        ("user", pa.int32()),  # unknown: a user without examples
        ("source_history_item", _ids),
        ("source_history_first", pa.int32()),  # the user's positive source behaviours before the window
    ]
)
SCHEMAS = dict.fromkeys(SPLITS, EXAMPLE_SCHEMA) | {USERS: USER_SCHEMA} | dict.fromkeys(SEQUENCES, SEQUENCE_SCHEMA)
# Shuffled ids repeat too little for dictionaries: without them a shard is smaller and written twice as fast.
PARQUET: dict[str, Any] = {
    "write_page_checksum": True,  # a bit that flips at rest is seen when its page is read
    "compression": "zstd",
    "use_dictionary": ["label", "source_candidates_label.list.element", "target_candidates_label.list.element"],
}

VOCAB_SCHEMA = pa.schema([("id", pa.int32()), ("key", pa.string())])
ITEM_VOCAB_SCHEMA = VOCAB_SCHEMA.append(pa.field("category", pa.int32())).append(pa.field("count", pa.int64()))
"""And a list of value ids for each declared column.

count: how often a positive has the item; target: in train; source: in sequences_train, each behaviour once, or without
sequences in the behaviours of all users with examples.
"""


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a split. `path` is relative to the dataset folder."""

    path: str
    rows: int
    row_groups: list[int]  # rows of each row group
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. Counts leave out the reserved ids; `rows` (table sizes) include them."""

    source_domain: str
    """All sources' names, joined by +."""
    target_domain: str
    seed: int
    label: str  # "rating" (stored) or "sampled" (negatives are drawn)
    eval_negatives: int  # stored negatives of each validation and test row; 0 with label="rating"
    rows: dict[str, int]  # vocabulary name -> rows, ids 0 and 1 included
    counts: dict[str, int]
    """users, {source,target}_{items,behaviours}, {source,target}_log_users (of the raw logs), {split}_positives: of the
    users with examples; cold_users: of those without that have a row in users/"""
    unseen: dict[str, dict[str, float]]  # valid|test -> user|item -> share of rows training never saw
    unknown: dict[str, float]
    """train|valid|test: share of rows whose user or item id is unknown. Share of positive source behaviours whose item
    is: source_history, of users with examples; sequences, of all in sequences_{train,valid,test}"""
    shards: dict[str, list[Shard]]
    vocab: dict[str, Shard]
    sources: list[str] = field(default_factory=list)  # the source domains' names
    features: dict[str, list[str]] = field(default_factory=dict)  # source|target|user -> declared columns
    options: dict[str, Any] = field(default_factory=dict)  # of prepare, as given
    schema: int = SCHEMA_VERSION
    before: list[str] = field(default_factory=list)
    """The checksums that it had before users were removed from it (jobs/forget.py), oldest first."""

    @property
    def checksum(self) -> str:
        """Identifies the dataset: a hash over all of the above, and so over the checksums of its files."""
        return checksum_of(self._entries())

    @property
    def classes(self) -> int:
        """How many classes the target items are (prepare's classes=); 0: they are items."""
        return int(self.options.get("classes") or 0)

    def is_or_was(self, checksum: str) -> bool:
        """Whether what was made from a dataset of this checksum was made from this one, or from it with more users."""
        return checksum in (self.checksum, *self.before)

    def examples(self, split: str) -> int:
        return sum(s.rows for s in self.shards[split])

    def to_json(self) -> str:
        return json.dumps(self._entries() | {"checksum": self.checksum}, indent=1, sort_keys=True)

    def _entries(self) -> dict[str, Any]:
        """Without `before` where it is empty: as datasets were written that nobody was removed from."""
        return {name: value for name, value in asdict(self).items() if name != "before" or value}


def checksum_of(raw: Mapping[str, Any]) -> str:
    """That of a manifest's JSON, over every entry but the checksum itself."""
    entries = {name: value for name, value in raw.items() if name != "checksum"}
    return storage.sha256(json.dumps(entries, sort_keys=True, separators=(",", ":")).encode())


def read_manifest(folder: str) -> Manifest:
    """Reads and checks `manifest.json`. UserError: no dataset there, damaged or edited, another schema version."""
    path = storage.join(folder, "manifest.json")
    if not storage.exists(path):
        raise UserError(f"{folder}: not a dataset (no manifest.json); write one with jobs/prepare.py")
    try:
        raw = json.loads(storage.read_bytes(path))
        version = raw["schema"]
        if version != SCHEMA_VERSION:
            raise UserError(f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}; {_AGAIN}")
        if raw.pop("checksum") != checksum_of(raw):
            raise UserError(
                f"{path}: damaged or edited (its checksum is that of other entries); copy it again, or {_AGAIN}"
            )
        raw["shards"] = {folder: [Shard(**s) for s in raw["shards"][folder]] for folder in FOLDERS}
        declared = [f"{domain}_{column}" for domain, columns in raw["features"].items() for column in columns]
        raw["vocab"] = {name: Shard(**raw["vocab"][name]) for name in (*VOCABULARIES, *declared)}
        manifest = Manifest(**raw)
        _check_numbers(manifest)
        return manifest
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged manifest ({error}); copy it again, or {_AGAIN}") from error


_AGAIN = "prepare the dataset again, into an empty folder"


def _check_numbers(manifest: Manifest) -> None:
    """TypeError: something that must be a number, or a text, is not."""
    files = [s for of in manifest.shards.values() for s in of] + list(manifest.vocab.values())
    numbers = [manifest.seed, manifest.eval_negatives, *manifest.rows.values(), *manifest.counts.values()]
    numbers += [n for s in files for n in (s.rows, s.bytes, *s.row_groups)]
    for value in numbers:
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{value!r} where a whole number belongs")
    for text in [manifest.label, *manifest.before, *(text for s in files for text in (s.path, s.sha256))]:
        if not isinstance(text, str):
            raise TypeError(f"{text!r} where a text belongs")
