"""Two finished runs side by side: metrics, what differs in their configuration, curves, weights, cost.

Importing this loads matplotlib.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from cdr_dist.configuration import differences
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.errors import UserError
from cdr_dist.evaluation.charts import BLUE, ORANGE, Curve, curves
from cdr_dist.evaluation.report import Chart, Report, Section, Table
from cdr_dist.evaluation.significance import PairedDifference, paired_bootstrap
from cdr_dist.evaluation.table import markdown
from cdr_dist.training.report import COUNTS, decimals, metric_name, series, size_of
from cdr_dist.training.run_folder import CONFIG, SCORES, WEIGHTS, RunFolder

MOST_CATEGORIES = 40
"""Of the weights' table: those that differ most."""


def compare(a: RunFolder, b: RunFolder) -> Report:
    """UserError: one of them is not finished, or damaged."""
    summaries = [_summary(place) for place in (a, b)]
    found = difference(a, b)
    return Report(
        title=" and ".join(f"{s['recipe']} seed {s['seed']}" for s in summaries),
        subtitle=f"a: {a.uri} · b: {b.uri}",
        headline=_headline(summaries, found),
        sections=[
            section
            for section in (
                _metrics(summaries, found),
                _configuration(a, b),
                _curves(a, b, summaries),
                _weights(a, b),
                _policies(summaries),
                _cost(summaries),
            )
            if section is not None
        ],
        folded={
            f"Configuration of {letter}": storage.read_bytes(place.file(CONFIG)).decode()
            for letter, place in (("a", a), ("b", b))
        },
    )


def text(report: Report) -> str:
    """The same for a terminal, without the curves."""
    parts = [f"# {report.title}\n\n{report.subtitle}"]
    for section in report.sections:
        if section.tables:
            parts.append(f"## {section.title}\n\n{section.says}".rstrip())
            parts += [markdown(table.header, table.rows, table.left) for table in section.tables]
    return "\n\n".join(parts)


def difference(a: RunFolder, b: RunFolder) -> PairedDifference | None:
    """Test AUC of b minus that of a, by a paired bootstrap over users; None: they were measured on other rows."""
    frames = []
    for place in (a, b):
        uri = place.file(SCORES)
        if not storage.exists(uri):
            return None
        frames.append(
            pl.read_parquet(io.BytesIO(storage.read_bytes(uri))).sort("example", "label", maintain_order=True)
        )
    rows = [frame.select("user", "example", "label") for frame in frames]
    if not rows[0].equals(rows[1]):
        return None
    user, label = (rows[0][name].to_numpy() for name in ("user", "label"))
    scores = [frame["score"].to_numpy().astype(np.float64) for frame in frames]
    return paired_bootstrap(user, label, scores[1], scores[0])


def _summary(place: RunFolder) -> dict[str, Any]:
    place.config()  # says it where there is no run at all
    found = place.summary()
    if found is None:
        raise UserError(f"{place.uri}: is not finished (no summary.json), so there is nothing to compare yet")
    return found


def _headline(summaries: Sequence[Mapping[str, Any]], found: PairedDifference | None) -> list[tuple[str, str, str]]:
    shown = []
    for letter, summary in zip("ab", summaries, strict=True):
        test = summary["metrics"]["test"]
        metric = "auc" if "auc" in test else summary["best"]["metric"]
        note = f"{summary['recipe']}, seed {summary['seed']}, {size_of(summary, 'test')}"
        shown.append((f"Test {metric_name(metric)} of {letter}", decimals(test[metric]), note))
    if found is not None:
        interval = f"95%, users: {found.low:+.4f} … {found.high:+.4f}"
        shown.append(("b - a", f"{found.difference:+.4f}", interval))
    return shown


def _metrics(summaries: Sequence[Mapping[str, Any]], found: PairedDifference | None) -> Section:
    kinds = ["auc" in summary["metrics"]["test"] for summary in summaries]
    if found is not None:
        says = (
            f"Test AUC of b is {found.difference:+.4f} from a's (95% over users {found.low:+.4f} … {found.high:+.4f}, "
            f"p {found.p:.3f}; one training each: another seed may differ by as much)."
        )
    elif not any(kinds):
        says = "Both predict the next source item: the smaller loss is the better one, on the same test sequences."
    elif not all(kinds):
        says = "One predicts the next source item, the other target items: there is no number that both have."
    else:
        says = "Measured on other test rows: the numbers stand beside each other, no more."
    rows = []
    splits = [(summary["metrics"][split], split) for split in ("valid", "test") for summary in summaries]
    names = dict.fromkeys(metric for values, _ in splits for metric in values if metric not in COUNTS)
    for metric in names:
        values = [of.get(metric) for of, _ in splits]
        gained = values[3] - values[2] if None not in values[2:] else None
        rows.append([metric_name(metric), *map(decimals, values), "–" if gained is None else f"{gained:+.4f}"])
    header = ["Metric", "Validation a", "Validation b", "Test a", "Test b", "b - a"]
    return Section("Result", says, tables=[Table("Metrics of the best checkpoints", header, rows)])


def _configuration(a: RunFolder, b: RunFolder) -> Section:
    rows = [_parted(line) for line in differences(a.config(), b.config(), ("run",))]
    if any(name == "recipe.name" for name, *_ in rows):  # what follows from it is a screen long
        rows = [row for row in rows if row[0] != "recipe.phases"]
    made_with = [json.loads(storage.read_bytes(place.file("versions.json"))) for place in (a, b)]
    for name in sorted(made_with[0].keys() | made_with[1].keys()):
        left, right = (of.get(name, "–") for of in made_with)
        if left != right:
            rows.append([f"version of {name}", left, right])
    if not rows:
        return Section("What differs", "Nothing: both have one configuration.")
    return Section("What differs", tables=[Table("Options", ["Option", "a", "b"], rows, left=3)])


