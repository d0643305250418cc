"""List columns whose rows may lie in several places, with what a batch needs of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cdr_dist.compiled import compiled
from cdr_dist.data.scattered import Scattered, element


@dataclass(frozen=True)
class Lists:
    """Jagged rows: row i is `values[place[i]][starts[i] : starts[i] + lengths[i]]`; place, starts, lengths: [n]."""

    values: Scattered
    place: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def pick(self, rows: NDArray[np.int64], index: NDArray[np.int64], otherwise: float = 0) -> NDArray:
        """The value at `index` of each row's list; `otherwise` where the list is empty."""
        found = np.full(len(rows), otherwise, dtype=self.values.dtype)
        _pick(*self.where, rows, index, found)
        return found

    @classmethod
    def jagged(cls, values: NDArray, lengths: NDArray[np.int64]) -> Lists:
        """Rows that stand in one array, one after the other."""
        ends = np.cumsum(lengths, dtype=np.int64)
        return cls(Scattered([values]), np.zeros(len(lengths), dtype=np.int32), ends - lengths, lengths)

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray, NDArray[np.int64]]:
        """The lists of some rows, one after the other: values [total], lengths [n]."""
        lengths = self.lengths[rows]
        found = np.empty(int(lengths.sum()), dtype=self.values.dtype)
        _copy(*self.where, rows, found)
        return found, lengths

    def contain(self, rows: NDArray[np.int64], value: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether each row's list holds the value that is given for it; rows, value: [n]."""
        found = np.zeros(len(rows), dtype=np.bool_)
        _contain(*self.where, rows, value, found)
        return found

    @property
    def where(self) -> tuple[NDArray, ...]:
        """What a compiled loop reads the lists by: addresses, like, place, starts, lengths."""
        return self.values.addresses, self.values.like, self.place, self.starts, self.lengths


@compiled()
def _pick(addresses: Any, like: Any, place: Any, starts: Any, lengths: Any, rows: Any, index: Any, found: Any) -> None:
    for i in range(len(rows)):
        row = rows[i]
        if lengths[row] > 0:
            found[i] = element(addresses[place[row]], starts[row] + index[i], like)


@compiled()
def _copy(addresses: Any, like: Any, place: Any, starts: Any, lengths: Any, rows: Any, found: Any) -> None:
    to = 0
    for i in range(len(rows)):
        row = rows[i]
        address, start, count = addresses[place[row]], starts[row], lengths[row]
        for j in range(count):
            found[to + j] = element(address, start + j, like)
        to += count


@compiled()
def _contain(
    addresses: Any, like: Any, place: Any, starts: Any, lengths: Any, rows: Any, value: Any, found: Any
) -> None:
    for i in range(len(rows)):
        row = rows[i]
        address, first = addresses[place[row]], starts[row]
        for j in range(lengths[row]):
            if element(address, first + j, like) == value[i]:
                found[i] = True
                break
