"""Examples a second of evaluation, metrics included, against those of joint training, both from the stream."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from cdr_dist.training.evaluate import evaluate
from tools.bench_case import Build, Case
from tools.bench_data import Shape, written
from tools.bench_training import Training


def cases(quick: bool, data: str) -> dict[str, Build]:
    return {f"training batch {batch}": partial(case, quick, batch) for batch in ([32] if quick else [256, 2048])}


def case(quick: bool, batch: int, held: ExitStack) -> Case:
    """One stored negative with each row, in training as in evaluation."""
    rows, steps = (200, 4) if quick else (100_000, 50_000 // batch)
    shape = Shape(rows, rows // 5, rows // 5, rows // 10, evaluated=rows, sampled=True)
    training = Training(held, written(held, shape), ["recipe=joint", f"batch.size={batch}"])
    return Case(
        3.0,
        partial(evaluate, training.session, "valid"),
        partial(training.steps, steps),
        unit="1,000 examples",
        units=(2 * rows / 1000, steps * batch / 1000),
        rounds=5,
    )
