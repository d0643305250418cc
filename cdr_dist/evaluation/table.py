"""Runs collected into methods over seeds; tables as Markdown that also reads well on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.significance import PairedDifference, paired_t, relative_improvement

NOT_SHOWN = ("rows", "gauc_users")
"""Metrics that are counts, shown only where they are asked for."""


@dataclass(frozen=True)
class Method:
    """What the runs of one method came to; `values` and `seeds` are in the same order."""

    data: str
    model: str
    recipe: str
    seeds: list[int]
    values: dict[str, list[float]]  # metric -> a value for each seed
    relative_improvement: float  # percent, of the mean AUC; NaN without a single-domain method
    comparison: PairedDifference | None  # with `against`, on the first metric; None for `against` itself

    def mean(self, metric: str) -> float:
        return float(np.mean(self.values[metric]))

    def sd(self, metric: str) -> float:
        """Standard deviation over seeds (n - 1); NaN with one seed."""
        return float(np.std(self.values[metric], ddof=1)) if len(self.seeds) > 1 else math.nan


def summarise(
    summaries: Sequence[Mapping[str, Any]],
    split: str = "test",
    metrics: Sequence[str] | None = None,
    single: str = "target_only",
    against: str | None = None,
) -> list[Method]:
    """Collects runs (`summary.json`, as read) into methods, in order of first appearance.

    metrics: default all numbers but counts. single: the recipe that RelaImpr refers to. against: the recipe
    that the others are compared with, by a paired t-test of the first metric over the seeds that both have. Both
    are looked up within the same data and model. UserError: a method has a seed twice, a run has no metrics of
    the split, no run has the metric or the recipe.
    """
    runs: dict[tuple[str, str, str], dict[int, Mapping[str, float]]] = {}
    for summary in summaries:
        data = summary.get("data")
        key = (str(data["name"]) if data else "", str(summary["model"]), str(summary["recipe"]))
        name, seed = " ".join([*filter(None, key), f"seed {summary['seed']}"]), int(summary["seed"])
        if split not in summary["metrics"]:
            raise UserError(f"{name}: no metrics of split '{split}'; {nearest(split, list(summary['metrics']))}")
        if seed in runs.setdefault(key, {}):
            raise UserError(f"{name}: given twice; a method needs one run per seed, or another name")
        runs[key][seed] = summary["metrics"][split]

    found = [item for by_seed in runs.values() for run in by_seed.values() for item in run.items()]
    known = list(dict.fromkeys(name for name, value in found if value is None or isinstance(value, int | float)))
    columns = [m for m in known if m not in NOT_SHOWN] if metrics is None else list(metrics)
    recipes = list(dict.fromkeys(recipe for _, _, recipe in runs))
    for metric in columns:
        if runs and metric not in known:
            raise UserError(f"no run has a metric '{metric}'; {nearest(metric, known)}")
    if runs and against is not None and against not in recipes:
        raise UserError(f"no run of recipe '{against}' to compare with; {nearest(against, recipes)}")

    def value(key: tuple[str, str, str], seed: int, metric: str) -> float:
        number = runs[key][seed].get(metric)
        return math.nan if number is None else float(number)  # JSON may hold NaN as null

    def improvement(key: tuple[str, str, str]) -> float:
        reference = (*key[:2], single)
        if reference not in runs:
            return math.nan
        own, base = (np.mean([value(k, seed, "auc") for seed in runs[k]]) for k in (key, reference))
        return relative_improvement(float(own), float(base))

    def comparison(key: tuple[str, str, str]) -> PairedDifference | None:
        reference = (*key[:2], against)
        if against is None or key == reference or reference not in runs or not columns:
            return None
        both = sorted(runs[key].keys() & runs[reference].keys())
        return paired_t(*([value(k, seed, columns[0]) for seed in both] for k in (key, reference)))

    return [
        Method(
            *key,
            seeds=sorted(by_seed),
            values={metric: [value(key, seed, metric) for seed in sorted(by_seed)] for metric in columns},
            relative_improvement=improvement(key),
            comparison=comparison(key),
        )
        for key, by_seed in runs.items()
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, also aligned as plain text: the first `left` columns to the left, the others right."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]

    def text(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return " | ".join(cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in pairs)

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join(f"| {text(line)} |" for line in (lines[0], rule, *lines[1:]))
