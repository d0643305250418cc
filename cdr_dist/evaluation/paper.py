"""The BIAO paper's figures (configs/paper/biao.yaml), to stand beside ours where the data have the same domains."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.significance import relative_improvement

Figures = dict[str, dict[str, float]]
"""Model -> method -> AUC."""


@dataclass(frozen=True)
class Paper:
    """One table of it. Scenarios are named source_target, as books_toys."""

    name: str
    scenarios: dict[str, Figures]
    single: Figures
    """Scenario -> model -> the single-domain AUC that its RelaImpr refers to."""
    domains: dict[str, list[str]]
    """The paper's name of a domain -> names it goes by."""

    def scenario(self, source: str, target: str) -> str:
        """The scenario of two domains of a manifest; '' where the paper has none."""
        found = f"{self._domain(source)}_{self._domain(target)}"
        return found if found in self.scenarios else ""

    def auc(self, scenario: str, model: str, method: str) -> float | None:
        if scenario not in self.scenarios:
            return None
        single = {"target_only": self.single[scenario][model]} if model in self.single.get(scenario, {}) else {}
        return (single | self.scenarios[scenario].get(model, {})).get(method)

    def improvement(self, scenario: str, model: str, method: str) -> float | None:
        """RelaImpr in percent, from the AUCs that are printed."""
        own, base = self.auc(scenario, model, method), self.single.get(scenario, {}).get(model)
        return None if own is None or base is None else relative_improvement(own, base)

    def checked(self, scenario: str) -> str:
        if scenario not in self.scenarios:
            raise UserError(f"paper={scenario}: {self.name} has none such; {nearest(scenario, list(self.scenarios))}")
        return scenario

    def _domain(self, name: str) -> str:
        plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        return next((ours for ours, others in self.domains.items() if plain == ours or plain in others), plain)


def load_paper(path: Path, table: str) -> Paper:
    """UserError: no such table."""
    raw: dict[str, Any] = yaml.safe_load(path.read_text())
    if table not in raw["tables"]:
        raise UserError(f"paper: {table}: {path} has none such; {nearest(table, list(raw['tables']))}")
    single: Figures = {}
    for of in raw["tables"].values():
        for scenario, models in of.items():
            for model, methods in models.items():
                if "target_only" in methods:
                    single.setdefault(scenario, {})[model] = methods["target_only"]
    return Paper(f"{table} of the paper", raw["tables"][table], single, raw["domains"])
