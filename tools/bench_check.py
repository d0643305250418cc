"""Has anything become slower? Runs the suites that bench_ratios.json names and compares.

python tools/bench_check.py                      # exit code 1 where a ratio is worse than the committed one
python tools/bench_check.py write FILE FILE FILE # bench_ratios.json anew: of the lines of repeated runs of
                                                 # tools/bench.py SUITE… --json FILE
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.errors import UserError
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job

RATIOS = Path(__file__).resolve().parent / "bench_ratios.json"
LEAST_ALLOWED = 0.1
NOISES = 2.0
"""The range of three repeats is about 1.7 standard deviations: twice that is hardly ever chance."""


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
        return self.ratio * (1 - max(LEAST_ALLOWED, NOISES * self.noise))


Found = Mapping[tuple[str, str], float]
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
    """UserError: fewer than three runs, or runs of different cases."""
    if len(runs) < 3:
        raise UserError("write: give the lines of at least three runs, so that their noise can be told")
    if any(run.keys() != runs[0].keys() for run in runs):
        raise UserError("write: the runs are of different cases")
    found = []
    for suite, case in runs[0]:
        ratios = [run[suite, case] for run in runs]
        middle = statistics.median(ratios)
        found.append(Committed(suite, case, round(middle, 4), round((max(ratios) - min(ratios)) / middle, 4)))
    return found


def read_lines(file: str) -> dict[tuple[str, str], float]:
    try:
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        return {(line["suite"], line["case"]): line["ratio"] for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a file of tools/bench.py --json ({error})") from error


def main(words: list[str]) -> None:
    if words[:1] == ["write"]:
        lines = [json.dumps(asdict(c)) for c in of_repeats([read_lines(file) for file in words[1:]])]
        RATIOS.write_text("[\n" + ",\n".join(lines) + "\n]\n")
        return
    if words:
        raise UserError(f"{words[0]}: unknown; write FILE FILE FILE is what there is")
    from tools.bench import run

    committed = [Committed(**entry) for entry in json.loads(RATIOS.read_text())]
    suites = list(dict.fromkeys(c.suite for c in committed))
    found = {(r.suite, r.case): r.ratio for r in run(suites, quick=False)}
    print("\n" + comparison(committed, found))
    if bad := worse(committed, found):
        print(f"bench_check: {len(bad)} of {len(committed)} ratios are worse than committed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_job("bench_check", __doc__, main))
