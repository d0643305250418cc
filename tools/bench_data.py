"""Datasets of any size for benchmarks, written at once: ids drawn evenly, the lookups' worst case."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.data import storage
from cdr_dist.data.dataset import (
    EXAMPLE_SCHEMA,
    FIRST_ID,
    FOLDERS,
    ITEM_VOCAB_SCHEMA,
    PARQUET,
    POSITIVES,
    ROW_GROUP_ROWS,
    SEQUENCE_SCHEMA,
    SEQUENCES,
    SPLITS,
    UNKNOWN,
    VOCAB_SCHEMA,
    Manifest,
    Shard,
)


@dataclass(frozen=True)
class Shape:
    """Rows of the train split and of each of the others; keys of each vocabulary."""

    rows: int
    users: int
    source_items: int
    target_items: int
    evaluated: int = 64
    categories: int = 300
    history: float = 8.0
    """Mean length of the histories (geometric, at most 50); 0: none."""
    candidates: int = 20
    sampled: bool = False
    """Labels by sampled negatives, one stored with each row that is evaluated."""
    sequences: int = 0
    """Rows to pre-train on, `length` items each, by Zipf's law."""
    length: int = 50


def random_dataset(folder: Path, shape: Shape) -> str:
    """Writes a dataset folder as `jobs/prepare.py` does, one shard a split."""
    random = np.random.default_rng(8)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "user": shape.users,
        "source_item": shape.source_items,
        "target_item": shape.target_items,
        "source_category": shape.categories,
        "target_category": shape.categories,
    }
    category = {d: _ids(random, shape.categories, sizes[f"{d}_item"] + FIRST_ID) for d in ("source", "target")}
    vocab = {}
    for name, size in sizes.items():
        ids = pa.array(np.arange(FIRST_ID, FIRST_ID + size, dtype=np.int32))
        columns = {"id": ids, "key": ids.cast(pa.string())}
        if name.endswith("_item"):
            columns["category"] = pa.array(category[name.removesuffix("_item")][FIRST_ID:])
            columns["count"] = pa.array(np.ones(size, dtype=np.int64))
            vocab[name] = _write(folder, f"vocab/{name}.parquet", pa.table(columns, schema=ITEM_VOCAB_SCHEMA))
        else:
            vocab[name] = _write(folder, f"vocab/{name}.parquet", pa.table(columns, schema=VOCAB_SCHEMA))
    shards = {
        split: [_write(folder, f"{split}/part-00000.parquet", _rows(random, shape, sizes, category, split))]
        for split in SPLITS
    }
    if shape.sequences:
        name = SEQUENCES[0]
        shards[name] = [_write(folder, f"{name}/part-00000.parquet", _sequences(random, shape))]
    counts = {"users": shape.users, "source_items": shape.source_items, "target_items": shape.target_items}
    manifest = Manifest(
        source_domain="source",
        target_domain="target",
        seed=8,
        label="sampled" if shape.sampled else "rating",
        eval_negatives=int(shape.sampled),
        rows={name: size + FIRST_ID for name, size in sizes.items()},
        counts=counts | {"source_behaviours": 0, "target_behaviours": shape.rows} | dict.fromkeys(POSITIVES, 1),
        unseen={split: {"user": 0.0, "item": 0.0} for split in SPLITS[1:]},
        unknown=dict.fromkeys(SPLITS, 0.0),
        shards={name: [] for name in FOLDERS} | shards,
        vocab=vocab,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return str(folder)


def written(held: ExitStack, shape: Shape) -> str:
    """A random dataset that is thrown away with the case."""
    return random_dataset(Path(scratch(held)) / "data", shape)


def scratch(held: ExitStack) -> str:
    return held.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))


def _rows(random: Any, shape: Shape, sizes: dict[str, int], category: dict[str, Any], split: str) -> pa.Table:
    n = shape.rows if split == "train" else shape.evaluated
    item = _ids(random, sizes["target_item"], n)
    likes = np.ones(n, dtype=np.float32) if shape.sampled else random.integers(0, 2, n).astype(np.float32)
    candidates = np.full(n, shape.candidates)
    columns: dict[str, Any] = {
        "example_id": np.arange(n) + SPLITS.index(split) * (shape.rows + shape.evaluated),
        "user": _ids(random, sizes["user"], n),
        "item": item,
        "category": category["target"][item],
        "label": likes,
        "timestamp": np.arange(n),
        "position": random.integers(0, 5, n).astype(np.int32),
        "source_history_first": np.zeros(n, dtype=np.int32),
        "negatives_item": _lists(
            np.full(n, int(shape.sampled and split != "train")), lambda k: _ids(random, sizes["target_item"], k)
        ),
    }
    for domain in ("target", "source"):
        history = np.minimum(random.geometric(1 / shape.history, n), 50) if shape.history else np.zeros(n, np.int64)
        lengths = {"history": history, "candidates": candidates if domain == "source" else np.full(n, 5)}
        for name, of_rows in lengths.items():
            ids = _ids(random, sizes[f"{domain}_item"], int(of_rows.sum()))
            values = {
                "item": ids,
                "category": category[domain][ids],
                "label": random.integers(0, 2, len(ids)).astype(np.float32),
                "timestamp": np.zeros(len(ids), dtype=np.int64),
                "before": np.zeros(len(ids), dtype=np.int32),
            }
            for part, of_values in values.items():
                if f"{domain}_{name}_{part}" in EXAMPLE_SCHEMA.names:
                    columns[f"{domain}_{name}_{part}"] = _lists(of_rows, lambda _, kept=of_values: kept)
    return pa.table({name: columns[name] for name in EXAMPLE_SCHEMA.names}, schema=EXAMPLE_SCHEMA)


def _sequences(random: Any, shape: Shape) -> pa.Table:
    n = shape.sequences
    items = FIRST_ID + np.minimum(random.zipf(1.2, n * shape.length) - 1, shape.source_items - 1).astype(np.int32)
    columns = {
        "example_id": np.arange(n),
        "user": np.full(n, UNKNOWN, dtype=np.int32),
        "source_history_item": _lists(np.full(n, shape.length), lambda _: items),
        "source_history_first": np.zeros(n, dtype=np.int32),
    }
    return pa.table(columns, schema=SEQUENCE_SCHEMA)


def _ids(random: Any, keys: int, count: int) -> Any:
    return random.integers(FIRST_ID, FIRST_ID + keys, count, dtype=np.int32)


def _lists(lengths: Any, values: Any) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values(int(offsets[-1]))))


def _write(folder: Path, path: str, table: pa.Table) -> Shard:
    file = folder / path
    file.parent.mkdir(exist_ok=True)
    groups_of = 1 << 20 if path.startswith("vocab/") else ROW_GROUP_ROWS
    pq.write_table(table, file, **PARQUET, row_group_size=groups_of)
    metadata = pq.ParquetFile(file).metadata
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    content = file.read_bytes()
    return Shard(path, table.num_rows, groups, len(content), storage.sha256(content))
