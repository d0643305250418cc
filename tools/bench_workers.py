"""Joint training on two workers against one, the same global batch; gloo processes, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch.distributed as dist

from cdr_dist.configuration import from_words
from tests.processes import on_workers
from tools.bench_case import Build, Case, Run, peak_rss_gb
from tools.bench_data import Shape, written
from tools.bench_flops import BACKWARD, conet_flops
from tools.bench_training import Training

WARM_UP = 20
RESIDENT = 8


def cases(quick: bool, data: str) -> dict[str, Build]:
    sizes = [(64, 1.0)] if quick else [(16_384, 1.7), (1024, 0.7)]
    return {
        f"batch {batch}, {'in memory' if resident else 'from the stream'}": partial(
            case, quick, batch, resident, target
        )
        for batch, target in sizes
        for resident in (RESIDENT, 0)
    }


def case(quick: bool, batch: int, resident: int, target: float, held: ExitStack) -> Case:
    steps = 5 if quick else max(20, 100_000 // batch)
    rows = batch * (RESIDENT if resident else steps)
    folder = written(held, Shape(rows, 100_000, 100_000, 50_000, history=0))
    words = ["recipe=joint", f"batch.size={batch}", "tables.width=64"]
    two, one = (partial(training_on, workers, folder, words, steps, resident) for workers in (2, 1))
    flops = batch / 2 * (1 + BACKWARD) * conet_flops(from_words(words))
    return Case(target, two, one, unit="step", units=(steps, steps), flops=flops, rounds=3)


def training_on(workers: int, folder: str, words: Sequence[str], steps: int, resident: int) -> Run:
    """Builds a session on every worker and times its steps: the slowest worker counts."""
    found = on_workers(workers, _worker, folder, words, steps, resident)
    return Run(*(max(values) for values in zip(*found, strict=True)))


def _worker(rank: int, folder: str, words: Sequence[str], steps: int, resident: int) -> tuple[float, float]:
    with ExitStack() as held:
        training = Training(held, folder, words, resident)
        training.steps(WARM_UP)
        dist.barrier()
        return training.seconds(steps), peak_rss_gb()