def _parted(line: str) -> list[str]:
    """`key: a -> b` as three cells."""
    name, _, values = line.partition(": ")
    left, _, right = values.partition(" -> ")
    return [name, left, right]


def _curves(a: RunFolder, b: RunFolder, summaries: Sequence[Mapping[str, Any]]) -> Section | None:
    lines = [place.lines() for place in (a, b)]
    metric = summaries[0]["best"]["metric"]
    wanted = [("train", "target_loss", "Training loss of the target", "loss")]
    wanted += [("valid", "nll", "Pre-training: validation next-item loss", metric_name("nll"))]
    wanted += [
        ("valid", m, f"Validation {metric_name(m)}", metric_name(m))
        for m in dict.fromkeys(["auc", metric])
        if m != "nll"
    ]
    charts = []
    for split, value, title, axis in wanted:
        found = [series(of, split, value) for of in lines]
        drawn = [Curve(x, *of, c) for x, of, c in zip("ab", found, (BLUE, ORANGE), strict=True) if of[0]]
        if drawn:
            says = " ".join(f"{curve.label} ends at {curve.y[-1]:.4g}, step {curve.x[-1]:,}." for curve in drawn)
            charts.append(Chart(title, curves(f"compared-{value.replace('@', '-')}", drawn, axis), says))
    return Section("Training", charts=charts) if charts else None


def _weights(a: RunFolder, b: RunFolder) -> Section | None:
    """Mean weights of the source categories that both know by name, 1 being the mean over all behaviours."""
    found = [_by_name(place) for place in (a, b)]
    if found[0] is None or found[1] is None:
        return None
    both = found[0].join(found[1], on="key", suffix="_b").with_columns(gained=pl.col("weight_b") - pl.col("weight"))
    shown = both.sort(pl.col("gained").abs(), descending=True).head(MOST_CATEGORIES).sort("gained", descending=True)
    if shown.is_empty():
        return None
    rows = [
        [key, f"{n:,}", f"{x:.2f}", f"{y:.2f}", f"{y - x:+.2f}"]
        for key, n, x, y in shown.select("key", "behaviours", "weight", "weight_b").rows()
    ]
    some = f" The {MOST_CATEGORIES} of {both.height} that differ most." if both.height > MOST_CATEGORIES else ""
    says = f"1 is the mean over a run's source behaviours.{some}"
    table = Table("Mean weight of a source category", ["Category", "Behaviours of a", "a", "b", "b - a"], rows)
    return Section("Weights", says, tables=[table])


def _policies(summaries: Sequence[Mapping[str, Any]]) -> Section | None:
    """How much of each block is fine-tuned, where both have a policy and as many blocks."""
    found = [((s.get("policy") or {}).get("tuned_share") or {}).get("test") or [] for s in summaries]
    if not found[0] or len(found[0]) != len(found[1]):
        return None
    rows = [
        [f"Block {i}", f"{x:.3f}", f"{y:.3f}", f"{y - x:+.3f}"] for i, (x, y) in enumerate(zip(*found, strict=True), 1)
    ]
    says = "The mean share of the fine-tuned copy over the test rows."
    return Section("Policy", says, tables=[Table("What is fine-tuned", ["Block", "a", "b", "b - a"], rows)])


def _by_name(place: RunFolder) -> pl.DataFrame | None:
    """key, behaviours, weight. None: the run has no weights, or its dataset is gone."""
    if not storage.exists(place.file(WEIGHTS)):
        return None
    folder = place.config().data
    try:
        vocabulary = storage.join(folder, read_manifest(folder).vocab["source_category"].path)
        names = pl.read_parquet(io.BytesIO(storage.read_bytes(vocabulary)), columns=["id", "key"])
    except UserError:
        return None
    found = pl.read_parquet(io.BytesIO(storage.read_bytes(place.file(WEIGHTS))))
    mean = np.average(found["weight"], weights=found["behaviours"])
    named = found.join(names.with_columns(category=pl.col("id").cast(pl.Int64)), on="category")
    return named.select("key", "behaviours", pl.col("weight") / mean)


def _cost(summaries: Sequence[Mapping[str, Any]]) -> Section:
    def passes(summary: Mapping[str, Any]) -> str:
        return f"{sum(summary['backward_passes'].get(kind, 0) for kind in ('lower', 'head', 'upper')):,}"

    def speed(summary: Mapping[str, Any]) -> str:
        found = summary["throughput"]["examples_per_s"]
        return "–" if found is None else f"{found:,.0f}"

    facts = {
        "Workers": [f"{s['world_size']:,}" for s in summaries],
        "Steps": [f"{s['steps']:,}" for s in summaries],
        "Upper updates": [f"{s['upper_steps']:,}" for s in summaries],
        "Backward passes": [passes(s) for s in summaries],
        "Seconds of training": [f"{s['throughput']['train_s']:,.1f}" for s in summaries],
        "Examples a second": [speed(s) for s in summaries],
    }
    rows = [[name, *values] for name, values in facts.items()]
    return Section("Cost", tables=[Table("Work and time", ["What", "a", "b"], rows)])
