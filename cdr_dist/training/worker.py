"""The function that every worker runs, under Ray Train or in this process: build, resume, train, evaluate."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
import threading
from typing import Any

import numpy as np
import torch

from cdr_dist.configuration import TrainConfig
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.shards import verify
from cdr_dist.embeddings.workers import rank, through_shared_memory, world_size
from cdr_dist.errors import STOPPED, UserError
from cdr_dist.training import lease
from cdr_dist.training.checkpoint import Checkpoints
from cdr_dist.training.checks import build_updates
from cdr_dist.training.digest import parameters_sha256
from cdr_dist.training.learned_weights import against_truth, learned_weights
from cdr_dist.training.loop import Loop, Phase
from cdr_dist.training.memory import check_memory_here, keep_freed_memory
from cdr_dist.training.mirrors import mirrors_of
from cdr_dist.training.policies import tuned_shares
from cdr_dist.training.run_folder import SCORES, RunFolder
from cdr_dist.training.session import Session
from cdr_dist.training.start_vectors import start_from_vectors
from cdr_dist.training.talk import OverGroup
from cdr_dist.training.tracking import Recorder, Silent
from cdr_dist.training.warm_start import warm_start


def work(config: TrainConfig, folder: str, run: str, token: str = "") -> dict[str, Any] | str | None:
    """Trains; worker 0 returns the summary, the others None, all of them STOPPED where the run was stopped.

    torch.distributed is initialised. token: of the run folder's lease, which checkpoints are written under.
    """
    storage.use(config.storage)
    through_shared_memory(config.trainer.shared_memory)
    torch.set_num_threads(config.trainer.threads)
    keep_freed_memory()
    phases = phases_of(config)
    memory = check_memory_here(config, read_manifest(folder))
    session = Session(config, folder, [update for phase in phases for update in phase.cycle], memory)
    verify(folder, session.manifest, session.rank, session.workers, config.trainer.verify)
    place = RunFolder(run)
    leads = session.rank == 0
    watcher = Recorder(place, config.trainer.log_every, mirrors_of(config, place)) if leads else Silent()
    still_ours = functools.partial(lease.check, place.file(lease.FILE), token) if token else lambda: None
    checkpoints = Checkpoints(
        place.checkpoints,
        session,
        config.trainer.keep,
        config.trainer.checkpoint == "background",
        still_ours,
        talk=functools.partial(OverGroup, patience_s=config.trainer.hang_s),
    )
    stop = StopWord(place)
    loop = Loop(session, phases, checkpoints, watcher, stop.wanted)
    try:
        step = loop.resume()
        if session.rank == 0:
            place.forget_after(step or -1)
        if step == 0:
            if started := _start(session):
                loop.progress.started = started
                watcher.started(started)
            session.begin()
        loop.run()
        if loop.stopped:
            return STOPPED
        return _summary(config, session, loop, checkpoints, place)
    finally:
        session.close()
        checkpoints.close()
        stop.close()
        if isinstance(watcher, Recorder):
            watcher.close()


def _start(session: Session) -> dict[str, int]:
    """Table -> its rows that an earlier run or given vectors say; vectors win."""
    config = session.config
    found: dict[str, int] = {}
    if config.warm_start.run:
        earlier = RunFolder(config.warm_start.run)
        found |= warm_start(session, earlier, config.warm_start.new_rows, config.warm_start.statistics)
    return found | (start_from_vectors(session) if config.tables.start else {})


def phases_of(config: TrainConfig) -> list[Phase]:
    """The recipe's phases with their updates built and their cycles written out."""
    return [
        Phase(
            phase.name,
            cycle,
            phase.epochs or config.trainer.epochs,
            phase.metric or config.evaluation.metric,
            phase.start == "pretrained",
        )
        for phase, cycle in zip(config.recipe.phases, build_updates(config), strict=True)
    ]


