"""Should I transfer, what, and from where? What an audit's scores say, with intervals.

The methods that are compared are chosen by their validation AUC: the best single-domain one, and of each source the
best that uses it. Their difference is then measured on the test rows: it says whether to transfer. Among several
sources whose gain is shown the validation AUC decides again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cdr_dist.errors import UserError
from cdr_dist.evaluation.significance import PairedDifference, paired_bootstrap

GROUPS = {"new (none)": (0, 0), "cold (1 or 2)": (1, 2), "short (3 to 9)": (3, 9), "long (10 and more)": (10, math.inf)}
"""Users by their training behaviours in the target: name -> least, most."""
ALONE = "target_only"
FEWEST_USERS = 30
"""Of a smaller group nothing is said."""


@dataclass(frozen=True)
class Tried:
    """One method with its options tuned. valid, test: AUC by seed. scores: [seeds, rows] of the test rows.

    seeds: of its runs that came through; empty for one that has none (popularity), which has a single row of scores.
    """

    name: str
    valid: list[float]
    test: list[float]
    scores: NDArray[np.float64]
    seconds: float = 0.0
    passes: float = 0.0
    words: str = ""
    seeds: tuple[int, ...] = ()

    @property
    def validation(self) -> float:
        return float(np.mean(self.valid))


@dataclass(frozen=True)
class Rows:
    """The test rows, the same for all methods: user and label [rows]; behaviours: of each row's user, in training."""

    user: NDArray[np.int64]
    label: NDArray[np.float64]
    behaviours: NDArray[np.int64]


@dataclass(frozen=True)
class Category:
    """A source category: its mean weight (1: what joint training gives each behaviour), 95% over seeds."""

    name: str
    behaviours: int
    weight: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "more" if self.low > 1 else "less" if self.high < 1 else "as all"


@dataclass(frozen=True)
class OfSource:
    """What one source, or several together, does for the target."""

    name: str
    single: Tried
    best: Tried
    tried: list[Tried]
    difference: PairedDifference
    own: PairedDifference | None
    """Against target_only, the same backbone without a source; None where that was not tried."""
    groups: dict[str, tuple[int, PairedDifference]]  # group -> users, difference
    categories: list[Category]

    @property
    def verdict(self) -> str:
        """yes, no (worse than without), or not shown: the interval holds 0."""
        if self.difference.low > 0:
            return "yes"
        return "no" if self.difference.high < 0 else "not shown"

    @property
    def harms(self) -> bool:
        """Whether it is the source that costs, and not the backbone: also that alone is better without it."""
        return self.verdict == "no" and (self.own is None or self.own.high < 0)


def level_of(sources: int) -> float:
    """Of each source's interval, so that those of all hold together at 95% (Bonferroni)."""
    return 1 - 0.05 / sources


def judge(
    name: str,
    rows: Rows,
    singles: Sequence[Tried],
    tried: Sequence[Tried],
    categories: Sequence[Category] = (),
    sources: int = 1,
) -> OfSource:
    """sources: how many are judged; the more, the wider the intervals that say whether to transfer."""
    level = level_of(sources)
    single = max(singles, key=lambda of: of.validation)
    best = max(tried, key=lambda of: of.validation)
    everyone = np.ones(len(rows.user), dtype=bool)
    groups = {}
    for group, (least, most) in GROUPS.items():
        inside = (rows.behaviours >= least) & (rows.behaviours <= most)
        users = len(np.unique(rows.user[inside]))
        if users >= FEWEST_USERS:
            groups[group] = users, difference(rows, inside, best, single)
    ordered = sorted(categories, key=lambda c: -c.weight)
    alone = next((of for of in singles if of.name == ALONE), None)
    own = None if alone is None else difference(rows, everyone, best, alone, level)
    gain = difference(rows, everyone, best, single, level)
    return OfSource(name, single, best, list(tried), gain, own, groups, ordered)


def difference(rows: Rows, inside: NDArray[np.bool_], a: Tried, b: Tried, level: float = 0.95) -> PairedDifference:
    """a - b on the rows `inside`, over the seeds that both have; one without seeds stands against every seed.

    UserError: they have none in common.
    """
    seeds = sorted(set(a.seeds) & set(b.seeds)) if a.seeds and b.seeds else list(a.seeds or b.seeds)
    if not seeds and (a.seeds or b.seeds):
        raise UserError(f"{a.name} and {b.name}: of no seed did both runs come through")
    first, second = (_of_seeds(of, seeds)[:, inside] for of in (a, b))
    return paired_bootstrap(rows.user[inside], rows.label[inside], first, second, level=level)


