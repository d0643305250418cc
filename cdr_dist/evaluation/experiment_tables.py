"""The tables of an experiment: for each dataset models x methods, beside the paper's figures where there are any."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from cdr_dist.data import storage
from cdr_dist.evaluation.paper import Paper
from cdr_dist.evaluation.significance import PairedDifference, paired_bootstrap
from cdr_dist.evaluation.table import Method, markdown, summarise

Labels = tuple[str, str, str]
"""Data, model, method."""


@dataclass(frozen=True)
class Run:
    """One run as the report needs it. summary None: it failed, for the reason given."""

    data: str
    model: str
    method: str
    seed: int
    summary: Mapping[str, Any] | None
    failure: str = ""
    scores: str = ""
    """Parquet with user, label and score of every row of the test split; '' where there is none."""
    weights: str = ""
    """Parquet with category, behaviours and weight; '' where there is none."""
    lengths: str = ""
    """Parquet with difference (of history lengths, source minus target), behaviours and weight."""
    validations: Sequence[Mapping[str, float]] = ()
    """The metrics of every validation, in order."""

    @property
    def labels(self) -> Labels:
        return self.data, self.model, self.method

    def __str__(self) -> str:
        return f"{' / '.join(self.labels)} / seed {self.seed}"


@dataclass(frozen=True)
class Findings:
    """Everything that an experiment found."""

    name: str
    runs: Sequence[Run]
    title: str = ""
    metrics: Sequence[str] = ("auc", "logloss")
    """The tables' columns; figures and comparisons are of the first."""
    beginnings: Sequence[str] = ()
    """Methods that others start from: they have no row."""
    single: str = "target_only"
    against: str = "joint"
    highlighted: str = "biao"
    """The method that figures bring out, and whose weights are drawn."""
    curve: str = ""
    points: Mapping[str, float] = field(default_factory=dict)
    """With `curve`, the option's name: method -> its value; other methods are dotted lines."""
    learning_curve: str = ""
    """The validation metric that is drawn over validations; '': none is."""
    paper: Paper | None = None
    scenarios: Mapping[str, str] = field(default_factory=dict)
    """Data -> the paper's scenario of the same domains."""
    others: Sequence[str] = ()
    """Scenarios of the paper that are listed though nothing ran on such data."""
    chosen: Mapping[Labels, str] = field(default_factory=dict)
    """What a search chose, in words."""
    searched: str = ""
    """How it was chosen."""
    categories: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """Data -> names of the source's categories."""
    command: str = ""

    @property
    def main(self) -> str:
        return self.metrics[0]

    @property
    def rows(self) -> list[Run]:
        """The runs that the tables are about."""
        return [run for run in self.runs if run.method not in self.beginnings]


@dataclass(frozen=True)
class Row:
    """A method on one dataset with one model. method None: none of its runs came through."""

    name: str
    planned: int
    method: Method | None
    bootstrap: PairedDifference | None
    paper: Mapping[str, float]
    """The paper's metrics."""
    paper_improvement: float | None
    seconds: float
    main: str = "auc"

    @property
    def seeds(self) -> str:
        done = len(self.method.seeds) if self.method else 0
        return str(done) if done == self.planned else f"{done} of {self.planned}"

    @property
    def mean(self) -> float:
        """Of the metric that methods are compared by."""
        return self.method.mean(self.main) if self.method else math.nan


Tables = dict[str, dict[str, list[Row]]]
"""Data -> model -> rows."""


def tables_of(found: Findings) -> Tables:
    planned: dict[Labels, list[Run]] = {}
    for run in found.rows:
        planned.setdefault(run.labels, []).append(run)
    methods = {(m.data, m.model, m.recipe): m for m in _methods(found)}
    tables: Tables = {}
    for labels, runs in planned.items():
        data, model, name = labels
        scenario = found.scenarios.get(data, "")
        finished = [run for run in runs if run.summary is not None]
        row = Row(
            name,
            len(runs),
            methods.get(labels),
            _bootstrap(finished, planned.get((data, model, found.against), []))
            if name != found.against and found.main == "auc"
            else None,
            found.paper.metrics_of(scenario, model, name) if found.paper else {},
            found.paper.improvement(scenario, model, name) if found.paper else None,
            float(np.mean([run.summary["throughput"]["train_s"] or 0.0 for run in finished if run.summary] or [0.0])),
            found.main,
        )
        tables.setdefault(data, {}).setdefault(model, []).append(row)
    return tables


def _methods(found: Findings) -> list[Method]:
    summaries = [
        dict(run.summary) | {"data": {"name": run.data}, "model": run.model, "recipe": run.method, "seed": run.seed}
        for run in found.rows
        if run.summary is not None
    ]
    against = found.against if any(s["recipe"] == found.against for s in summaries) else None
    return summarise(summaries, metrics=found.metrics, single=found.single, against=against)


