"""How long training waits for data: steps from the stream against the same steps on one batch held in memory."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from tools.bench_case import Build, Case
from tools.bench_data import Shape, written
from tools.bench_workers import WARM_UP, training_on


def cases(quick: bool, data: str) -> dict[str, Build]:
    return {
        f"{workers} worker{'s' * (workers > 1)}, batch {batch}": partial(case, quick, workers, batch, target)
        for workers, target in ((1, 1 / 1.05), (2, 1 / 1.15))
        for batch in ([32] if quick else [256, 2048])
    }


def case(quick: bool, workers: int, batch: int, target: float, held: ExitStack) -> Case:
    """`batch`: global. An epoch's worth of steps from the middle of one on: the start of an epoch reads most.

    Every worker has one thread for its steps and one for its feed.
    """
    steps = (1 if quick else 300_000 // batch) + WARM_UP
    rows = batch * steps
    folder = written(held, Shape(rows, rows // 8, rows // 8, rows // 16, history=0))
    words = ["recipe=joint", f"batch.size={batch}"]
    stream, memory = (partial(training_on, workers, folder, words, steps, resident) for resident in (0, 1))
    return Case(target, stream, memory, unit="step", units=(steps, steps), rounds=3)
