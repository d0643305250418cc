"""How fast is it, against what a careful user would write, and against what the machine can do?

    python tools/bench.py                          # every suite
    python tools/bench.py lower upper              # some of them
    python tools/bench.py perceptron data=DATASET  # a dataset's own rows (suites perceptron and overhead)
    python tools/bench.py --quick                  # tiny sizes, to see that everything runs
    python tools/bench.py stream --json FILE       # the lines to a file as well
    python tools/bench.py device                   # on a GPU, against all cores beside it

One JSON line a case: seconds and baseline_seconds (medians, a unit of work; ours and the baseline take turns), ratio
(the baseline's time over ours), peak_rss_gb (of a process of the case's own), roofline_share. Then a table. One thread
a worker.

roofline_share is of one worker. FLOPs (bench_flops.py: the fewest that do the job; of upper steps, series and full
ranking as torch counts them) over seconds and the rate of this machine's matrix product. Or bytes over seconds and the
rate of its copy: `stream` (columns decoded, batches written), `prepare` (pages of logs and shards, uncompressed),
`checkpoint` (rows read, copy written). null: `start` and `stall`, which are about waiting.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job
from tools.bench_case import ONE_THREAD, Build, Result, measured

SUITES = (
    "perceptron",
    "lower",
    "lower_limit",
    "upper",
    "overhead",
    "vocabulary",
    "stream",
    "stall",
    "workers",
    "prepare",
    "evaluate",
    "epoch",
    "checkpoint",
    "start",
    "pretrain",
)
"""Each is a file bench_NAME.py beside this one; `cases(quick, data)` names its cases."""
ON_A_GPU = ("device",)
"""Likewise, and run only where they are named."""


def cases(suite: str, quick: bool, data: str) -> dict[str, Build]:
    return import_module(f"tools.bench_{suite}").cases(quick, data)


def run(
    names: Sequence[str], quick: bool, data: str = "", only: Collection[tuple[str, str]] | None = None
) -> list[Result]:
    """Every case in a process of its own, one after the other; quick: all in one. only: of these (suite, case)."""
    chosen = [(name, case) for name in names for case in cases(name, quick, data)]
    found = []
    with measuring_process(quick) as process:
        for name, case in chosen:
            if only is None or (name, case) in only:
                found.append(process.submit(_one, name, case, quick, data).result())
                print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    return found


@contextmanager
def measuring_process(several: bool) -> Iterator[ProcessPoolExecutor]:
    """With one thread for whatever computes. several: one process for all that is submitted."""
    spawn, before = multiprocessing.get_context("spawn"), dict(os.environ)
    os.environ.update(ONE_THREAD)
    try:
        with ProcessPoolExecutor(1, spawn, max_tasks_per_child=None if several else 1) as process:
            yield process
    finally:
        for name in ONE_THREAD:
            del os.environ[name]
        os.environ.update(before)


def _one(suite: str, case: str, quick: bool, data: str) -> Result:
    with ExitStack() as held:
        return measured(suite, case, cases(suite, quick, data)[case](held), quick)


def table(results: Sequence[Result]) -> str:
    rows = [
        [
            r.suite,
            r.case,
            r.unit,
            f"{1e3 * r.seconds:.2f}",
            f"{1e3 * r.baseline_seconds:.2f}",
            f"{r.ratio:.3g}",
            f"{r.target:.3g}",
            f"{r.peak_rss_gb:.1f}",
            "" if r.roofline_share is None else f"{r.roofline_share:.0%}",
        ]
        for r in results
    ]
    return markdown(["suite", "case", "unit", "ms", "baseline ms", "ratio", "wanted", "peak GB", "of roofline"], rows)


def main(words: list[str]) -> None:
    words, quick, data, lines = list(words), "--quick" in words, "", None
    if "--json" in words:
        at = words.index("--json")
        if at + 1 == len(words):
            raise UserError("--json: name a file")
        lines = Path(words[at + 1])
        del words[at : at + 2]
    names = []
    for word in words:
        if word.startswith("data="):
            data = word.removeprefix("data=")
        elif word in (*SUITES, *ON_A_GPU):
            names.append(word)
        elif word != "--quick":
            raise UserError(f"{word}: unknown suite; {nearest(word, [*SUITES, *ON_A_GPU])}")
    found = run(names or SUITES, quick, data)
    if lines is not None:
        lines.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in found))
    print("\n" + table(found))


if __name__ == "__main__":
    sys.exit(run_job("bench", __doc__, main))
