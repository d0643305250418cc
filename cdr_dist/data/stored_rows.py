"""Stored rows in the order in which they are used; their columns stay where they were decoded."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdr_dist.data.lists import Lists


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
            found = [columns.flat(name) for columns in self._columns]
            kept = np.empty(len(self), dtype=np.int64 if found[0].dtype.kind == "i" else found[0].dtype)
            for values, here in zip(found, self._here, strict=True):
                kept[here] = values[self._row[here]]
            self._flat[name] = kept
        return self._flat[name]

    def lists(self, name: str) -> Lists:
        if name not in self._lists:
            found = [columns.lists(name) for columns in self._columns]
            starts, lengths = np.empty(len(self), dtype=np.int64), np.empty(len(self), dtype=np.int64)
            for (_, offsets), here in zip(found, self._here, strict=True):
                row = self._row[here]
                starts[here] = offsets[row]
                lengths[here] = offsets[row + 1] - starts[here]
            self._lists[name] = Lists([values for values, _ in found], self._place, starts, lengths)
        return self._lists[name]

    def cut(self, sizes: Sequence[int]) -> list[StoredRows]:
        """So many rows each, one after the other."""
        edges = itertools.pairwise(np.cumsum([0, *sizes]).tolist())
        return [StoredRows(self._columns, self._place[a:b], self._row[a:b]) for a, b in edges]

    @cached_property
    def _here(self) -> list[NDArray | slice]:
        """Which rows lie in each of the columns."""
        if len(self._columns) == 1:
            return [slice(None)]
        return [np.flatnonzero(self._place == number) for number in range(len(self._columns))]
