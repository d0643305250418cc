"""The loop of every recipe: phases of cycles of updates, with validation, checkpoints, early stopping and resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cdr_dist.data.hashing import key
from cdr_dist.embeddings.workers import max_over_workers
from cdr_dist.errors import UserError
from cdr_dist.training.checkpoint import Checkpoints, Progress
from cdr_dist.training.replicas import compare_replicas
from cdr_dist.training.session import Session
from cdr_dist.training.split_metrics import validation_metrics

WARM_UP_STEPS = 20
"""Steps that throughput leaves out."""


class Update(Protocol):
    """One kind of update. `counts`: whether it is a step of the run; `passes`: backward passes of one.

    `run` returns numbers equal on all workers.
    """

    counts: bool
    passes: int
    learned: bool
    needs_head: bool

    def bind(self, session: Session) -> None: ...

    def run(self, stop_wanted: bool) -> dict[str, float]: ...


@dataclass(frozen=True)
class Phase:
    """The cycle is flat: an update that comes n times stands n times."""

    name: str
    cycle: Sequence[Update]
    epochs: int


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
        self.stopped = False
        self._saved_step = -1
        for phase in phases:
            for update in dict.fromkeys(phase.cycle):
                update.bind(session)

    @property
    def passes_a_step(self) -> int:
        """Backward passes of a lower update; those of all phases have as many."""
        return next(update.passes for phase in self._phases for update in phase.cycle if update.counts)

    def resume(self) -> int:
        """Continues from the newest complete checkpoint; the step it stands at."""
        newest = self._checkpoints.newest()
        if newest is not None:
            self.progress = self._checkpoints.load(newest)
            self._session.lower.seek(self.progress.lower)
            self._session.dev.seek(self.progress.dev)
            self._saved_step = self.progress.step
        return self.progress.step

    def run(self) -> None:
        while self.progress.phase < len(self._phases) and not self.stopped:
            self._run_phase(self._phases[self.progress.phase])
            if not self.stopped:
                self.progress.phase += 1
                self.progress.position, self.progress.phase_done, self.progress.bad_validations = 0, False, 0
        self._checkpoints.wait()

    def _run_phase(self, phase: Phase) -> None:
        p = self.progress
        self._validate_if_due(phase)
        while not (p.phase_done or self._at_end(phase) or self.stopped):
            update = phase.cycle[p.position]
            seed_step(self._session.config.seed, self._session.rank, p.phase, p.step, p.position)
            start = time.perf_counter()
            values = update.run(self._stop_wanted())
            self._keep_time(time.perf_counter() - start, update.counts)
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
        p, every = self.progress, self._session.config.evaluation.every or self._session.lower.steps_per_epoch
        if p.step in (0, p.validated_step) or not (p.step % every == 0 or self._at_end(phase)):
            return False
        self._validate(phase)
        self._save()
        return True

    def _validate(self, phase: Phase) -> None:
        p, options = self.progress, self._session.config.evaluation
        values = validation_metrics(self._session)
        if options.metric not in values:
            raise UserError(f"evaluation.metric={options.metric}: not among {', '.join(sorted(values))}")
        value = values[options.metric]
        if math.isnan(value):
            raise UserError(
                f"evaluation.metric={options.metric} has no value on the validation rows of {self._session.folder}: "
                "are all of one label?"
            )
        p.validated_step = p.step
        sign = -1 if options.smaller_is_better else 1
        if math.isnan(p.best_value) or sign * value > sign * p.best_value:
            p.best_step, p.best_value, p.bad_validations = p.step, value, 0
        else:
            p.bad_validations += 1
            p.phase_done = bool(options.patience) and p.bad_validations >= options.patience
        self._watcher.validated(p.step, phase.name, values)

    def _at_end(self, phase: Phase) -> bool:
        most = self._options.max_steps
        return self._session.lower.place.epoch >= phase.epochs or (most > 0 and self.progress.step >= most)

    def _save(self) -> None:
        p, s = self.progress, self._session
        p.lower, p.dev, p.passes = s.lower.place, s.dev.place, dict(s.passes)
        self._checkpoints.save(p)
        self._saved_step = p.step

    def _keep_time(self, seconds: float, counts: bool) -> None:
        if self.progress.step >= WARM_UP_STEPS:
            self.seconds += seconds
            if counts:
                self.rows += self._session.config.batch.size

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
