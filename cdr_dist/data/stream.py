"""The stream of a split: this worker's stored rows of global step t, for every t, in any number of epochs."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdr_dist.data.lanes import Order, Window, lanes_of
from cdr_dist.data.options import StreamOptions
from cdr_dist.data.shards import ShardReader
from cdr_dist.data.stored_rows import Columns, StoredRows
from cdr_dist.errors import UserError

READ_AHEAD_AFTER = 16
"""The next window is read once this fraction (1/16) of one is used: who reads a few steps only, as a refresh of the
extra head does, needs one window a lane, and whoever goes on finds the next one ready."""

_Key = tuple[int, int]
"""Epoch, and number of a lane's window in it."""
_Loaded = tuple[Columns, NDArray[np.int64]]
"""A window's columns as they lie in the shards, and the order of its rows."""


@dataclass(frozen=True, order=True)
class Place:
    """The next step that a stream will give: all there is to its state."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Rows:
    """One worker's stored rows of a global step; `global_rows` counts the rows of all workers."""

    stored: StoredRows
    place: Place
    global_rows: int


@dataclass(frozen=True)
class Block:
    """Consecutive steps of an epoch; their rows are those of `stored`, step after step, of a step lane after lane."""

    stored: StoredRows
    steps: list[Rows]


class Stream:
    """Endless over epochs. Every worker makes one with its own rank; their rows of a step make the global batch."""

    def __init__(
        self,
        reader: ShardReader,
        rows_per_step: int,
        options: StreamOptions,
        seed: int,
        name: str,
        rank: int = 0,
        workers: int = 1,
        shuffle: bool = True,
    ) -> None:
        if workers > options.lanes:
            raise UserError(
                f"{workers} workers but stream.lanes={options.lanes}: raise stream.lanes or use fewer workers"
            )
        self._reader, self._options, self._seed, self._name, self._shuffle = reader, options, seed, name, shuffle
        self.rows_per_step = rows_per_step
        self._lanes = lanes_of(rank, workers, options.lanes)
        self._order = self._order_of(0)
        self._windows: dict[int, list[Window]] = {}
        self._loaded: dict[int, tuple[_Key, _Loaded]] = {}
        self._coming: dict[int, tuple[_Key, Future[_Loaded]]] = {}
        self._loader: ThreadPoolExecutor | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps(self.rows_per_step)

    def after(self, place: Place) -> Place:
        """The place behind one step."""
        last = place.step + 1 >= self.steps_per_epoch
        return Place(place.epoch + 1, 0) if last else Place(place.epoch, place.step + 1)

    def read(self, place: Place) -> Rows:
        """This worker's rows of a step; fast when steps are asked for in order, right in any order."""
        return self.read_block(place, 1).steps[0]

    def read_block(self, place: Place, count: int) -> Block:
        """`count` steps, or fewer where the epoch ends: what a step costs beyond its rows is then paid once."""
        self.begin(place)
        steps = min(count, self.steps_per_epoch - place.step)
        edges = [self._order.edges(lane, place.step, steps, self.rows_per_step) for lane in self._lanes]
        parts = [part for lane, of in zip(self._lanes, edges, strict=True) for part in self._take(lane, of[0], of[-1])]
        counts = np.diff(np.array(edges, dtype=np.int64).reshape(-1, steps + 1))  # [lanes, steps]
        if parts:
            step_of = np.repeat(np.tile(np.arange(steps), len(edges)), counts.reshape(-1))
            stored = StoredRows.joined(parts).arranged(np.argsort(step_of, kind="stable"))
        else:  # a short last step need not reach every worker
            piece = self._order.windows(0)[0].pieces[0]
            stored = StoredRows.of(self._submit(self._reader.read, piece).result().slice(0, 0))
        rows = []
        for step, own in enumerate(stored.cut(counts.sum(axis=0)), place.step):
            first = step * self.rows_per_step
            everyones = min(first + self.rows_per_step, self._order.rows) - first
            rows.append(Rows(own, Place(place.epoch, step), everyones))
        return Block(stored, rows)

    def begin(self, place: Place) -> None:
        """Starts to read what a step needs first, where nothing of its epoch has been read yet; does not wait."""
        if place.epoch != self._order.epoch:
            self._order = self._order_of(place.epoch)
            self._windows.clear()
        for lane in self._lanes:
            if lane not in self._windows:
                self._begin(lane, place.step)

    def close(self) -> None:
        """Ends the thread; a later read starts another."""
        self._coming.clear()
        if self._loader is not None:
            self._loader.shutdown(wait=True, cancel_futures=True)
            self._loader = None

    def epoch(self, epoch: int = 0) -> Iterator[Rows]:
        for step in range(self.steps_per_epoch):
            yield self.read(Place(epoch, step))

    def _take(self, lane: int, start: int, stop: int) -> Iterator[_Loaded]:
        """The rows at these positions of a lane."""
        windows = self._windows[lane]
        first = max(0, bisect_right(windows, start, key=lambda window: window.first) - 1)
        for window in itertools.takewhile(lambda window: window.first < stop, windows[first:]):
            a, b = max(start, window.first), min(stop, window.first + window.rows)
            if a < b:
                columns, order = self._window(lane, window)
                yield columns, order[a - window.first : b - window.first]
                if (b - window.first) * READ_AHEAD_AFTER > window.rows:
                    self._read_ahead(lane, window)

    def _window(self, lane: int, window: Window) -> _Loaded:
        key = (self._order.epoch, window.number)
        if lane not in self._loaded or self._loaded[lane][0] != key:
            coming, future = self._coming.pop(lane, (None, None))
            if future is None or coming != key:
                future = self._submit(self._load, self._order, lane, window)
            self._loaded[lane] = (key, future.result())
        return self._loaded[lane][1]

    def _begin(self, lane: int, step: int) -> None:
        """Before the first rows of an epoch are read, so that all lanes' windows are fetched together."""
        start = self._order.edges(lane, step, 0, self.rows_per_step)[0]
        self._windows[lane] = self._order.windows(lane)
        first = next((window for window in self._windows[lane] if window.first + window.rows > start), None)
        if first is not None:
            self._load_soon(self._order, lane, first)

    def _read_ahead(self, lane: int, window: Window) -> None:
        """All lanes come to the ends of their windows at once: what follows is read in good time."""
        order, number = self._order, window.number + 1
        if number == len(self._windows[lane]):
            if not self._shuffle:
                return
            order, number = self._order_of(order.epoch + 1), 0
        if self._coming_key(lane) != (order.epoch, number):  # to list an epoch's windows costs more than a step
            self._load_soon(order, lane, order.windows(lane)[number])

    def _load_soon(self, order: Order, lane: int, window: Window) -> None:
        key = (order.epoch, window.number)
        if self._coming_key(lane) != key:
            self._reader.plan(lane, [piece.row_group for piece in window.pieces])
            self._coming[lane] = (key, self._submit(self._load, order, lane, window))

    def _coming_key(self, lane: int) -> _Key | None:
        return self._coming[lane][0] if lane in self._coming else None

    def _submit(self, read: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """All reading is in one thread: the reader keeps what it has decoded."""
        if self._loader is None:
            self._loader = ThreadPoolExecutor(1, thread_name_prefix="cdr-window")
        return self._loader.submit(read, *arguments)

    def _load(self, order: Order, lane: int, window: Window) -> _Loaded:
        columns = Columns(pa.concat_tables([self._reader.read(piece) for piece in window.pieces]))
        return columns, order.within(lane, window)

    def _order_of(self, epoch: int) -> Order:
        o = self._options
        return Order(self._reader.row_groups, o.lanes, o.window, self._seed, self._name, epoch, self._shuffle)
