"""Named crash points around everything that lasts: a write, a rename, a switch of a pointer, a barrier.

`with durable("checkpoint.complete"): …` has two, right before and right after. CDR_CRASH=checkpoint.complete:after:2
ends the process by SIGKILL the second time it gets there (the count may be left out); the fault tests use it.
CDR_CRASH_RANK=1 lets only that worker die. Without the variable a point costs a dictionary lookup.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

EFFECTS = (
    "file.rename",
    "prepare.sweep",
    "prepare.begin",
    "prepare.spill",
    "prepare.shard",
    "prepare.vocabulary",
    "prepare.manifest",
    "prepare.move",
    "prepare.moved_file",
    "prepare.give_up",
    "prepare.clear",
    "run.lease",
    "run.beat",
    "run.sweep",
    "run.go_on",
    "run.config",
    "run.versions",
    "run.unstop",
    "run.forget",
    "run.line",
    "run.lines",
    "run.board",
    "run.stop",
    "run.scores",
    "run.weights",
    "run.summary",
    "run.report",
    "run.discard",
    "run.release",
    "checkpoint.rows",
    "checkpoint.index",
    "checkpoint.dense",
    "checkpoint.place",
    "checkpoint.barrier",
    "checkpoint.complete",
    "checkpoint.outcome",
    "checkpoint.drop_mark",
    "checkpoint.drop",
    "nightly.night",
    "nightly.grow",
    "nightly.grown",
    "nightly.publish",
    "nightly.serve",
    "nightly.page",
    "nightly.retire",
    "recommend.begin",
    "recommend.part",
    "recommend.done",
    "forget.left",
    "forget.list",
    "forget.rows",
    "forget.counts",
    "forget.page",
    "forget.checkpoint",
    "forget.complete",
    "forget.shard",
    "forget.manifest",
    "forget.sweep",
)
"""Every name that `durable` is called with; a test compares them with the source."""

_passed: Counter[str] = Counter()


@contextmanager
def durable(effect: str) -> Iterator[None]:
    _point(f"{effect}:before")
    yield
    _point(f"{effect}:after")


def _point(name: str) -> None:
    chosen = os.environ.get("CDR_CRASH")
    if not chosen:
        return
    place, _, count = chosen.rpartition(":") if chosen.count(":") == 2 else (chosen, "", "1")
    if name == place and os.environ.get("CDR_CRASH_RANK", "") in ("", os.environ.get("RANK", "0")):
        _passed[name] += 1
        if _passed[name] == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