def _bootstrap(runs: Sequence[Run], against: Sequence[Run]) -> PairedDifference | None:
    """Over users and the seeds that both have."""
    mine = {run.seed: run.scores for run in runs if run.scores}
    theirs = {run.seed: run.scores for run in against if run.summary is not None and run.scores}
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return None
    a, b = ([_scores(of[seed]) for seed in both] for of in (mine, theirs))
    score_a, score_b = (np.stack([frame["score"].to_numpy() for frame in frames]) for frames in (a, b))
    return paired_bootstrap(b[0]["user"].to_numpy(), b[0]["label"].to_numpy(), score_a, score_b)


def _scores(uri: str) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(storage.read_bytes(uri)), columns=["user", "label", "score"])


def as_markdown(found: Findings, tables: Tables) -> str:
    """table.md: a table for each dataset, what a search chose, what failed."""
    parts = [f"# {found.name}" + (f": {found.title}" if found.title else "")]
    for data, models in tables.items():
        beside = found.scenarios.get(data, "")
        parts.append(f"## {data}" + (f" (paper: {beside})" if beside else ""))
        parts.append(_table(found, models, bool(beside)))
        seconds = [f"{model} {row.name} {row.seconds:.1f}" for model, rows in models.items() for row in rows]
        parts.append("Training seconds (mean): " + ", ".join(seconds))
        parts += begun(found, data)
    parts.append(notes(found))
    if found.chosen:
        parts.append(f"## Chosen on validation\n\n{found.searched}")
        rows = [[*labels, words] for labels, words in found.chosen.items()]
        parts.append(markdown(["data", "model", "method", "words"], rows, left=4))
    for scenario in found.others:
        parts.append(f"## Paper, other data: {scenario}")
        parts.append(markdown(paper_header(found), paper_rows(found, scenario), left=2))
    if failed := failures(found):
        parts.append(f"## Failed: {len(failed)} of {len(found.runs)} runs")
        parts.append(markdown(["run", "why"], [[str(run), run.failure] for run in failed], left=2))
    return "\n\n".join(parts)


def _table(found: Findings, models: Mapping[str, Sequence[Row]], beside: bool) -> str:
    header = ["model", "method", "seeds", *columns(found), *(paper_columns(found) if beside else [])]
    lines = [
        [model, row.name, row.seeds, *cells(found, row), *(paper_cells(found, row) if beside else [])]
        for model, rows in models.items()
        for row in rows
    ]
    return markdown(header, lines, left=2)


def shown(metric: str) -> str:
    return "AUC" if metric == "auc" else metric


def columns(found: Findings) -> list[str]:
    """What `cells` are of. The bootstrap is of the stored rows' scores, so only AUC has one; others have the t-test's
    interval."""
    compared = [f"{shown(found.main)} - {found.against}", "p, seeds"]
    bootstrap = ["95% interval, users and seeds", "p, both"]
    return [
        *(f"test {shown(metric)}" for metric in found.metrics),
        *["RelaImpr"] * ("auc" in found.metrics),
        *compared,
        *(bootstrap if found.main == "auc" else ["95% interval, seeds"]),
    ]


def cells(found: Findings, row: Row) -> list[str]:
    """As `columns` says; '-' where there is none."""
    if row.method is None:
        return ["failed", *["-"] * (len(columns(found)) - 1)]
    test, boot = row.method.comparison, row.bootstrap
    improvement = _number(row.method.relative_improvement, "{:+.2f}%")
    return [
        *(_mean_sd(row.method, metric) for metric in found.metrics),
        *[improvement] * ("auc" in found.metrics),
        _number(test.difference if test else None, "{:+.4f}"),
        _p(test) + (f" (n={test.n})" if test and test.n != len(row.method.seeds) else ""),
        *([_interval(boot), _p(boot)] if found.main == "auc" else [_interval(test)]),
    ]


def paper_columns(found: Findings) -> list[str]:
    assert found.paper is not None
    metrics = found.paper.metrics
    return [f"paper {name}" for name in (*map(shown, metrics), *["RelaImpr"] * ("auc" in metrics))]


def paper_cells(found: Findings, row: Row) -> list[str]:
    assert found.paper is not None
    return _of_paper(found.paper, row.paper, row.paper_improvement)


def paper_header(found: Findings) -> list[str]:
    """Of `paper_rows`."""
    return ["model", "method", *(name.removeprefix("paper ") for name in paper_columns(found))]


