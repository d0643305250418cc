"""Figures of papers (configs/paper/), to stand beside ours where the data have the same domains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.significance import relative_improvement

Figures = dict[str, dict[str, list[float]]]
"""Model -> method -> a value for each metric."""


@dataclass(frozen=True)
class Paper:
    """One table of it. Scenarios are named source_target, as books_toys, or as both are where they are called alike."""

    name: str
    cited: str
    metrics: list[str]
    scenarios: dict[str, Figures]
    single: dict[str, dict[str, float]]
    """Scenario -> model -> the single-domain AUC that its RelaImpr refers to."""
    domains: dict[str, list[str]]
    """The paper's name of a domain -> names it goes by."""

    def scenario(self, source: str, target: str) -> str:
        """The scenario of two domains of a manifest; '' where the paper has none."""
        names = dict.fromkeys([self._domain(source), self._domain(target)])
        found = "_".join(names)
        return found if found in self.scenarios else ""

    def metrics_of(self, scenario: str, model: str, method: str) -> dict[str, float]:
        """Empty: it has none of the method."""
        values = self.scenarios.get(scenario, {}).get(model, {}).get(method)
        base = self.single.get(scenario, {}).get(model)
        if values is None and method == "target_only" and base is not None and scenario in self.scenarios:
            values = [base]
        return dict(zip(self.metrics, values, strict=True)) if values else {}

    def improvement(self, scenario: str, model: str, method: str) -> float | None:
        """RelaImpr in percent, from the AUCs that are printed."""
        own = self.metrics_of(scenario, model, method).get("auc")
        base = self.single.get(scenario, {}).get(model)
        return None if own is None or base is None else relative_improvement(own, base)

    def checked(self, scenario: str) -> str:
        if scenario not in self.scenarios:
            raise UserError(f"paper={scenario}: {self.name} has none such; {nearest(scenario, list(self.scenarios))}")
        return scenario

    def _domain(self, name: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        return next((ours for ours, others in self.domains.items() if plain == ours or plain in others), plain)


def load_paper(folder: Path, table: str) -> Paper:
    """table: FILE/TABLE, of a file of the folder. UserError: no such table."""
    file, _, name = table.rpartition("/")
    path = folder / f"{file}.yaml"
    if not path.exists():
        raise UserError(f"paper: {table}: write FILE/TABLE, with a file of {folder}")
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    if name not in raw["tables"]:
        raise UserError(f"paper: {table}: {path} has none such; {nearest(name, list(raw['tables']))}")
    tables = {of: {s: _listed(models) for s, models in scenarios.items()} for of, scenarios in raw["tables"].items()}
    single: dict[str, dict[str, float]] = {}
    for scenarios in tables.values():
        for scenario, models in scenarios.items():
            for model, methods in models.items():
                if "target_only" in methods:
                    single.setdefault(scenario, {})[model] = methods["target_only"][0]
    metrics = raw["metrics"].get(name, raw["metrics"]["default"])
    return Paper(f"{name} of the paper", raw["cited"], metrics, tables[name], single, raw["domains"])


def _listed(models: dict[str, dict[str, Any]]) -> Figures:
    return {m: {of: v if isinstance(v, list) else [v] for of, v in methods.items()} for m, methods in models.items()}
