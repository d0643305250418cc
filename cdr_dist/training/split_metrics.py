"""All that is measured of a split: at a validation what selects the checkpoint needs, at the end everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cdr_dist.evaluation.metrics import FULL
from cdr_dist.training.class_metrics import class_metrics
from cdr_dist.training.evaluate import evaluate
from cdr_dist.training.full_ranking import full_ranking

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


def validation_metrics(session: Session, metric: str) -> dict[str, float]:
    """Of the validation rows; among all items only where `metric` asks for it. A collective call."""
    full_ks = session.config.evaluation.full_ks
    return split_metrics(session, "valid", full_ks if metric.startswith(FULL) else ())


def split_metrics(session: Session, split: str, full_ks: Sequence[int], scores: str | None = None) -> dict[str, float]:
    """`scores`: as in `evaluate`. A collective call."""
    found = evaluate(session, split, scores) | full_ranking(session, split, full_ks)
    return found | (class_metrics(session, split) if session.manifest.classes else {})
