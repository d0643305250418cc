"""The loop of every recipe: phases of cycles of updates, with validation, checkpoints, early stopping and resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cdr_dist.data.feed import Feed
from cdr_dist.data.hashing import key
from cdr_dist.embeddings.workers import max_over_workers
from cdr_dist.errors import UserError
from cdr_dist.training.checkpoint import STREAMS, Checkpoints, Progress
from cdr_dist.training.options import smaller_is_better
from cdr_dist.training.replicas import compare_replicas
from cdr_dist.training.session import Session

WARM_UP_STEPS = 20
"""Steps that throughput leaves out."""


class Update(Protocol):
    """One kind of update. `counts`: whether it is a step of the run; `passes`: backward passes of one; `stream`: the
    attribute of the session that its batches come from (of those that count).

    `run` returns numbers equal on all workers. Of those that count, `validate` measures the validation split, its
    metric among the rest, and `measure` everything of a split, with scores to a file where it has any.
    """

    counts: bool
    passes: int
    stream: str
    learned: bool
    needs_head: bool

    def bind(self, session: Session) -> None: ...

    def run(self, stop_wanted: bool) -> dict[str, float]: ...

    def validate(self, metric: str) -> dict[str, float]: ...

    def measure(self, split: str, scores: str | None = None) -> dict[str, float]: ...


@dataclass(frozen=True)
class Phase:
    """The cycle is flat: an update that comes n times stands n times. metric: selects the best checkpoint; pretrained:
    whether it starts from the best one of the phase before it."""

    name: str
    cycle: Sequence[Update]
    epochs: int
    metric: str = "auc"
    pretrained: bool = False

    @property
    def step(self) -> Update:
        """The update that counts: its stream's epochs are the phase's, and it is what is evaluated."""
        return next(update for update in self.cycle if update.counts)


class Watcher(Protocol):
    """What the loop tells: worker 0 writes files, the others nothing."""

    def trained(self, step: int, phase: str, values: dict[str, float]) -> None: ...

    def updated(self, step: int, phase: str, values: dict[str, float]) -> None: ...

    def validated(self, step: int, phase: str, values: dict[str, float]) -> None: ...


class Loop:
    """Runs the phases from where `progress` stands. `stop_wanted` is asked before every update."""

    def __init__(
        self,
        session: Session,
        phases: Sequence[Phase],
        checkpoints: Checkpoints,
        watcher: Watcher,
        stop_wanted: Callable[[], bool],
    ) -> None:
        self._session, self._phases, self._checkpoints = session, phases, checkpoints
        self._watcher, self._stop_wanted = watcher, stop_wanted
        self._options = session.config.trainer
        self.progress = Progress(data_checksum=session.manifest.checksum)
        self.seconds = self.rows = 0.0
        self._waited_before = session.waited_s
        self._steps = 0  # of this start
        self.stopped = False
        self._saved_step = -1
        session.enter(self.phase.cycle)

    @property
    def phase(self) -> Phase:
        """The one that is under way, or was the last."""
        return self._phases[self.progress.phase]

    @property
    def passes_a_step(self) -> int:
        """Backward passes of a lower update; those of all phases have as many."""
        return self.phase.step.passes

    def resume(self) -> int:
        """Continues from the newest complete checkpoint; the step it stands at."""
        newest = self._checkpoints.newest()
        if newest is not None:
            if (phase := newest.progress().phase) != self.progress.phase:
                self._session.enter(self._phases[phase].cycle)
            self.progress = self._checkpoints.load(newest)
            self._seek()
            self._saved_step = self.progress.step
        return self.progress.step

    def run(self) -> None:
        while True:
            self._run_phase(self.phase)
            if self.stopped or self.phase is self._phases[-1] or self._all_steps_made():
                break
            self._begin(self.progress.phase + 1)
        self._checkpoints.wait()

    def _begin(self, number: int) -> None:
        """Goes on to the next phase; a checkpoint says so before its first step."""
        p, phase = self.progress, self._phases[number]
        if phase.pretrained:
            self._checkpoints.wait()
            self._checkpoints.load_parameters(self._checkpoints.of_step(p.best_step))
        if not self._session.config.warm_start.statistics:
            self._session.forget_statistics()
        self._session.begin()
        self.progress = Progress(
            phase=number,
            step=p.step,
            upper_steps=p.upper_steps,
            begun=p.step,
            validated_step=p.validated_step,
            data_checksum=p.data_checksum,
            started=p.started,
        )
        self._session.enter(phase.cycle)
        self._seek()
        self._save()

    def _seek(self) -> None:
        for name in STREAMS:
            if (feed := getattr(self._session, name)) is not None:
                feed.seek(getattr(self.progress, name))

    def _run_phase(self, phase: Phase) -> None:
        p = self.progress
        self._validate_if_due(phase)
        while not (p.phase_done or self._at_end(phase) or self.stopped):
            update = phase.cycle[p.position]
            seed_step(self._session.config.seed, self._session.rank, p.phase, p.step, p.position)
            start = time.perf_counter()
            values = update.run(self._stop_wanted())
            self._keep_time(time.perf_counter() - start, update)
            p.position = (p.position + 1) % len(phase.cycle)
            if not update.counts:
                if values:
                    p.upper_steps += 1
                    self._check_finite(phase, values)
                    self._watcher.updated(p.step, phase.name, values)
                continue
            p.step += 1
            self._check_finite(phase, values)
            self.stopped = values.pop("stop", 0.0) > 0
            self._watcher.trained(p.step, phase.name, values)
            self._after_step(phase)
        if p.step != self._saved_step:
            self._save()

    def _after_step(self, phase: Phase) -> None:
        if self.stopped:  # the validation may take long: it is made up for on resume
            return
        compare, every = self._options.compare_every, self._options.checkpoint_every
        if compare and self.progress.step % compare == 0:
            compare_replicas(self._session, self.progress.step)
        if not self._validate_if_due(phase) and every and self.progress.step % every == 0:
            self._save()

    def _validate_if_due(self, phase: Phase) -> bool:
        p, every = self.progress, self._session.config.evaluation.every or self._feed(phase).steps_per_epoch
        if p.step in (0, p.validated_step) or not ((p.step - p.begun) % every == 0 or self._at_end(phase)):
            return False
        self._validate(phase)
        self._save()
        return True

    def _validate(self, phase: Phase) -> None:
        p, options = self.progress, self._session.config.evaluation
        values = phase.step.validate(phase.metric)
        if phase.metric not in values:
            raise UserError(f"evaluation.metric={phase.metric}: not among {', '.join(sorted(values))}")
        value = values[phase.metric]
        if math.isnan(value):
            raise UserError(
                f"evaluation.metric={phase.metric} has no value on the validation rows of {self._session.folder}: "
                "are all of one label?"
            )
        p.validated_step = p.step
        sign = -1 if smaller_is_better(phase.metric) else 1
        if math.isnan(p.best_value) or sign * value > sign * p.best_value:
            p.best_step, p.best_value, p.bad_validations = p.step, value, 0
        else:
            p.bad_validations += 1
            p.phase_done = bool(options.patience) and p.bad_validations >= options.patience
        self._watcher.validated(p.step, phase.name, values)

    def _at_end(self, phase: Phase) -> bool:
        return self._feed(phase).place.epoch >= phase.epochs or self._all_steps_made()

    def _all_steps_made(self) -> bool:
        most = self._options.max_steps
        return 0 < most <= self.progress.step

    def _feed(self, phase: Phase) -> Feed:
        feed: Feed = getattr(self._session, phase.step.stream)
        return feed

    def _save(self) -> None:
        p, s = self.progress, self._session
        for name in STREAMS:
            if (feed := getattr(s, name)) is not None:
                setattr(p, name, feed.place)
        p.passes = dict(s.passes)
        self._checkpoints.save(p)
        self._saved_step = p.step

    @property
    def waited_s(self) -> float:
        """Of `seconds` those that were spent waiting for data."""
        return self._session.waited_s - self._waited_before

    def _keep_time(self, seconds: float, update: Update) -> None:
        self._steps += update.counts
        if self._steps <= WARM_UP_STEPS:
            self._waited_before = self._session.waited_s
        else:
            self.seconds += seconds
            if update.counts:
                batch = self._session.config.batch
                self.rows += (batch.sequences if update.stream == "sequences" else 0) or batch.size

    def _check_finite(self, phase: Phase, values: dict[str, float]) -> None:
        """The numbers are equal on all workers, so all of them stop together."""
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        where = non_finite(self._session)
        shown = ", ".join(where[:6]) + (f" and {len(where) - 6} more" if len(where) > 6 else "")
        lower = "tables.lr or dense.lr" if "loss" in values else "upper.lr or hypergradient.alpha"
        raise UserError(
            f"step {self.progress.step} of phase {phase.name}: {', '.join(bad)} not finite; "
            f"parameters that are not finite: {shown or 'none yet'}. Lower {lower}"
        )


def seed_step(seed: int, *coordinates: int) -> None:
    """What a backbone draws (dropout) is a function of seed, worker and step: a resume draws it again."""
    torch.manual_seed(int(key("step", seed, *coordinates)) >> 1)


def non_finite(session: Session) -> list[str]:
    """Names of tables and dense parameters that hold a value that is not finite, on any worker."""
    parts: dict[str, Any] = {f"table {t}": shard for t, (_, shard) in session.tables.shards().items()}
    for module in ("model", "perceptron", "dev_head"):
        if getattr(session, module) is not None:
            parts |= {f"{module}.{n}": p for n, p in getattr(session, module).named_parameters()}
    bad = torch.tensor([0.0 if bool(v.isfinite().all()) else 1.0 for v in parts.values()])
    return [name for name, flag in zip(parts, max_over_workers(bad).tolist(), strict=True) if flag]
