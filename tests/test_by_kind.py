"""tools/by_kind.py: hits and reciprocal ranks of either kind of users, counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from by_kind import gains


def test_gains_are_those_counted_by_hand() -> None:
    """Ranks 1 and 7 of aligned users; 2 of the contrary one, tied with another."""
    above = {0: (1, 0, 0), 1: (2, 6, 0), 2: (3, 1, 1)}
    rows = [
        (user, example, label, score)
        for example, (user, higher, equal) in above.items()
        for label, score in [(1.0, 0.5), *[(0.0, 0.9)] * higher, *[(0.0, 0.5)] * equal, *[(0.0, 0.1)] * (9 - higher)]
    ]
    scores = pl.DataFrame(rows, schema=["user", "example", "label", "score"], orient="row")
    kinds = pl.DataFrame({"user": [1, 2, 3], "kind": ["aligned", "aligned", "contrary"]})
    wanted = {"aligned hr@5": 0.5, "aligned mrr@5": 0.5, "contrary hr@5": 1.0, "contrary mrr@5": (1 / 2 + 1 / 3) / 2}
    assert gains(scores, kinds) == pytest.approx(wanted)
