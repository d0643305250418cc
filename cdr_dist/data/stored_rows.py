"""Stored rows in the order in which they are used; their columns stay where they were decoded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdr_dist.compiled import compiled
from cdr_dist.data.lists import Lists
from cdr_dist.data.scattered import Scattered, element


class Columns:
    """The columns of a decoded table as arrays, each converted when it is first asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table.combine_chunks()
        self._flat: dict[str, NDArray] = {}
        self._lists: dict[str, tuple[NDArray, NDArray]] = {}

    def flat(self, name: str) -> NDArray:
        """[rows]"""
        if name not in self._flat:
            self._flat[name] = self._table.column(name).to_numpy()
        return self._flat[name]

    def texts(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)

    def lists(self, name: str) -> tuple[NDArray, NDArray]:
        """Values of all rows, and the offsets [rows + 1] of each row's."""
        if name not in self._lists:
            chunks = self._table.column(name).chunks
            assert not any(chunk.null_count for chunk in chunks), "a stored list may be empty, not missing"
            values = chunks[0].values.to_numpy(zero_copy_only=False) if chunks else np.zeros(0, dtype=np.int32)
            offsets = chunks[0].offsets.to_numpy() if chunks else np.zeros(1, dtype=np.int32)
            self._lists[name] = values, offsets
        return self._lists[name]


class StoredRows:
    """n rows: row i is row `row[i]` of `columns[place[i]]`. Integers come as int64."""

    def __init__(self, columns: Sequence[Columns], place: NDArray[np.int32], row: NDArray[np.int64]) -> None:
        self._columns, self._place, self._row = columns, place, row
        self._flat: dict[str, NDArray] = {}
        self._lists: dict[str, Lists] = {}

    @classmethod
    def of(cls, table: pa.Table) -> StoredRows:
        """The rows of a table, in its order."""
        return cls.joined([(Columns(table), np.arange(table.num_rows))])

    @classmethod
    def joined(cls, parts: Iterable[tuple[Columns, NDArray[np.int64]]]) -> StoredRows:
        """Rows of given numbers, part by part; at least one part."""
        of, rows = zip(*parts, strict=True)
        columns = list(dict.fromkeys(of))
        number = {each: i for i, each in enumerate(columns)}
        place = np.repeat(np.array([number[each] for each in of], dtype=np.int32), [len(row) for row in rows])
        return cls(columns, place, np.concatenate(rows))

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, name: str) -> NDArray:
        """A column that is no list, [n]."""
        if name not in self._flat:
            values = Scattered([columns.flat(name) for columns in self._columns])
            self._flat[name] = values.gather(self._place, self._row, np.int64 if values.dtype.kind == "i" else None)
        return self._flat[name]

    def lists(self, name: str) -> Lists:
        if name not in self._lists:
            values, offsets = zip(*(columns.lists(name) for columns in self._columns), strict=True)
            bounds = np.empty((2, len(self)), dtype=np.int64)
            of = Scattered(offsets)
            _bounds(of.addresses, of.like, self._place, self._row, bounds)
            self._lists[name] = Lists(Scattered(values), self._place, *bounds)
        return self._lists[name]

    def texts(self, name: str) -> pa.Array:
        """A column of texts, [n]."""
        parts = [columns.texts(name) for columns in self._columns]
        first = np.cumsum([0, *map(len, parts)])[:-1]
        chunks = pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=pa.string())
        return chunks.take(pa.array(first[self._place] + self._row)).combine_chunks()

    def arranged(self, order: NDArray[np.int64]) -> StoredRows:
        """The rows of these numbers."""
        return StoredRows(self._columns, self._place[order], self._row[order])

    def cut(self, sizes: Sequence[int]) -> list[StoredRows]:
        """So many rows each, one after the other."""
        edges = itertools.pairwise(np.cumsum([0, *sizes]).tolist())
        return [StoredRows(self._columns, self._place[a:b], self._row[a:b]) for a, b in edges]


@compiled()
def _bounds(addresses: Any, like: Any, place: Any, row: Any, bounds: Any) -> None:
    """Where each row's list starts, and its length."""
    for i in range(len(row)):
        address = addresses[place[i]]
        start = element(address, row[i], like)
        bounds[0, i], bounds[1, i] = start, element(address, row[i] + 1, like) - start
