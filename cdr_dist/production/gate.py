"""Whether a new model may take the published one's place: what both are on the same later day, against thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.words import check, option
from cdr_dist.evaluation.metrics import auc
from cdr_dist.evaluation.significance import PairedDifference, paired_bootstrap


@dataclass(frozen=True)
class GateOptions:
    """Thresholds; a model that misses one of them is not published."""

    auc: float = option(0.5, "gate: least test AUC of the new model")
    drop: float = option(0.005, "gate: most that its test AUC may be below the published model's, on the same rows")
    logloss: float = option(math.inf, "gate: most that its log loss may be above the published model's; inf: any")
    calibration: float = option(0.2, "gate: most that mean prediction / share of likes may differ from 1")
    known: float = option(
        0.2, "gate: least share of test rows whose user training has seen, and of those whose item it has"
    )
    rows: int = option(100, "gate: fewest test rows that decide anything")

    def __post_init__(self) -> None:
        for name in ("auc", "known"):
            check(0 <= getattr(self, name) <= 1, f"gate.{name}={getattr(self, name)}: must be between 0 and 1")
        for name in ("drop", "logloss", "calibration", "rows"):
            check(getattr(self, name) >= 0, f"gate.{name}={getattr(self, name)}: must not be negative")


@dataclass(frozen=True)
class Scores:
    """A model's scores (logits) of the day's test rows; user, label and score [rows]."""

    user: NDArray[np.int64]
    label: NDArray[np.float64]
    score: NDArray[np.float64]

    @property
    def auc(self) -> float:
        return auc(self.label, self.score)

    @property
    def logloss(self) -> float:
        """Mean of log(1 + e^-x) of the logits of likes, and of their negatives' e^x."""
        return float(np.logaddexp(0.0, np.where(self.label > 0, -self.score, self.score)).mean())

    @property
    def calibration(self) -> float:
        """Mean prediction / share of likes; 1 is right on average."""
        likes = float(self.label.mean()) if len(self.label) else 0.0
        return float(np.mean(1 / (1 + np.exp(-np.clip(self.score, -60, 60))))) / likes if likes else math.nan


@dataclass(frozen=True)
class Check:
    """One threshold: what was measured, in words, and whether it holds."""

    name: str
    measured: float
    threshold: str
    holds: bool


@dataclass(frozen=True)
class Verdict:
    checks: list[Check]
    against: PairedDifference | None
    """New AUC minus the published model's, over users."""

    @property
    def passes(self) -> bool:
        return all(check.holds for check in self.checks)

    def __str__(self) -> str:
        """What fails, or that nothing does."""
        failed = [f"{c.name} {number(c.measured)}, {c.threshold} wanted" for c in self.checks if not c.holds]
        return "; ".join(failed) or "every threshold is met"


def number(value: float | None) -> str:
    """For people."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 10 else f"{value:.4f}"


def decide(options: GateOptions, new: Scores, old: Scores | None, known: float) -> Verdict:
    """old: of the published model on the same rows; None: there is none yet. known: the smaller one of the
    shares of rows whose user, and whose item, training has seen. A measure that has no value fails."""
    checks = [
        Check("test rows", len(new.label), f"at least {options.rows}", len(new.label) >= options.rows),
        Check("AUC", new.auc, f"at least {options.auc:g}", new.auc >= options.auc),
        Check(
            "calibration",
            new.calibration,
            f"1 ± {options.calibration:g}",
            abs(new.calibration - 1) <= options.calibration,
        ),
        Check("share of known rows", known, f"at least {options.known:g}", known >= options.known),
    ]
    against = None
    if old is not None:
        assert np.array_equal(new.user, old.user), "scores of the same rows"
        against = paired_bootstrap(new.user, new.label, new.score[None], old.score[None])
        change = new.auc - old.auc
        checks.append(Check("AUC - published", change, f"at least {-options.drop:g}", change >= -options.drop))
        worse, most = new.logloss - old.logloss, options.logloss
        wanted = f"at most {most:g}" if math.isfinite(most) else "any"
        checks.append(Check("log loss - published", worse, wanted, worse <= most))
    return Verdict(checks, against)
