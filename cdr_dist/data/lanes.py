"""The order of a stream: which stored rows make global step t of an epoch. Pure arithmetic, no reading.

An epoch permutes the row groups and concatenates them. Lane l of L owns a contiguous range of the R rows (the first
R mod L lanes own one row more), cuts it into windows of w row groups and permutes within a window. Global step t
takes positions t*b .. (t+1)*b - 1 of the interleaved order, in which position p is row p // L of lane p mod L. So a
step is a function of (seed, name, epoch, t, b), a worker serves a contiguous range of lanes, and the state is
(epoch, t) whatever the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.hashing import key, permutation


@dataclass(frozen=True)
class Piece:
    """Rows start..stop-1 of one row group (an index into the split's list of row groups)."""

    row_group: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """Consecutive pieces of a lane, shuffled together; `first` is the lane position of its first row."""

    pieces: tuple[Piece, ...]
    first: int
    number: int

    @cached_property
    def rows(self) -> int:
        return sum(p.rows for p in self.pieces)


@dataclass(frozen=True)
class Order:
    """The order of one epoch of one stream. `row_groups`: rows of each row group of the split."""

    row_groups: tuple[int, ...]
    lanes: int
    window: int
    seed: int
    name: str
    epoch: int
    shuffle: bool = True

    @cached_property
    def rows(self) -> int:
        return sum(self.row_groups)

    def steps(self, rows_per_step: int) -> int:
        return -(-self.rows // rows_per_step)

    def lane_rows(self, lane: int) -> int:
        return self.rows // self.lanes + (lane < self.rows % self.lanes)

    def taken(self, lane: int, position: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the lane among the first `position` interleaved ones."""
        return np.maximum(0, -(-(position - lane) // self.lanes))

    def edges(self, lane: int, step: int, steps: int, rows_per_step: int) -> NDArray[np.int64]:
        """Lane positions between which `steps` steps from `step` on take the lane's rows, [steps + 1]."""
        last = np.arange(step, step + steps + 1, dtype=np.int64) * rows_per_step
        return self.taken(lane, np.minimum(last, self.rows))

    def windows(self, lane: int) -> list[Window]:
        """The windows of a lane, in the order in which they are read."""
        start = lane * (self.rows // self.lanes) + min(lane, self.rows % self.lanes)
        stop = start + self.lane_rows(lane)
        edges = self._edges
        low = int(np.searchsorted(edges, start, side="right")) - 1
        pieces: list[Piece] = []
        for i in range(low, len(self._groups)):
            if edges[i] >= stop:
                break
            a, b = max(start, int(edges[i])), min(stop, int(edges[i + 1]))
            if b > a:
                pieces.append(Piece(int(self._groups[i]), a - int(edges[i]), b - int(edges[i])))
        out, first = [], 0
        for number, i in enumerate(range(0, len(pieces), self.window)):
            window = Window(tuple(pieces[i : i + self.window]), first, number)
            out.append(window)
            first += window.rows
        return out

    def within(self, lane: int, window: Window) -> NDArray[np.int64]:
        """The order of a window's rows."""
        if not self.shuffle:
            return np.arange(window.rows)
        return permutation(key("window", self.seed, self.name, self.epoch, lane, window.number), window.rows)

    @cached_property
    def _groups(self) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.row_groups))
        return permutation(key("groups", self.seed, self.name, self.epoch), len(self.row_groups))

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        sizes = np.asarray(self.row_groups, dtype=np.int64)[self._groups]
        return np.concatenate([[0], np.cumsum(sizes)])


def lanes_of(rank: int, workers: int, lanes: int) -> range:
    """The contiguous lanes that a worker serves."""
    return range(rank * lanes // workers, (rank + 1) * lanes // workers)
