"""Has anything become slower? Runs a few cases of every suite and compares with bench_ratios.json.

python tools/bench_check.py         # exit code 1 where a ratio is worse than the committed one, beyond noise
python tools/bench_check.py write   # bench_ratios.json anew, on an idle machine: every case three times, 15 minutes
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job
from tools import bench

RATIOS = Path(__file__).resolve().parent / "bench_ratios.json"
REPEATS, LEAST_ALLOWED, MOST_ALLOWED = 3, 0.1, 0.5
"""Shares of a ratio that it may lose: a check that forgives all would be none."""
NOISES = 2.0
"""The range of three repeats is about 1.7 standard deviations: twice that is hardly ever chance."""

CHECKED = {
    "lower": ("batch 1024 width 64, against sparse by hand",),
    "lower_limit": ("batch 1024 width 64",),
    "perceptron": ("batch 64 width 12 N 20",),
    "upper": ("series, 10000 rows", "whole step, 8 draws"),
    "overhead": ("biao against joint, interval 100",),
    "vocabulary": ("lower, 100000 rows", "upper, 100000 rows"),
    "stream": ("local, biao, batch 2048",),
    "stall": ("1 worker, batch 2048",),
    "workers": ("batch 1024, in memory",),
    "prepare": ("1000000 interactions",),
    "evaluate": ("training batch 2048",),
    "epoch": ("CoNet width 12, batch 2048",),
    "checkpoint": ("1 worker, against in place",),
    "start": ("trainer.workers=0",),
    "pretrain": ("944000 items x 128, batch 128",),
}
"""Suite -> cases: those that take seconds, and of several of a kind one."""


@dataclass(frozen=True)
class Committed:
    """`noise`: the range of repeated runs' ratios over their median."""

    suite: str
    case: str
    ratio: float
    noise: float

    @property
    def least(self) -> float:
        """A lower ratio is worse beyond noise."""
        return self.ratio * (1 - min(MOST_ALLOWED, max(LEAST_ALLOWED, NOISES * self.noise)))


Case = tuple[str, str]
Found = Mapping[Case, float]
"""(suite, case) -> ratio."""


def worse(committed: Sequence[Committed], found: Found) -> list[Committed]:
    """Those whose ratio is worse beyond noise, or that were not measured at all."""
    return [c for c in committed if found.get((c.suite, c.case), 0.0) < c.least]


def comparison(committed: Sequence[Committed], found: Found) -> str:
    bad = worse(committed, found)
    rows = [
        [
            c.suite,
            c.case,
            f"{c.ratio:.3g}",
            f"{c.least:.3g}",
            f"{found[c.suite, c.case]:.3g}" if (c.suite, c.case) in found else "not measured",
            "WORSE" if c in bad else "",
        ]
        for c in committed
    ]
    return markdown(["suite", "case", "committed", "least", "now", ""], rows)


def of_repeats(runs: Sequence[Found]) -> list[Committed]:
    """Medians, and how far runs of the same cases were apart."""
    found = []
    for suite, case in runs[0]:
        ratios = [run[suite, case] for run in runs]
        middle = statistics.median(ratios)
        found.append(Committed(suite, case, round(middle, 4), round((max(ratios) - min(ratios)) / middle, 4)))
    return found


def measure(cases: Collection[Case]) -> dict[Case, float]:
    suites = list(dict.fromkeys(suite for suite, _ in cases))
    return {(r.suite, r.case): r.ratio for r in bench.run(suites, quick=False, only=cases)}


def confirmed(committed: Sequence[Committed], found: Found) -> dict[Case, float]:
    """`found`, with those that look worse measured again: medians count, so that a burst of load fails nothing."""
    if not (again := {(c.suite, c.case) for c in worse(committed, found)} & found.keys()):
        return dict(found)
    more = [measure(again) for _ in range(REPEATS - 1)]
    return {case: statistics.median([r, *(m[case] for m in more if case in m)]) for case, r in found.items()}


def not_checked(committed: Sequence[Committed]) -> str:
    """The benchmark's other cases, a line a suite."""
    checked = {(c.suite, c.case) for c in committed}
    others = {s: [c for c in bench.cases(s, False, "") if (s, c) not in checked] for s in bench.SUITES}
    return "\n".join(f"not checked: {suite}: {'; '.join(cases)}" for suite, cases in others.items() if cases)


def main(words: list[str]) -> None:
    if words == ["write"]:
        cases = [(suite, case) for suite, of in CHECKED.items() for case in of]
        lines = [json.dumps(asdict(c)) for c in of_repeats([measure(cases) for _ in range(REPEATS)])]
        RATIOS.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        return
    if words:
        raise UserError(f"{words[0]}: unknown; write is what there is")
    committed = [Committed(**entry) for entry in json.loads(RATIOS.read_text())]
    found = confirmed(committed, measure([(c.suite, c.case) for c in committed]))
    print("\n" + comparison(committed, found) + "\n\n" + not_checked(committed))
    if bad := worse(committed, found):
        print(f"bench_check: {len(bad)} of {len(committed)} ratios are worse than committed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_job("bench_check", __doc__, main))