class StopWord:
    """Told to stop by SIGTERM to this process, or through the run folder (a thread of worker 0 looks once a second)."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder, self._told, self._over = folder, False, threading.Event()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._tell)
        self._thread = threading.Thread(target=self._look, daemon=True, name="cdr-stop")
        if rank() == 0:
            self._thread.start()

    def wanted(self) -> bool:
        return self._told

    def close(self) -> None:
        self._over.set()

    def _look(self) -> None:
        while not (self._told or self._over.wait(1.0)):
            with contextlib.suppress(UserError):  # a store that does not answer now is asked again
                self._told = self._told or self._folder.stop_asked()

    def _tell(self, *_: object) -> None:
        self._told = True


def _summary(
    config: TrainConfig, session: Session, loop: Loop, checkpoints: Checkpoints, place: RunFolder
) -> dict[str, Any] | None:
    """What summary.json holds; the metrics are those of the best checkpoint, the digest that of the last state."""
    p, manifest, last = loop.progress, session.manifest, loop.phase.step
    digest = parameters_sha256(session)
    checkpoints.load_parameters(checkpoints.of_step(p.best_step))
    scores = {"valid": None, "test": place.file(SCORES)}
    metrics = {split: last.measure(split, file) for split, file in scores.items()}
    gates = {s: tuned_shares(session, s) for s in metrics} if last.stream == "lower" else {}
    passes = dict(session.passes)
    weights = learned_weights(session) if session.perceptron is not None else None
    predicted = p.step * loop.passes_a_step + p.upper_steps * config.hypergradient.passes
    sequences = {split: manifest.examples(f"sequences_{split}") for split in ("train", "valid", "test")}
    summary: dict[str, Any] = {
        "schema": 1,
        "recipe": config.recipe.name,
        "model": str(config.model["_target_"]).rsplit(".", 1)[-1].lower(),
        "seed": config.seed,
        "world_size": world_size(),
        "data": {
            "name": config.data,
            "users": manifest.counts["users"],
            "items": {d: manifest.counts[f"{d}_items"] for d in ("source", "target")},
            "examples": {split: manifest.examples(split) for split in ("train", "valid", "test")},
            **({"sequences": sequences} if session.sequences is not None else {}),
        },
        "steps": p.step,
        "upper_steps": p.upper_steps,
        "best": {"step": p.best_step, "metric": loop.phase.metric, "value": p.best_value},
        "metrics": metrics,
        "throughput": {
            "examples_per_s": round(loop.rows / loop.seconds, 1) if loop.seconds else None,
            "stall_share": round(loop.waited_s / loop.seconds, 4) if loop.seconds else None,
            "train_s": round(loop.seconds, 2),
            "checkpoint_stall_s": round(checkpoints.stalled_s, 3),
            "replica_fallbacks": session.replica_fallbacks(),
        },
        "backward_passes": {**passes, "predicted": predicted},
        "parameters_sha256": digest,
    }
    if policy := {split: of for split, of in gates.items() if of}:
        summary["policy"] = {
            "tuned_share": {split: mean for split, (mean, _) in policy.items()},
            "tuned_sd": {split: sd for split, (_, sd) in policy.items()},
        }
    if p.started:
        summary["started"] = p.started
    if session.rank:
        return None
    if weights is not None:
        weights.write(place)
        found = weights.by_category
        summary["weights"] = {
            "mean": float(np.average(found["weight"], weights=found["behaviours"])),
            "truth": against_truth(session, found),
        }
    place.write_summary(summary)
    if config.trainer.report:
        _report(place, session.folder)
    return summary


def _report(place: RunFolder, folder: str) -> None:
    """Whatever is wrong with the report, the run is finished and stays so."""
    try:
        from cdr_dist.training.report import write_report  # loads matplotlib

        write_report(place, folder)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        print(f"{place.uri}: no report was written ({type(error).__name__}: {reason})", file=sys.stderr, flush=True)
