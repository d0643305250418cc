"""Is the audit right where the truth is known? On planted pairs of domains, each audited as jobs/audit.py does.

    python tools/audit_planted.py out=runs/audit-planted seeds=5 budget=2
    python tools/audit_planted.py kinds=helpful,harmful pairs=1 users=1000

A pair is helpful (every source category follows the target's tastes), neutral (likes are coin flips), harmful (they
follow other tastes) or mixed (the demo's shape); each has a data seed of its own. The right answer is yes for helpful
and mixed pairs, and anything else for the others. kinds=which asks from where: one target with a helpful and a harmful
source, where the first must be a yes, the second not, and the advice not the second.

Printed: each pair's answer, its interval, and by how much the advice costs: it is given once more on one half of the
test users, and on the other half the model that it names is compared with the single-domain one that is best there, in
standard errors over users and seeds.
pairs: of each kind (kinds, default 3 helpful, 2 neutral, 2 harmful, 3 mixed, 1 which); data_seed: of the first one.
Finished runs are read.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.demo import write_planted
from cdr_dist.data.synthetic import Planted, planted_logs
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
WHICH = "which"
PAIRS = {"helpful": 3, "neutral": 2, "harmful": 2, "mixed": 3, WHICH: 1}
HELPS = ("helpful", "mixed")


def main(words: list[str]) -> None:
    defaults = {"out": "runs/audit-planted", "kinds": ",".join(PAIRS), "pairs": "", "users": "2000", "data_seed": "300"}
    own, rest = apart(words, defaults)
    chosen = own["kinds"].split(",")
    for kind in chosen:
        if kind not in PAIRS:
            raise UserError(f"kinds={kind}: {nearest(kind, list(PAIRS))}")
    logging.getLogger("cdr_dist").setLevel(logging.WARNING)
    rows, right, regrets, categories = [], 0, [], Counter[tuple[str, str]]()
    for kind in chosen:
        for number in range(int(own["pairs"] or PAIRS[kind])):
            size = {"users": int(own["users"]), "seed": int(own["data_seed"]) + number}
            one = _audited(kind, size, Path(own["out"]).absolute() / f"{kind}-{number}", rest)
            rows.append(one.row)
            right += one.right
            regrets.append(one.regret)
            categories += one.categories
            print(" | ".join(one.row), flush=True)
    head = ["pair", "answer", "right", "method", "against", "gain", "95%", "over target_only", "behind by (s.e.)"]
    print("\n" + markdown(head, rows, left=5))
    print(
        f"\n{right} of {len(rows)} answers right; at most {max(regrets):.2f} s.e. behind the best single-domain model"
    )
    for true in sorted({true for true, _ in categories}):
        said = ", ".join(f"{categories[true, v]} {v}" for v in ("more", "as all", "less"))
        print(f"{true} categories of mixed pairs: counted {said}")


class Audited(NamedTuple):
    row: list[str]
    right: bool
    regret: float
    """Standard errors that the advice costs."""
    categories: Counter[tuple[str, str]]
    """(truth, verdict) of source categories, where some help and some do not."""


def _audited(kind: str, size: dict[str, int], folder: Path, words: list[str]) -> Audited:
    folder.mkdir(parents=True, exist_ok=True)
    found, singles, known, lost = audit(request_of([*_data(kind, size, folder), f"out={folder}", *words]))
    for run in lost:
        print(run, file=sys.stderr)
    advised, verdicts = verdict.recommended(found), {of.name: of.verdict for of in found}
    shown = advised or found[0]
    if kind == WHICH:
        answer = advised.name if advised else "none"
        right = verdicts["helpful"] == "yes" != verdicts["harmful"] and answer != "harmful"
    else:
        answer = found[0].verdict
        right = (answer == "yes") == (kind in HELPS)
    regret = regret_of(found, singles, known)
    judged = Counter[tuple[str, str]]()
    if kind == "mixed":
        truth = replace(KINDS[kind], **size).kinds
        judged.update((truth[int(c.name[1:])], c.verdict) for c in found[0].categories)
    gains = [shown.difference] + ([shown.own] if shown.own else [])
    told = [(f"{d.difference:+.4f}", f"{d.low:+.4f} … {d.high:+.4f}") for d in gains]
    row = [folder.name, answer, "right" if right else "wrong", shown.best.name, shown.single.name, *told[0]]
    return Audited([*row, " ".join(f"{a} ({b})" for a, b in told[1:]), f"{regret:.2f}"], right, regret, judged)


def _data(kind: str, size: dict[str, int], folder: Path) -> list[str]:
    """Words of the audit: a dataset, or the logs of a helpful and a harmful source of one target."""
    if kind != WHICH:
        write_planted(replace(KINDS[kind], **size), str(folder / "data"))
        return [f"data={folder}/data"]
    for name in ("helpful", "harmful"):
        logs = planted_logs(replace(KINDS[name], **size))
        logs.source.write_parquet(folder / f"{name}.parquet")
        logs.target.write_parquet(folder / "target.parquet")  # the same of both
    return [f"source={folder}/helpful.parquet,{folder}/harmful.parquet", f"target={folder}/target.parquet"]


def regret_of(found: Sequence[OfSource], singles: Sequence[Tried], known: Rows) -> float:
    """Standard errors by which what is advised on one half of the users falls behind the best single on the other."""
    users = np.unique(known.user)
    half = np.isin(known.user, np.random.default_rng(0).permutation(users)[: len(users) // 2])
    rows, alone = _on(half, known, singles)
    decided = [verdict.judge(of.name, rows, alone, _on(half, known, of.tried)[1], sources=len(found)) for of in found]
    chosen = verdict.recommended(decided)
    rows, others = _on(~half, known, singles)
    best = max(others, key=lambda of: np.mean(of.test))
    name, among = decided[0].single.name, others
    if chosen is not None:
        name, among = chosen.best.name, _on(~half, known, next(of for of in found if of.name == chosen.name).tried)[1]
    (advised,) = (of for of in among if of.name == name)
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
