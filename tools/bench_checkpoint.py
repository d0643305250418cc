"""How long training waits for a checkpoint in the background, against one in place and against what is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch.distributed as dist

from cdr_dist.training.checkpoint import Checkpoints, Progress, parts_of
from tests.processes import on_workers
from tools.bench_case import Build, Case, Run, peak_rss_gb
from tools.bench_data import Shape, scratch, written
from tools.bench_training import Training

WANTED_S = 0.6
"""A GB and worker."""
SAVES = 3


def cases(quick: bool, data: str) -> dict[str, Build]:
    return {
        f"{workers} worker{'s' * (workers > 1)}, against {against}": partial(case, quick, workers, against)
        for workers in (1, 2)
        for against in ("in place", f"{WANTED_S} s")
    }


def case(quick: bool, workers: int, against: str, held: ExitStack) -> Case:
    """Rows of 260 bytes, the optimiser's statistic included: .26 GB in all."""
    rows = 1000 if quick else 1_000_000
    folder = written(held, Shape(2048, rows * 2 // 5, rows * 2 // 5, rows // 5, history=0))
    words = ["recipe=joint", "batch.size=256", "tables.width=64"]
    ours, in_place = (partial(_waits, workers, folder, words, background, held) for background in (True, False))
    baseline = in_place if against == "in place" else lambda: Run(WANTED_S)
    return Case(1.0, ours, baseline, unit="GB and worker", nbytes=2e9, rounds=3)


def _waits(workers: int, folder: str, words: Sequence[str], background: bool, held: ExitStack) -> Run:
    """The slowest worker counts."""
    found = on_workers(workers, _worker, folder, words, scratch(held), background)
    return Run(*(max(values) for values in zip(*found, strict=True)))


def _worker(rank: int, folder: str, words: Sequence[str], out: str, background: bool) -> tuple[float, float]:
    with ExitStack() as held:
        training = Training(held, folder, words)
        checkpoints = Checkpoints(out, training.session, keep=1, in_background=background)
        held.callback(checkpoints.close)
        for step in range(SAVES):
            checkpoints.wait()  # as a run does that saves less often than it takes to write
            training.steps(1)
            dist.barrier()
            checkpoints.save(Progress(step=step))
        checkpoints.wait()
        gigabytes = sum(values.nbytes for _, values in parts_of(training.session).values()) / 1e9
        return checkpoints.stalled_s / SAVES / gigabytes, peak_rss_gb()
