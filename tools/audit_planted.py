"""Is the audit right where the truth is known? On planted pairs of domains, each audited as jobs/audit.py does.

    python tools/audit_planted.py out=runs/audit-planted seeds=5 budget=2
    python tools/audit_planted.py kinds=helpful,harmful pairs=1 users=1000

A pair is helpful (every source category follows the target's tastes), neutral (likes are coin flips), harmful (they
follow other tastes) or mixed (the demo's shape); each has a data seed of its own. The right answer is yes for helpful
and mixed pairs, and anything else for the others. Printed: each pair's answer, its interval, and by how much the
advice costs: it is given once more on one half of the test users, and on the other half the model that it names is
compared with the single-domain one that is best there, in standard errors over users and seeds.
pairs: of each kind (kinds, default 3 helpful, 2 neutral, 2 harmful, 3 mixed); data_seed: of the first one. Finished
runs are read.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.demo import write_planted
from cdr_dist.data.synthetic import Planted
from cdr_dist.data.words import apart
from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation import verdict
from cdr_dist.evaluation.metrics import auc
from cdr_dist.evaluation.table import markdown
from cdr_dist.evaluation.verdict import OfSource, Rows, Tried
from cdr_dist.jobs import run_job
from cdr_dist.training.audit import audit, request_of

KINDS = {
    "helpful": replace(Planted(), neutral=0, harmful=0),
    "neutral": replace(Planted(), helpful=0, neutral=12, harmful=0),
    "harmful": replace(Planted(), helpful=0, neutral=0),
    "mixed": Planted(),
}
PAIRS = {"helpful": 3, "neutral": 2, "harmful": 2, "mixed": 3}
HELPS = ("helpful", "mixed")


def main(words: list[str]) -> None:
    defaults = {"out": "runs/audit-planted", "kinds": ",".join(KINDS), "pairs": "", "users": "2000", "data_seed": "300"}
    own, rest = apart(words, defaults)
    chosen = own["kinds"].split(",")
    for kind in chosen:
        if kind not in KINDS:
            raise UserError(f"kinds={kind}: {nearest(kind, list(KINDS))}")
    logging.getLogger("cdr_dist").setLevel(logging.WARNING)
    rows, right, regrets = [], 0, []
    for kind in chosen:
        for number in range(int(own["pairs"] or PAIRS[kind])):
            shape = replace(KINDS[kind], users=int(own["users"]), seed=int(own["data_seed"]) + number)
            row, good, regret = _audited(kind, shape, Path(own["out"]).absolute() / f"{kind}-{number}", rest)
            rows.append(row)
            right += good
            regrets.append(regret)
            print(" | ".join(row), flush=True)
    head = ["pair", "answer", "right", "method", "against", "gain", "95%", "behind by (s.e.)"]
    print("\n" + markdown(head, rows, left=5))
    print(
        f"\n{right} of {len(rows)} answers right; at most {max(regrets):.2f} s.e. behind the best single-domain model"
    )


def _audited(kind: str, shape: Planted, folder: Path, words: list[str]) -> tuple[list[str], bool, float]:
    """A row of the table, whether the answer is right, and how many standard errors the advice costs."""
    data = folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write_planted(shape, str(data))
    (found,), singles, known, lost = audit(request_of([f"data={data}", f"out={folder}", *words]))
    for run in lost:
        print(run, file=sys.stderr)
    good = (found.verdict == "yes") == (kind in HELPS)
    regret = regret_of(found, singles, known)
    d = found.difference
    interval = f"{d.low:+.4f} … {d.high:+.4f}"
    row = [folder.name, found.verdict, "right" if good else "wrong", found.best.name, found.single.name]
    return [*row, f"{d.difference:+.4f}", interval, f"{regret:.2f}"], good, regret


def regret_of(found: OfSource, singles: Sequence[Tried], known: Rows) -> float:
    """Standard errors by which what is advised on one half of the users falls behind the best single on the other."""
    users = np.unique(known.user)
    half = np.isin(known.user, np.random.default_rng(0).permutation(users)[: len(users) // 2])
    decided = verdict.judge(found.name, *_on(half, known, singles), _on(half, known, found.tried)[1])
    advised = decided.best if verdict.recommended([decided]) else decided.single
    rows, others = _on(~half, known, singles)
    best = max(others, key=lambda of: np.mean(of.test))
    (advised,) = (of for of in (*others, *_on(~half, known, found.tried)[1]) if of.name == advised.name)
    if advised is best:
        return 0.0
    d = verdict.difference(rows, np.ones(len(rows.user), dtype=bool), advised, best)
    return max(0.0, -d.difference / ((d.high - d.low) / (2 * 1.96)))


def _on(inside: NDArray[np.bool_], known: Rows, tried: Sequence[Tried]) -> tuple[Rows, list[Tried]]:
    rows = Rows(known.user[inside], known.label[inside], known.behaviours[inside])
    scores = [of.scores[:, inside] for of in tried]
    return rows, [
        replace(of, scores=s, test=[auc(rows.label, seed) for seed in s]) for of, s in zip(tried, scores, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(run_job("audit_planted", __doc__, main))
