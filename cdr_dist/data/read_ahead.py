"""Row groups fetched by threads before they are asked for, bounded in number and bytes."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

import pyarrow as pa

from cdr_dist.data import retries

JOINED_S = 15.0
"""Longest wait for fetches when the process ends: they are cancelled, but one may still load its client, or decode."""

_fetching: set[threading.Thread] = set()


class ReadAhead:
    """`get` gives what `fetch` gives; what was announced by `plan` is often there already.

    threads: most fetches at a time besides the caller's own. most_bytes: of fetched tables that nobody took yet; one
    more of the largest size for every fetch under way. 0: nothing is fetched ahead.
    """

    def __init__(self, fetch: Callable[[int], pa.Table], most_bytes: int, threads: int = 4) -> None:
        self._fetch, self._most_bytes, self._threads = fetch, most_bytes, threads
        self._lock = threading.Lock()
        self._plans: dict[Hashable, list[int]] = {}
        self._tables: dict[int, Future[pa.Table]] = {}
        self.running = 0
        self._bytes = self._largest = 0

    def plan(self, who: Hashable, row_groups: Sequence[int]) -> None:
        """What `who` will ask for next, in this order, instead of what it said before."""
        if not self._most_bytes:
            return
        with self._lock:
            self._plans.pop(who, None)  # to the end: what others said before is wanted sooner
            self._plans[who] = list(row_groups)
            planned = set().union(*self._plans.values())
            for index in self._tables.keys() - planned:
                self._forget(index)
            self._start()

    def get(self, index: int) -> pa.Table:
        """Raises what `fetch` raises."""
        with self._lock:
            for row_groups in self._plans.values():
                if index in row_groups:
                    row_groups.remove(index)
            future = self._tables.get(index)
        if future is None:
            return self._fetch(index)
        try:
            return future.result()  # a fetch has a deadline of its own
        finally:
            with self._lock:
                self._forget(index)
                self._start()

    def _forget(self, index: int) -> None:
        future = self._tables.pop(index, None)
        if future is not None and future.done() and future.exception() is None:
            self._bytes -= future.result().nbytes

    def _start(self) -> None:
        wanted = (index for row_groups in self._plans.values() for index in row_groups if index not in self._tables)
        for index in wanted:
            free = self._most_bytes - self._bytes - self.running * self._largest
            if self.running == self._threads or free < self._largest or retries.ending():
                return
            self.running += 1
            future = self._tables[index] = Future()
            thread = threading.Thread(target=self._run, args=(index, future), daemon=True, name="cdr-read-ahead")
            _fetching.add(thread)  # it ends with its fetch, so there is nothing to close
            thread.start()

    def _run(self, index: int, future: Future[pa.Table]) -> None:
        found: pa.Table | BaseException
        try:
            found = self._fetch(index)
        except BaseException as error:
            found = error
        with self._lock:
            self.running -= 1
            if isinstance(found, BaseException):
                future.set_exception(found)
            else:
                future.set_result(found)
                self._largest = max(self._largest, found.nbytes)
                if self._tables.get(index) is future:
                    self._bytes += found.nbytes
            self._start()
        _fetching.discard(threading.current_thread())


@atexit.register
def _end() -> None:
    retries.end()
    until = time.monotonic() + JOINED_S
    while (threads := list(_fetching)) and time.monotonic() < until:  # one may be starting another
        for thread in threads:
            if thread.ident is None:  # not started yet
                time.sleep(0.001)
            else:
                thread.join(max(0.0, until - time.monotonic()))
