"""One measurement: ours and a baseline take turns at the same work, and the medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROUNDS, SHORTEST = 25, 0.05
"""Turns of each side, and seconds that one takes at least: many short ones, because other load comes in bursts."""

ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "POLARS_MAX_THREADS"), "1"
)
"""Environment of a process that measures, from its start. Arrow's pool of compute threads follows OMP's; its
threads for files stay: a scan that pre-buffers waits in them."""


@dataclass(frozen=True)
class Run:
    """What a side returns that measures itself: only a part of it counts, or it ran in processes of its own."""

    seconds: float
    peak_rss_gb: float = 0.0
    nbytes: float = 0.0
    """Moved, where only the run can tell."""


Side = Callable[[], Run | Any]


@dataclass(frozen=True)
class Case:
    """`target`: the ratio that is wanted, the baseline's time over ours, both a unit of work.

    units: how many units one call of ours, and of the baseline, does. flops, nbytes (read and written): of ours, a
    unit and worker; neither: no roofline.
    """

    target: float
    ours: Side
    baseline: Side
    unit: str = "call"
    units: tuple[float, float] = (1.0, 1.0)
    flops: float = 0.0
    nbytes: float = 0.0
    rounds: int = ROUNDS


Build = Callable[[ExitStack], Case]
"""Makes a case in the process that measures it; what has to be closed afterwards goes on the stack."""


@dataclass(frozen=True)
class Result:
    """Seconds are medians, a unit of work."""

    suite: str
    case: str
    unit: str
    seconds: float
    baseline_seconds: float
    ratio: float
    target: float
    peak_rss_gb: float
    roofline_share: float | None


def measured(suite: str, name: str, case: Case, quick: bool) -> Result:
    sides = (case.ours, case.baseline)
    rounds = min(case.rounds, 1 if quick else case.rounds)
    # A side that runs once only would waste its first turn on finding out how long it takes.
    first = [_turn(side, 1) for side in sides] if rounds > 1 else [Run(SHORTEST)] * 2
    calls = [max(1, round(SHORTEST / run.seconds)) for run in first]
    found: list[list[Run]] = [[], []]
    for _ in range(rounds):
        for runs, side, n in zip(found, sides, calls, strict=True):
            runs.append(_turn(side, n))
    ours, baseline = (
        statistics.median(run.seconds for run in runs) / units for runs, units in zip(found, case.units, strict=True)
    )
    share, nbytes = None, case.nbytes or max(run.nbytes for run in found[0]) / case.units[0]
    if case.flops:
        share = case.flops / ours / gemm_rate()
    elif nbytes:
        share = nbytes / ours / copy_rate()
    peak = max(run.peak_rss_gb for run in found[0]) or peak_rss_gb()
    return Result(suite, name, case.unit, ours, baseline, baseline / ours, case.target, peak, share)


def _turn(side: Side, calls: int) -> Run:
    if calls > 1:
        side()  # the other side has emptied the caches
    start = time.perf_counter()
    for _ in range(calls):
        found = side()
    return found if isinstance(found, Run) else Run((time.perf_counter() - start) / calls)


def peak_rss_gb() -> float:
    """Of this process so far, in GiB. Not by rusage, which starts from the parent's peak."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 2**20


def gemm_rate() -> float:
    """FLOPs a second of a matrix product of 1024 x 1024 x 1024."""
    import torch

    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / min(_turn(lambda: a @ b, 3).seconds for _ in range(3))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    import torch

    a = torch.ones(1 << 26)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(_turn(lambda: b.copy_(a), 2).seconds for _ in range(3))
