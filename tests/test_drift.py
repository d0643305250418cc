"""What a day's rows look like, counted by hand, and which changes are large."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from cdr_dist.data.dataset import read_manifest
from cdr_dist.errors import UserError
from cdr_dist.production import drift
from cdr_dist.production.drift import Day, DriftOptions, changes, day_from, day_of, stability
from cdr_dist.production.nightly_report import report_of_night
from tests import datasets
from tests.test_prepare import keys_of


def test_a_day_is_what_its_rows_are(monkeypatch):
    folder = datasets.rated()
    rows = datasets.rows_of(folder, "test").to_dicts()
    day = day_of(str(folder), read_manifest(str(folder)))
    assert (day.rows, day.users) == (len(rows), len({row["user"] for row in rows}))
    assert day.label_rate == pytest.approx(sum(row["label"] for row in rows) / len(rows))
    for name in ("target_history", "source_history"):
        assert getattr(day, name) == pytest.approx(sum(len(row[f"{name}_item"]) for row in rows) / len(rows))
    names = keys_of(str(folder), "target_category")
    count = {}
    for row in rows:
        count[names[row["category"]]] = count.get(names[row["category"]], 0) + 1
    assert day.categories == pytest.approx({name: n / len(rows) for name, n in count.items()})
    assert day_from(dataclasses.asdict(day)) == day
    monkeypatch.setattr(drift, "CATEGORIES", 3)
    few = day_of(str(folder), read_manifest(str(folder)))
    assert list(few.categories)[-1] == "(all others)"
    assert sum(few.categories.values()) == pytest.approx(1.0)
    assert len(few.categories) == 4


YESTERDAY = Day(1000, 500, 0.4, 0.05, 0.1, 8.0, 20.0, {"a": 0.5, "b": 0.5})


@pytest.mark.parametrize(
    ("more", "large"),
    [
        ({}, []),
        ({"rows": 1600, "users": 700}, ["rows"]),
        ({"rows": 400}, ["rows"]),
        ({"label_rate": 0.31}, ["share of likes"]),
        ({"unseen_user": 0.16}, ["rows of unseen users"]),
        ({"unseen_item": 0.21}, ["rows of unseen items"]),
        ({"target_history": 11.0}, ["target history, mean length"]),
        ({"source_history": 0.0}, ["source history, mean length"]),
        ({"categories": {"a": 0.8, "b": 0.2}}, ["categories, stability index"]),
        ({"categories": {"a": 0.5, "c": 0.5}}, ["categories, stability index"]),
    ],
)
def test_what_changes_much_is_large_and_nothing_else(more, large):
    found = changes(YESTERDAY, dataclasses.replace(YESTERDAY, **more), DriftOptions())
    assert [change.of for change in found if change.large] == large


def test_from_nothing_everything_is_a_large_change():
    (first, *_) = changes(dataclasses.replace(YESTERDAY, rows=0), YESTERDAY, DriftOptions())
    assert first.large
    assert math.isinf(first.change)


def test_the_stability_index_is_the_textbooks():
    p, q = {"a": 0.6, "b": 0.4}, {"a": 0.5, "b": 0.5}
    assert stability(p, q) == pytest.approx(-0.1 * math.log(0.5 / 0.6) + 0.1 * math.log(0.5 / 0.4))
    assert stability(p, p) == 0


def test_limits_are_checked():
    with pytest.raises(UserError, match=re.escape("drift.psi=-1: must not be negative")):
        DriftOptions(psi=-1)


def test_the_page_says_what_changed_and_why_nothing_was_published():
    found = changes(YESTERDAY, dataclasses.replace(YESTERDAY, label_rate=0.2), DriftOptions())
    night = {
        "date": "2026-01-05",
        "run": "runs/5",
        "dataset": "datasets/5",
        "published": False,
        "outcome": "kept 2026-01-04: AUC 0.4000, at least 0.5 wanted",
        "metrics": {"test": {"auc": 0.4, "logloss": None}},
        "metrics_published": {"auc": 0.6},
        "difference": {"difference": -0.2, "low": -0.3, "high": -0.1},
        "gate": [{"name": "AUC", "measured": 0.4, "threshold": "at least 0.5", "holds": False}],
        "drift": {"against": "2026-01-04", "changes": [vars(c) | {"large": c.large} for c in found]},
        "day": dataclasses.asdict(YESTERDAY),
        "counts": {"users": 10},
    }
    before = [{"date": "2026-01-04", "metrics": {"test": {"auc": 0.6}}, "outcome": "published", "counts": {"users": 9}}]
    report = report_of_night(night, before)
    assert report.headline[0] == ("Outcome", "kept", "AUC 0.4000, at least 0.5 wanted")
    assert report.headline[1] == ("AUC on the day", "0.4000", "published model 0.6000")
    of = {section.title: section for section in report.sections}
    assert of["Drift"].says == "Against 2026-01-04: large changes of share of likes."
    assert [row[-1] for row in of["Drift"].tables[0].rows].count("LARGE") == 1
    assert of["The gate"].tables[0].rows == [["AUC", "0.4000", "at least 0.5", "NO"]]
    assert of["The dataset"].tables[0].rows == [["users", "10", "9"]]
    assert len(of["The last weeks"].tables[0].rows) == 2
