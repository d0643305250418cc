"""The product's own training steps, without what a run does beside them (checkpoints, validations, files)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist

from cdr_dist.configuration import from_words
from cdr_dist.data.feed import Fed, Feed
from cdr_dist.data.stream import Place
from cdr_dist.training.launch import alone, quiet_libraries
from cdr_dist.training.memory import keep_freed_memory
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of


class Resident:
    """Stands for a feed: its first batches, held in memory, again and again."""

    def __init__(self, feed: Feed, count: int) -> None:
        self.batches = [feed.next() for _ in range(count)]
        self.place, self.waited_s, self.steps_per_epoch = Place(), 0.0, count
        feed.close()
        self._turn = 0

    def peek(self) -> Fed:
        return self.batches[self._turn % len(self.batches)]

    def next(self) -> Fed:
        fed = self.peek()
        self._turn += 1
        return fed

    def close(self) -> None: ...


class Training:
    """A session and the updates of its recipe's cycle. `resident`: batches held in memory; 0: from the stream."""

    def __init__(
        self, held: ExitStack, folder: str, words: Sequence[str], resident: int = 0, upper: bool = True
    ) -> None:
        quiet_libraries()
        keep_freed_memory()
        if not dist.is_initialized():
            held.enter_context(alone())
        config = from_words(["trainer.workers=0", *words, f"data={folder}"])
        cycle = [update for update in phases_of(config)[0].cycle if upper or update.counts]
        self.session: Any = Session(config, folder, cycle)
        if resident:
            self.session.lower = Resident(self.session.lower, resident)
            self.session.dev = Resident(self.session.dev, resident)
        held.callback(self.session.close)
        for update in dict.fromkeys(cycle):
            update.bind(self.session)
        self._cycle = itertools.cycle(cycle)
        self.update = {update.counts: update for update in cycle}
        """True: the lower one; False: the upper one."""

    def steps(self, count: int) -> None:
        """Goes on until `count` more lower updates are done, with the other updates of the cycle between them."""
        while count:
            update = next(self._cycle)
            update.run(False)
            count -= update.counts

    def seconds(self, count: int, warm_up: int = 0) -> float:
        """Of `count` steps."""
        self.steps(warm_up)
        start = time.perf_counter()
        self.steps(count)
        return time.perf_counter() - start
