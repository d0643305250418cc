"""Seeded histories of training, saving, crashing, losing power, damage and resuming, against the model of what must be.

CDR_HISTORIES=10000 CDR_SEED=3 python -m pytest tests/test_histories.py runs more of them, and others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as some

from cdr_dist.errors import UserError
from cdr_dist.training import checkpoint
from tests.storage_model import Kept, Shape, states
from tests.storage_world import Crash, Disk, World, damage

HISTORIES = int(os.environ.get("CDR_HISTORIES", "60"))
SEED = int(os.environ.get("CDR_SEED", "8"))
SHRINK = os.environ.get("CDR_SHRINK", "1") != "0"
"""Whether a history that fails is made short; `make mutants` only asks whether one does."""
STEPS = 16
WRITES = ("checkpoint.rows", "checkpoint.index", "checkpoint.dense", "checkpoint.place", "checkpoint.barrier")
LATER = ("checkpoint.complete", "checkpoint.outcome", "checkpoint.drop_mark", "checkpoint.drop", "file.rename")
POINTS = [f"{e}:{w}" for e in (*WRITES, *LATER) for w in ("before", "after")]

SHAPES = some.builds(
    Shape,
    groups=some.sampled_from([(5, 3, 7, 4), (9, 2), (1, 1, 1, 6, 1)]),
    lanes=some.integers(3, 5),
    window=some.integers(1, 3),
    rows_per_step=some.integers(2, 6),
)
EVENTS = some.one_of(
    some.tuples(some.just("train and save"), some.integers(0, 4), some.booleans(), some.booleans()),
    some.tuples(some.just("train and save"), some.integers(1, 4), some.booleans(), some.booleans()),
    some.tuples(some.just("crash"), some.integers(0, 3), some.integers(1, 3)),
    some.tuples(
        some.just("crash while saving"),
        some.integers(0, 3),
        some.sampled_from(POINTS),
        some.integers(1, 2),
        some.integers(1, 3),
    ),
    some.tuples(some.just("lose power"), some.integers(1, 3)),
    some.tuples(some.just("damage"), some.integers(0, 9), some.integers(0, 999), some.integers(1, 3)),
)


class History:
    """Tells a history to a world and to the model, and compares them after every resume."""

    def __init__(self, folder, shape, keep, in_background, disk):
        self._folder, self._shape, self._keep, self._in_background = folder, shape, keep, in_background
        self._disk, self._truth = disk, states(shape, 80)
        self._model = Kept(keep)
        self._best = -1
        self._world = None
        self._start(2, None)

    def train(self, steps):
        self._world.train(steps)
        self._check()

    def train_and_save(self, steps, best, wait):
        self.train(steps)
        self.save(best, wait)

    def save(self, best, wait=True):
        if self._world.progress.step in (0, self._model.newest()):
            return
        self._best = self._world.progress.step if best else self._best
        self._world.save(self._best, wait)
        self._model.save(self._world.progress.step, self._best)
        if wait:
            self._check_folder()

    def crash(self, steps, workers):
        self.train(steps)
        self._world.wait()  # a checkpoint in flight may or may not be complete: `crash while saving` says which
        self._start(workers, None)

    def crash_while_saving(self, steps, point, count, workers):
        self.train(steps)
        if self._world.progress.step in (0, self._model.newest()):
            return
        self._world.wait()
        step = self._world.progress.step
        self._world._crash_at = (point, count)
        try:
            self._world.save(self._best)
        except Crash:
            there = [s.step for s in checkpoint.complete(str(self._folder))]
            must = point.startswith("checkpoint.drop") or (point == "checkpoint.complete:after" and count == 1)
            assert (step in there) or not must
            assert (step not in there) or point not in [f"{w}:before" for w in WRITES] or count > 1 or must
            if step in there:
                self._model.save(step, self._best, crashed=True)
        else:
            self._model.save(step, self._best)
        self._start(workers, None)

    def lose_power(self, workers):
        self._world.wait()
        self._world.end()
        self._disk.lose_power(self._folder.parent)
        self._world = None
        self._start(workers, None)

    def damage(self, which, how, workers):
        self._world.wait()
        if not self._model.complete:
            return
        newest = checkpoint.newest(str(self._folder))
        assert newest.step == self._model.newest()
        name, kind = damage(Path(newest.uri), which, how)
        error = self._error_of_a_start(workers)
        passed_over = (name, kind) == ("COMPLETE", "remove")
        assert (error is None) == passed_over, f"{kind} of {name}: {error}"
        if error is not None:
            assert newest.uri in str(error)
            shutil.rmtree(newest.uri)  # as it says
            self._model.lose_newest()
            self._start(workers, None)

    def _error_of_a_start(self, workers):
        try:
            self._start(workers, None, may_pass_over=True)
        except UserError as error:
            return error

    def end(self):
        self.train(STEPS)
        self.save(False)

    def close(self):
        """A history that failed leaves no threads behind either: shrinking it tells hundreds."""
        if self._world is not None:
            self._world.end()

    def _start(self, workers, crash_at, may_pass_over=False):
        if self._world is not None:
            self._world.end()
        self._world = World(
            str(self._folder), self._shape, min(workers, self._shape.lanes), self._keep, self._in_background, crash_at
        )
        try:
            self._world.resume()
        except BaseException:
            self._world.end()
            self._world = None
            raise
        self._best = self._world.progress.best_step
        there = [s.step for s in checkpoint.complete(str(self._folder))]
        self._model.seen(there)
        if may_pass_over and self._world.progress.step != self._model.newest():  # its mark was removed
            assert self._model.newest() not in there
            self._model.lose_newest()
        assert self._world.progress.step == self._model.newest()
        self._check()

    def _check(self):
        assert self._world.state() == self._truth[self._world.progress.step]

    def _check_folder(self):
        there = {s.step for s in checkpoint.complete(str(self._folder))}
        assert set(self._model.complete) <= there <= set(self._model.complete) | self._model.perhaps


PHASES = [phase for phase in hypothesis.Phase if phase != hypothesis.Phase.shrink or SHRINK]
STORIES = (SHAPES, some.integers(1, 3), some.booleans(), some.lists(EVENTS, min_size=3, max_size=12))
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}


@hypothesis.seed(SEED)
@hypothesis.settings(max_examples=HISTORIES, phases=PHASES, **COMMON)
@hypothesis.given(*STORIES)
def test_every_history_ends_as_the_model_says(shape, keep, in_background, events):
    tell(shape, keep, in_background, events)


@pytest.mark.soak
def test_a_history_that_fails_is_told_short(monkeypatch):
    """The planted bug: the optimiser's state is forgotten."""
    right = checkpoint.parts_of
    forgotten = lambda session: {key: part for key, part in right(session).items() if key[1] == "weights"}  # noqa: E731
    monkeypatch.setattr(checkpoint, "parts_of", forgotten)
    told = []

    @hypothesis.settings(max_examples=200, derandomize=True, report_multiple_bugs=False, **COMMON)
    @hypothesis.given(*STORIES)
    def story(shape, keep, in_background, events):
        told.append(events)
        tell(shape, keep, in_background, events)

    with pytest.raises(AssertionError):
        story()
    print(len(told), told[-1])  # hypothesis ends with the shortest that it found
    assert len(told[-1]) <= 4
    assert max(len(events) for events in told) > 4


def tell(shape, keep, in_background, events):
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="histories-") as scratch, Disk().watched() as disk:
        history = History(Path(scratch) / "run" / "checkpoints", shape, keep, in_background, disk)
        try:
            for name, *arguments in events:
                getattr(history, name.replace(" ", "_"))(*arguments)
            history.end()
        finally:
            history.close()
