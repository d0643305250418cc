"""List columns of a batch as (values, lengths), with the few operations a batch needs, without loops over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True)
class Lists:
    """Jagged rows: values [total], lengths [n]."""

    values: NDArray
    lengths: NDArray[np.int64]

    @staticmethod
    def of(column: pa.ChunkedArray) -> Lists:
        chunk = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
        assert not chunk.null_count, "a stored list may be empty, not missing"
        offsets = chunk.offsets.to_numpy()
        values = chunk.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        return Lists(values, (offsets[1:] - offsets[:-1]).astype(np.int64))

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.cumsum(self.lengths) - self.lengths

    @property
    def owner(self) -> NDArray[np.int64]:
        """The row of each value."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def take(self, rows: NDArray[np.int64], last: int | None = None) -> Lists:
        """The lists of the given rows, each cut to its `last` values."""
        whole = self.lengths[rows]
        lengths = whole if last is None else np.minimum(whole, last)
        starts = self.starts[rows] + whole - lengths
        ends = np.cumsum(lengths)
        index = np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
        return Lists(self.values[index], lengths)

    def pick(self, rows: NDArray[np.int64], index: NDArray[np.int64], otherwise: float = 0) -> NDArray:
        """values[index] within each row's list; `otherwise` where the list is empty."""
        empty = self.lengths[rows] == 0
        if not len(self.values):
            return np.full(len(rows), otherwise, dtype=self.values.dtype)
        place = np.where(empty, 0, self.starts[rows] + index)
        return np.where(empty, otherwise, self.values[place]).astype(self.values.dtype)
