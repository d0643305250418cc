"""The keys that users, items and categories have in the logs, by vocabulary id."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cdr_dist.data import storage
from cdr_dist.data.dataset import FIRST_ID, USERS, Manifest
from cdr_dist.data.parquet_input import ParquetInput

PADDING_KEY, UNKNOWN_KEY = "", "(unknown)"
"""What ids 0 and 1 are shown as."""


def keys_of_users(folder: str, manifest: Manifest) -> Iterator[pa.Array]:
    """All keys of users that a dataset holds, a row group at a time: those with an id, then those with a row."""
    files = itertools.chain(
        [(manifest.vocab["user"].path, "key")], ((s.path, "user_id") for s in manifest.shards[USERS])
    )
    for path, column in files:
        uri = storage.join(folder, path)
        with storage.naming(uri), storage.open_input(uri) as file:
            for group in ParquetInput(file).iter_batches(columns=[column]):
                yield group.column(0)


class Keys:
    """A whole vocabulary in memory: its keys' bytes, and 8 more a key."""

    def __init__(self, folder: str, manifest: Manifest, name: str) -> None:
        uri = storage.join(folder, manifest.vocab[name].path)
        with storage.naming(uri):
            table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["id", "key"])
        # Large: the offsets of a plain string array end at 2 GiB.
        reserved = pa.array([PADDING_KEY, UNKNOWN_KEY], pa.large_string())
        known = pa.chunked_array([reserved, *table.column("key").cast(pa.large_string()).chunks]).combine_chunks()
        place = np.full(manifest.rows[name], -1, dtype=np.int64)  # an id may have lost its key
        place[:FIRST_ID] = np.arange(FIRST_ID)
        place[table.column("id").to_numpy()] = np.arange(FIRST_ID, len(known))
        self._keys = known.take(pa.array(place, mask=place < 0))

    def __len__(self) -> int:
        """Keys of the logs, without the reserved ids."""
        return len(self._keys) - FIRST_ID - self._keys.null_count

    def ids_of(self, keys: pa.Array) -> NDArray[np.int64]:
        """[n] keys -> [n] ids; -1: of none."""
        found = pc.index_in(keys.cast(pa.large_string()), self._keys.slice(FIRST_ID))
        return np.asarray(pc.fill_null(found, -1 - FIRST_ID)).astype(np.int64) + FIRST_ID

    def of(self, ids: NDArray[np.int64]) -> pa.Array:
        """[n] ids -> [n] keys (string)."""
        return self._keys.take(pa.array(ids)).cast(pa.string())

    def id_of(self, key: str) -> int | None:
        found = pc.index(self._keys.slice(FIRST_ID), pa.scalar(key, pa.large_string())).as_py()
        return None if found < 0 else found + FIRST_ID

    def near(self, key: str, count: int = 3) -> list[str]:
        """The keys around the place where this one would stand among all of them, sorted."""
        known = self._keys.slice(FIRST_ID).drop_null()
        known = known.take(pc.sort_indices(known))
        place = pc.sum(pc.less(known, pa.scalar(key, pa.large_string()))).as_py() or 0
        first = max(0, min(place - count // 2, len(known) - count))
        return known.slice(first, count).to_pylist()
