"""Batches of one stream, built ahead by a thread, with a look at the next one; the state is a place.

Those of several small steps are built together: building costs little a row and much a call, most of it under Python's
lock, which training then waits for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cdr_dist.data.batch import Batch
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.stream import Block, Place, Stream

BLOCK_ROWS, BLOCK_STEPS = 8192, 32
"""Most stored rows of all workers that are built together (but at least a step), and most steps."""


@dataclass(frozen=True)
class Fed:
    """A batch, the stored rows that it was built from, and its place."""

    batch: Batch
    stored: StoredRows
    place: Place


class Feed:
    """`next()` gives the batch at `place` and moves on; `peek()` gives the same without moving.

    build: a block of the stream -> a batch for each of its steps.
    """

    def __init__(self, stream: Stream, build: Callable[[Block], list[Batch]]) -> None:
        self._stream, self._build = stream, build
        self._held: deque[Fed] = deque()
        self._producer: _Producer | None = None
        self.place = Place()
        self.waited_s = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return self._stream.steps_per_epoch

    def seek(self, place: Place) -> None:
        self.close()
        # A dataset that users were removed from may have fewer steps than when the place was noted.
        self.place = place if place.step < self.steps_per_epoch else Place(place.epoch + 1, 0)

    def peek(self) -> Fed:
        if not self._held:
            if self._producer is None:
                self._producer = _Producer(self._stream, self._build, self.place)
            start = time.perf_counter()
            self._held.extend(self._producer.get())
            self.waited_s += time.perf_counter() - start
        return self._held[0]

    def next(self) -> Fed:
        fed = self.peek()
        self._held.popleft()
        self.place = self._stream.after(fed.place)
        return fed

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()
        self._producer = None
        self._held.clear()
        self._stream.close()


class _Producer:
    """A thread that builds batches in order, a block ahead; an error reaches the consumer in its place."""

    def __init__(self, stream: Stream, build: Callable[[Block], list[Batch]], place: Place) -> None:
        self._stream, self._build = stream, build
        self._steps = max(1, min(BLOCK_STEPS, BLOCK_ROWS // stream.rows_per_step))
        self._ready: queue.Queue[list[Fed] | BaseException] = queue.Queue(maxsize=1)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(place,), daemon=True, name="cdr-feed")
        self._thread.start()

    def get(self) -> list[Fed]:
        fed = self._ready.get()
        if isinstance(fed, BaseException):
            raise fed
        return fed

    def close(self) -> None:
        self._closed.set()
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # a thread that waits for room goes on, and sees that it is over
            self._thread.join(0.001)

    def _run(self, place: Place) -> None:
        while not self._closed.is_set():
            made: list[Fed] | BaseException
            try:
                block = self._stream.read_block(place, self._steps)
                batches = self._build(block)
                made = [Fed(b, rows.stored, rows.place) for b, rows in zip(batches, block.steps, strict=True)]
            except BaseException as error:
                made = error
            while not self._closed.is_set():
                try:
                    self._ready.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return
            place = self._stream.after(made[-1].place)
