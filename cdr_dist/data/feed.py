"""Batches of one stream, built ahead by a thread, with a look at the next one; the state is a place."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from cdr_dist.data.batch import Batch
from cdr_dist.data.stream import Place, Rows, Stream


@dataclass(frozen=True)
class Fed:
    """A batch, the stored rows that it was built from, and its place."""

    batch: Batch
    table: pa.Table
    place: Place


class Feed:
    """`next()` gives the batch at `place` and moves on; `peek()` gives the same without moving."""

    def __init__(self, stream: Stream, build: Callable[[Rows], Batch], ahead: int = 2) -> None:
        self._stream, self._build, self._ahead = stream, build, ahead
        self._held: Fed | None = None
        self._producer: _Producer | None = None
        self.place = Place()
        self.waited_s = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return self._stream.steps_per_epoch

    def seek(self, place: Place) -> None:
        self.close()
        self.place = place

    def peek(self) -> Fed:
        if self._held is None:
            if self._producer is None:
                self._producer = _Producer(self._stream, self._build, self.place, self._ahead)
            start = time.perf_counter()
            self._held = self._producer.get()
            self.waited_s += time.perf_counter() - start
        return self._held

    def next(self) -> Fed:
        fed = self.peek()
        self._held = None
        self.place = self._stream.after(fed.place)
        return fed

    def close(self) -> None:
        if self._producer is not None:
            self._producer.close()
        self._producer = self._held = None
        self._stream.close()


class _Producer:
    """A thread that builds batches in order; an error reaches the consumer in its place."""

    def __init__(self, stream: Stream, build: Callable[[Rows], Batch], place: Place, ahead: int) -> None:
        self._stream, self._build = stream, build
        self._ready: queue.Queue[Fed | BaseException] = queue.Queue(maxsize=ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(place,), daemon=True, name="cdr-feed")
        self._thread.start()

    def get(self) -> Fed:
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
            made: Fed | BaseException
            try:
                rows = self._stream.read(place)
                made = Fed(self._build(rows), rows.table, place)
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
            place = self._stream.after(place)
