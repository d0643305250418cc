"""How fast is it, against what a careful user would write, and against what the machine can do?

    python tools/bench.py                          # every suite
    python tools/bench.py perceptron data=DATASET  # histories of a dataset's own lengths and items
    python tools/bench.py --quick                  # tiny sizes, to see that everything runs

One JSON line a case: seconds and baseline_seconds (medians; ours and the baseline take turns), ratio (the baseline's
time over ours), peak_rss_gb (of a process of the case's own), roofline_share (FLOPs over seconds and the rate of this
machine's matrix product, or bytes over seconds and the rate of its copy). Then a table. One thread.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job

ROUNDS, SHORTEST = 9, 0.1
"""Turns of each side, and the seconds that one turn takes at least."""


@dataclass(frozen=True)
class Case:
    """Both sides do the same work a call. flops, nbytes: of ours, a call."""

    suite: str
    name: str
    target: float
    """The ratio that is wanted."""
    ours: Callable[[], Any]
    baseline: Callable[[], Any]
    flops: float = 0.0
    nbytes: float = 0.0


@dataclass(frozen=True)
class Result:
    suite: str
    case: str
    seconds: float
    baseline_seconds: float
    ratio: float
    target: float
    peak_rss_gb: float
    roofline_share: float | None


def measured(case: Case, quick: bool) -> Result:
    rounds, shortest = (2, 0.0) if quick else (ROUNDS, SHORTEST)
    sides = (case.ours, case.baseline)
    calls = [max(1, round(shortest / _seconds(side, 1))) for side in sides]
    found: list[list[float]] = [[], []]
    for _ in range(rounds):
        for times, side, n in zip(found, sides, calls, strict=True):
            times.append(_seconds(side, n) / n)
    ours, baseline = (statistics.median(times) for times in found)
    share = None
    if case.flops:
        share = case.flops / ours / gemm_rate()
    elif case.nbytes:
        share = case.nbytes / ours / copy_rate()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Result(case.suite, case.name, ours, baseline, baseline / ours, case.target, peak, share)


def _seconds(call: Callable[[], Any], times: int) -> float:
    call()
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start


def gemm_rate() -> float:
    """FLOPs a second of a matrix product of 1024 x 1024 x 1024."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / min(_seconds(lambda: a @ b, 3) / 3 for _ in range(3))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    a = torch.ones(1 << 26)
    b = torch.empty_like(a)
    return 2 * a.nbytes / min(_seconds(lambda: b.copy_(a), 1) for _ in range(3))


SUITES: dict[str, Callable[[bool, str], dict[str, Callable[[], Case]]]] = {}
"""Name -> (quick, dataset) -> the suite's cases, each built in the process that measures it."""


def suite(function: Callable[[bool, str], dict[str, Callable[[], Case]]]) -> Any:
    SUITES[function.__name__] = function
    return function


# ---- suites ---------------------------------------------------------------------------------------------------------


@suite
def perceptron(quick: bool, data: str) -> dict[str, Callable[[], Case]]:
    """Weights of a batch: ours against attention over padded histories with [e_i ; E_s] written out, as released."""
    from tools.bench_perceptron import case

    sizes = [(16, 4, 5, 1)] if quick else [(64, 12, 20, 1), (1024, 64, 50, 1), (1024, 64, 50, 8)]
    return {
        f"batch {rows} width {width} N {n}" + (f", {draws} a history" if draws > 1 else ""): (
            lambda rows=rows, width=width, n=n, draws=draws: case(rows, width, n, draws, data)
        )
        for rows, width, n, draws in sizes
    }


# ---------------------------------------------------------------------------------------------------------------------


def _one(name: str, case: str, quick: bool, data: str) -> Result:
    torch.set_num_threads(1)
    built = SUITES[name](quick, data)[case]()
    return measured(dataclasses.replace(built, suite=name, name=case), quick)


def run(names: Sequence[str], quick: bool, data: str) -> list[Result]:
    """Every case in a process of its own, one after the other."""
    context = multiprocessing.get_context("spawn")
    found = []
    for name in names:
        for case in SUITES[name](quick, data):
            with context.Pool(1) as pool:
                found.append(pool.apply(_one, (name, case, quick, data)))
            print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    return found


def table(results: Sequence[Result]) -> str:
    rows = [
        [
            r.suite,
            r.case,
            f"{1e3 * r.seconds:.2f}",
            f"{1e3 * r.baseline_seconds:.2f}",
            f"{r.ratio:.2f}",
            f"{r.target:g}",
            f"{r.peak_rss_gb:.1f}",
            "" if r.roofline_share is None else f"{r.roofline_share:.0%}",
        ]
        for r in results
    ]
    return markdown(["suite", "case", "ms", "baseline ms", "ratio", "wanted", "peak GB", "of roofline"], rows)


def main(words: list[str]) -> None:
    quick, data = "--quick" in words, ""
    names = []
    for word in words:
        if word.startswith("data="):
            data = word.removeprefix("data=")
        elif word != "--quick":
            if word not in SUITES:
                raise UserError(f"{word}: unknown suite; {nearest(word, list(SUITES))}")
            names.append(word)
    print("\n" + table(run(names or list(SUITES), quick, data)))


if __name__ == "__main__":
    sys.exit(run_job("bench", __doc__, main))