def _of_seeds(of: Tried, seeds: Sequence[int]) -> NDArray[np.float64]:
    if of.seeds:
        return of.scores[[of.seeds.index(seed) for seed in seeds]]
    return np.broadcast_to(of.scores, (max(1, len(seeds)), of.scores.shape[1]))


def recommended(found: Sequence[OfSource]) -> OfSource | None:
    """Of the sources whose gain is shown the best on validation data; None: train on the target alone."""
    shown = [of for of in found if of.verdict == "yes"]
    return max(shown, key=lambda of: of.best.validation, default=None)


def sentence(found: Sequence[OfSource]) -> str:
    """The answer, in one or two sentences."""
    best = recommended(found)
    single = found[0].single
    if best is None:
        harmful = [of.name for of in found if of.harms]
        why = f"{', '.join(harmful)} does harm" if harmful else "no source shows a gain"
        return f"No: {why}. Train {single.name} on the target alone (test AUC {np.mean(single.test):.4f})."
    d = best.difference
    return (
        f"Yes: from {best.name}, by {best.best.name}. Test AUC {np.mean(best.best.test):.4f} against "
        f"{np.mean(single.test):.4f} of {single.name}, the best without a source: {d.difference:+.4f} "
        f"({d.low:+.4f} … {d.high:+.4f})."
    )


class Table(NamedTuple):
    title: str
    header: list[str]
    rows: list[list[str]]
    left: int
    """Columns that hold words."""


def tables(singles: Sequence[Tried], found: Sequence[OfSource]) -> list[Table]:
    """The sources, all methods, user groups, categories; none that is empty."""
    named = [("target alone", of) for of in singles] + [(source.name, of) for source in found for of in source.tried]
    methods = [
        [where, of.name, f"{of.validation:.4f}", _mean_sd(of.test), f"{of.seconds:.1f}", f"{of.passes:.0f}", of.words]
        for where, of in named
    ]
    sources = [
        [of.name, of.verdict, of.best.name, of.single.name, *_interval(of.difference), _own(of), _cost(of)]
        for of in found
    ]
    groups = [
        [of.name, group, f"{users:,}", *_interval(difference)]
        for of in found
        for group, (users, difference) in of.groups.items()
    ]
    categories = [
        [of.name, c.name, c.verdict, f"{c.behaviours:,}", f"{c.weight:.2f}", f"{c.low:.2f} … {c.high:.2f}"]
        for of in found
        for c in of.categories
    ]
    gain = ["test AUC gained", "interval", "p"]
    head = ["source", "transfer?", "method", "against", *gain, f"gained over {ALONE}", "time"]
    every = [
        Table("From where?", head, sources, 4),
        Table("For whom? Users by their training behaviours", ["source", "users", "number", *gain], groups, 2),
        Table(
            "What? Source categories as BIAO weighs them",
            ["source", "category", "counts", "behaviours", "weight", "95% over seeds"],
            categories,
            3,
        ),
        Table(
            "All methods",
            ["source", "method", "valid AUC", "test AUC", "seconds", "backward passes", "chosen"],
            methods,
            2,
        ),
    ]
    return [table for table in every if table.rows]


def _mean_sd(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def _interval(of: PairedDifference) -> list[str]:
    return [f"{of.difference:+.4f}", f"{of.low:+.4f} … {of.high:+.4f}", f"{of.p:.3f}"]


def _own(of: OfSource) -> str:
    return f"{of.own.difference:+.4f} ({of.own.low:+.4f} … {of.own.high:+.4f})" if of.own else "–"


def _cost(of: OfSource) -> str:
    """Training time against the single-domain method's."""
    return f"{of.best.seconds / of.single.seconds:.1f} x" if of.single.seconds else f"{of.best.seconds:.0f} s"


def to_json(found: Sequence[OfSource]) -> Mapping[str, object]:
    best = recommended(found)
    return {
        "transfer": best is not None,
        "source": best.name if best else None,
        "method": best.best.name if best else found[0].single.name,
        "sentence": sentence(found),
        "sources": [
            {
                "name": of.name,
                "verdict": of.verdict,
                "method": of.best.name,
                "words": of.best.words,
                "against": of.single.name,
                **{n: getattr(of.difference, n) for n in ("difference", "low", "high", "p")},
                "harms": of.harms,
                "own": of.own and {n: getattr(of.own, n) for n in ("difference", "low", "high", "p")},
                "groups": {
                    group: {"users": users, **{n: getattr(d, n) for n in ("difference", "low", "high")}}
                    for group, (users, d) in of.groups.items()
                },
                "categories": {c.name: {"weight": c.weight, "low": c.low, "high": c.high} for c in of.categories},
            }
            for of in found
        ],
    }