def paper_rows(found: Findings, scenario: str) -> list[list[str]]:
    paper = found.paper
    assert paper is not None
    return [
        [model, method, *_of_paper(paper, paper.metrics_of(scenario, model, method), improvement)]
        for model, methods in paper.scenarios[scenario].items()
        for method in methods
        for improvement in [paper.improvement(scenario, model, method)]
    ]


def _of_paper(paper: Paper, values: Mapping[str, float], improvement: float | None) -> list[str]:
    numbers = [_number(values.get(metric), "{:.4f}") for metric in paper.metrics]
    return numbers + [_number(improvement, "{:+.2f}%")] * ("auc" in paper.metrics)


def begun(found: Findings, data: str) -> list[str]:
    """A line for each method that others start from: what its test metrics are."""
    lines = []
    for name in found.beginnings:
        runs = [run.summary for run in found.runs if (run.data, run.method) == (data, name) and run.summary]
        metrics = {m: [of["metrics"]["test"][m] for of in runs] for m in (runs[0]["metrics"]["test"] if runs else {})}
        values = ", ".join(f"test {shown(m)} {np.mean(of):.4f}" for m, of in metrics.items() if None not in of)
        lines.append(f"{name}, which others start from ({len(runs)} runs): {values}" if runs else f"{name}: no run")
    return lines


def failures(found: Findings) -> list[Run]:
    return [run for run in found.runs if run.summary is None]


def notes(found: Findings) -> str:
    """What the columns mean."""
    names = " and ".join(map(shown, found.metrics))
    text = f"Test {names}: mean ± standard deviation over seeds. "
    if "auc" in found.metrics:
        text += f"RelaImpr: of AUC - 0.5, against {found.single}. "
    text += f"p, seeds: paired t-test over seeds against {found.against}"
    if found.main == "auc":
        text += ". Interval and p, both: paired bootstrap over users and seeds. "
    else:
        text += f", of {shown(found.main)}; the interval is that test's: other users are not drawn. "
    text += "Every p stands for itself: none is corrected for the number of comparisons, nor for picking the highest."
    if found.paper and any(found.scenarios.values()):
        text += f" Paper: {found.paper.cited}, on their data, which are not these files."
    return text


def verdict(found: Findings, rows: Sequence[Row]) -> str:
    """One sentence on a dataset and model: what is best, and whether that is more than noise."""
    known = [row for row in rows if row.method]
    if not known:
        return "No run came through."
    best = max(known, key=lambda row: row.mean)
    start = f"{best.name} has the highest mean test {shown(found.main)}, {best.mean:.4f}"
    if best.name == found.against:
        return f"{start}; no other method is above it."
    base = next((row for row in known if row.name == found.against), None)
    if base is None:
        return f"{start}."
    difference = f"{start}, {best.mean - base.mean:+.4f} from {found.against}"
    test = best.bootstrap or (best.method.comparison if best.method else None)
    if test is None or math.isnan(test.low):
        return f"{difference}; too few runs to say whether that is more than noise."
    clear = "more than noise explains" if test.low > 0 or test.high < 0 else "within what noise explains"
    return f"{difference} ({clear}: 95% interval {test.low:+.4f} … {test.high:+.4f})."


def grid_table(runs: Sequence[Run], metric: str = "auc") -> str:
    """Every combination by its mean validation metric, each method's best first; test metrics are not looked at."""
    found: dict[Labels, list[float]] = {}
    for run in runs:
        if run.summary is not None:
            found.setdefault(run.labels, []).append(run.summary["metrics"]["valid"][metric])
    ranked = sorted(found, key=lambda of: (*of[:2], of[2].split("|")[0], -float(np.mean(found[of]))))
    rows = [
        [*of[:2], of[2].replace("|", " "), f"{np.mean(found[of]):.4f}", f"{np.std(found[of]):.4f}"] for of in ranked
    ]
    header = ["data", "model", "method and options", "mean", "sd"]
    text = f"Validation {shown(metric)}, mean over seeds:\n" + markdown(header, rows, 3)
    failed = [[str(run), run.failure] for run in runs if run.summary is None]
    return text + ("\n\nFailed:\n" + markdown(["run", "why"], failed, left=2) if failed else "")


def _mean_sd(method: Method, metric: str) -> str:
    mean, sd = method.mean(metric), method.sd(metric)
    return _number(mean, "{:.4f}") + ("" if math.isnan(sd) else f" ± {sd:.4f}")


def _interval(test: PairedDifference | None) -> str:
    return f"{test.low:+.4f} … {test.high:+.4f}" if test and not math.isnan(test.low) else "-"


def _p(test: PairedDifference | None) -> str:
    if test is None or math.isnan(test.p):
        return "-"
    return "<0.0001" if test.p < 0.0001 else f"{test.p:.4f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or math.isnan(value) else form.format(value)
