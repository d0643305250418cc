"""How long training waits for data: steps from the stream against the same steps on one batch held in memory."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from tools.bench_case import Build, Case
from tools.bench_data import Shape
from tools.bench_training import written
from tools.bench_workers import WARM_UP, training_on


def cases(quick: bool, data: str) -> dict[str, Build]:
    return {
        f"{workers} worker{'s' * (workers > 1)}, batch {batch}": partial(case, quick, workers, batch, target)
        for workers, target in ((1, 1 / 1.05), (2, 1 / 1.15))
        for batch in ([32] if quick else [256, 2048])
    }


def case(quick: bool, workers: int, batch: int, target: float, held: ExitStack) -> Case:
    """`batch`: global. Every worker has one thread for its steps and one for its feed."""
    steps = 5 if quick else 300_000 // batch
    rows = batch * (steps + WARM_UP)
    folder = written(held, Shape(rows, rows // 8, rows // 8, rows // 16, history=0))
    words = ["recipe=joint", f"batch.size={batch}"]
    stream, memory = (partial(training_on, workers, folder, words, steps, resident) for resident in (0, 1))
    return Case(target, stream, memory, unit="step", units=(steps, steps), rounds=3)
