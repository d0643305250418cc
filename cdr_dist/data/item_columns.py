"""What a dataset's vocabularies say of every item: category and count; of an item or user: declared columns. By id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cdr_dist.data import storage
from cdr_dist.data.dataset import PADDING, UNKNOWN, Manifest
from cdr_dist.data.lists import Lists


def item_categories(folder: str, manifest: Manifest, domain: str) -> NDArray[np.int32]:
    """The category id of every item id of a domain [rows]; an unknown item's is unknown."""
    uri = storage.join(folder, manifest.vocab[f"{domain}_item"].path)
    with storage.naming(uri):
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["id", "category"])
    found = np.full(manifest.rows[f"{domain}_item"], PADDING, dtype=np.int32)
    found[UNKNOWN] = UNKNOWN
    found[table.column("id").to_numpy()] = table.column("category").to_numpy()
    return found


def item_counts(folder: str, manifest: Manifest, domain: str) -> NDArray[np.int64]:
    """How often every item id of a domain occurs in training [rows]; 0 for the reserved ids."""
    uri = storage.join(folder, manifest.vocab[f"{domain}_item"].path)
    with storage.naming(uri):
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["id", "count"])
    found = np.zeros(manifest.rows[f"{domain}_item"], dtype=np.int64)
    found[table.column("id").to_numpy()] = table.column("count").to_numpy()
    return found


def values_of(folder: str, manifest: Manifest, vocabulary: str, columns: Sequence[str]) -> dict[str, Lists]:
    """Declared column -> the value ids of every id of a vocabulary of items or users; what is unknown has none."""
    if not columns:
        return {}
    uri = storage.join(folder, manifest.vocab[vocabulary].path)
    with storage.naming(uri):
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["id", *columns])
    rows, ids = manifest.rows[vocabulary], table.column("id").to_numpy()
    found = {}
    for column in columns:
        lists = table.column(column).combine_chunks()
        lengths = np.zeros(rows, dtype=np.int64)
        lengths[ids] = np.diff(lists.offsets.to_numpy())  # ids ascend
        found[column] = Lists.jagged(lists.flatten().to_numpy().astype(np.int32), lengths)
    return found
