"""A step must not cost more where the vocabulary is larger: ours against ourselves with 10,000 rows."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from tools.bench_case import Build, Case
from tools.bench_data import Shape, written
from tools.bench_flops import counted_flops, lower_flops
from tools.bench_training import Training

BATCHES = 32


def cases(quick: bool, data: str) -> dict[str, Build]:
    return {
        f"{level}, {rows} rows": partial(case, quick, level, rows)
        for level in ("lower", "upper")
        for rows in ([1000] if quick else [100_000, 1_000_000, 10_000_000])
    }


def case(quick: bool, level: str, rows: int, held: ExitStack) -> Case:
    """`rows`: of all tables together; ids are drawn evenly, so hardly a row of a large table is in any cache."""
    few, many = (_training(quick, n, held) for n in (500 if quick else 10_000, rows))
    if level == "lower":
        sides = [partial(training.steps, 1) for training in (many, few)]
        flops = lower_flops(many.session)
    else:
        sides = [partial(training.update[False].run, False) for training in (many, few)]
        flops = counted_flops(sides[0])
    return Case(1 / 1.2, *sides, unit="step", flops=flops)


def _training(quick: bool, rows: int, held: ExitStack) -> Training:
    """BIAO with the product's defaults; 40% users, 40% source items, 20% target items."""
    batch = 16 if quick else 256
    shape = Shape(BATCHES * batch, rows * 2 // 5, rows * 2 // 5, rows // 5)
    return Training(held, written(held, shape), ["recipe=biao", f"batch.size={batch}"], resident=BATCHES)
