"""The behaviours of one domain in one user partition, as flat arrays ordered by (user, timestamp, input row)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Behaviours:
    """Arrays of equal length n; `user` is 0..users-1 within the partition, `item` an id of whatever kind."""

    users: int
    user: Ints
    item: Ints
    timestamp: Ints
    label: NDArray[np.float32]

    @cached_property
    def starts(self) -> Ints:
        """First row of each user, and n: length users + 1."""
        return np.searchsorted(self.user, np.arange(self.users + 1))

    @property
    def place(self) -> Ints:
        """Each row's place within its user, from 0."""
        return np.arange(len(self.user)) - self.starts[self.user]

    @property
    def of_user(self) -> Ints:
        """How many rows each user has: length users."""
        return np.diff(self.starts)

    def where(self, mask: NDArray[np.bool_]) -> Behaviours:
        return Behaviours(self.users, self.user[mask], self.item[mask], self.timestamp[mask], self.label[mask])

    def first_not_before(self, user: Ints, time: Ints) -> Ints:
        """For each (user, time): the index of that user's first row at or after the time (or of the row after)."""
        times = np.unique(self.timestamp)
        width = len(times) + 1
        codes = self.user * width + np.searchsorted(times, self.timestamp)
        return np.searchsorted(codes, user * width + np.searchsorted(times, time))


@dataclass(frozen=True)
class Slices:
    """Row r stands for `starts[r] : ends[r]` of a flat array."""

    starts: Ints
    ends: Ints

    @property
    def lengths(self) -> Ints:
        return self.ends - self.starts

    def at(self, rows: slice | Ints) -> Slices:
        return Slices(self.starts[rows], self.ends[rows])

    @cached_property
    def _offsets(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    @cached_property
    def _index(self) -> Ints:
        return np.repeat(self.starts - self._offsets[:-1], self.lengths) + np.arange(self._offsets[-1])

    def of(self, values: NDArray[np.generic]) -> pa.ListArray:
        """The slices of a flat array as a list column."""
        return pa.ListArray.from_arrays(pa.array(self._offsets.astype(np.int32)), pa.array(values[self._index]))


def most_recent(starts: Ints, ends: Ints, most: int) -> Slices:
    return Slices(np.maximum(starts, ends - most), ends)
