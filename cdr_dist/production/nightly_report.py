"""A night as a page: what came of it and why, both models on the day, how the day differs, the last weeks."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cdr_dist.evaluation.charts import BLUE, ORANGE, Curve, curves
from cdr_dist.evaluation.report import Chart, Report, Section, Table
from cdr_dist.production.gate import number

SHOWN = 30
"""Nights before this one in the curves."""
LARGEST = 15
"""Categories in the table."""
METRICS = (("auc", "AUC"), ("gauc", "AUC within users"), ("logloss", "log loss"))


def report_of_night(night: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> Report:
    """night, before: what night.json says of this one and of earlier ones, ascending by date."""
    new, old = night["metrics"]["test"], night.get("metrics_published") or {}
    difference = night.get("difference")
    headline = [("Outcome", "published" if night["published"] else "kept", _why(night))]
    headline.append(("AUC on the day", number(new.get("auc")), f"published model {number(old.get('auc'))}"))
    if difference:
        note = f"{difference['low']:+.4f} to {difference['high']:+.4f}, 95% over users"
        headline.append(("Difference", f"{difference['difference']:+.4f}", note))
    lists = night.get("recommendations")
    if lists:
        note = f"{lists['coverage']:.1%} of {lists['items']:,} items are in some list"
        headline.append(("Recommendations", f"{lists['users']:,} users", note))
    sections = [_gate(night), _models(new, old), _drift(night), _weeks([*before[-SHOWN:], night]), _data(night, before)]
    return Report(
        title=f"Night of {night['date']}",
        subtitle=f"Run: {night['run']}. Dataset: {night['dataset']}."
        + (f" Against the published model of {night['against']['date']}." if night.get("against") else ""),
        headline=headline,
        sections=[section for section in sections if section is not None],
        folded={"night.json": json.dumps({k: v for k, v in night.items() if k != "day"}, indent=1)},
    )


def _why(night: Mapping[str, Any]) -> str:
    outcome = str(night["outcome"])
    return "every threshold is met" if night["published"] else outcome.partition(": ")[2] or outcome


def _gate(night: Mapping[str, Any]) -> Section:
    rows = [[c["name"], number(c["measured"]), c["threshold"], "yes" if c["holds"] else "NO"] for c in night["gate"]]
    table = Table("What the new model is measured against", ["threshold", "measured", "wanted", "holds"], rows)
    return Section("The gate", tables=[table])


def _models(new: Mapping[str, Any], old: Mapping[str, Any]) -> Section:
    rows = [[text, number(new.get(name)), number(old.get(name))] for name, text in METRICS]
    return Section("Both models on the day's rows", tables=[Table("", ["metric", "new", "published"], rows)])


def _drift(night: Mapping[str, Any]) -> Section | None:
    drift, day = night.get("drift"), night.get("day")
    if not day:
        return None
    tables = []
    says = "This is the first night: there is nothing to compare it with."
    if drift:
        large = [c["of"] for c in drift["changes"] if c["large"]]
        says = f"Against {drift['against']}: " + (
            f"large changes of {', '.join(large)}." if large else "no large change."
        )
        rows = [
            [c["of"], *_values(c), number(c["change"]), f"{c['limit']:g}", "LARGE" if c["large"] else ""]
            for c in drift["changes"]
        ]
        header = ["measure", drift["against"], night["date"], "change", "large from", ""]
        tables.append(Table("The day's own rows", header, rows))
    largest = sorted(day["categories"].items(), key=lambda item: -item[1])[:LARGEST]
    shares = [[name, f"{share:.1%}"] for name, share in largest]
    tables.append(Table("Largest target categories of the day", ["category", "share"], shares, folded=True))
    return Section("Drift", says, tables=tables)


def _values(change: Mapping[str, Any]) -> list[str]:
    if change["of"].startswith("categories"):
        return ["", ""]
    return [number(change["before"]), number(change["now"])]


def _weeks(nights: Sequence[Mapping[str, Any]]) -> Section | None:
    measured = [n for n in nights if n.get("metrics") and n["metrics"]["test"].get("auc") is not None]
    if len(measured) < 2:
        return None
    first = datetime.date.fromisoformat(measured[0]["date"])
    drawn = []
    for text, colour, of in (
        ("new model", BLUE, lambda n: n["metrics"]["test"]),
        ("published model", ORANGE, lambda n: n.get("metrics_published") or {}),
    ):
        points = [
            ((datetime.date.fromisoformat(n["date"]) - first).days, of(n)["auc"])
            for n in measured
            if of(n).get("auc") is not None
        ]
        if points:
            drawn.append(Curve(text, [float(x) for x, _ in points], [y for _, y in points], colour))
    says = f"Test AUC of each night on its own day, days since {first}."
    svg = curves("auc-by-night", drawn, "test AUC", x="days")
    rows = [[n["date"], number(n["metrics"]["test"]["auc"]), str(n.get("outcome", ""))] for n in reversed(measured)]
    table = Table("The nights", ["date", "AUC", "outcome"], rows, folded=True)
    return Section("The last weeks", charts=[Chart("AUC by night", svg, says)], tables=[table])


def _data(night: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> Section:
    earlier: Mapping[str, int] = next((n["counts"] for n in reversed(before) if n.get("counts")), {})
    rows = [[name.replace("_", " "), f"{n:,}", _count(earlier.get(name))] for name, n in night["counts"].items()]
    return Section("The dataset", tables=[Table("", ["", night["date"], "the night before"], rows, folded=True)])


def _count(value: Any) -> str:
    return "" if value is None else f"{value:,}"
