"""List columns whose rows may lie in several places, with what a batch needs of them, without loops over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Lists:
    """Jagged rows: row i is `values[place[i]][starts[i] : starts[i] + lengths[i]]`; place, starts, lengths: [n]."""

    values: Sequence[NDArray]
    place: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def pick(self, rows: NDArray[np.int64], index: NDArray[np.int64], otherwise: float = 0) -> NDArray:
        """The value at `index` of each row's list; `otherwise` where the list is empty."""
        found = np.full(len(rows), otherwise, dtype=self.values[0].dtype)
        filled, place, at = self.lengths[rows] > 0, self.place[rows], self.starts[rows] + index
        for number, values in enumerate(self.values):
            here = np.flatnonzero(filled & (place == number))
            found[here] = values[at[here]]
        return found

    def of(self, rows: NDArray[np.int64], last: int | None = None) -> tuple[NDArray, NDArray[np.int64]]:
        """The lists of some rows, each cut to its `last` values, one after the other: values [total], lengths [n]."""
        place, whole = self.place[rows], self.lengths[rows]
        lengths = whole if last is None else np.minimum(whole, last)
        starts, ends = self.starts[rows] + whole - lengths, np.cumsum(lengths)
        found = np.empty(int(ends[-1]) if len(ends) else 0, dtype=self.values[0].dtype)
        for number, values in enumerate(self.values):
            here = np.flatnonzero(place == number) if len(self.values) > 1 else slice(None)
            each, to = lengths[here], ends[here] - lengths[here]
            inner = np.arange(int(each.sum())) - np.repeat(np.cumsum(each) - each, each)
            found[np.repeat(to, each) + inner] = values[np.repeat(starts[here], each) + inner]
        return found, lengths

    def contain(self, rows: NDArray[np.int64], value: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each row's list holds the value that is given for it; rows, value: [n]."""
        values, lengths = self.of(rows)
        hits = np.concatenate([[0], np.cumsum(values == np.repeat(value, lengths))])
        ends = np.cumsum(lengths)
        return hits[ends] > hits[ends - lengths]
