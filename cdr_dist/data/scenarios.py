"""The scenarios of BIAO's paper, configs/scenario/NAME.yaml: prepare's options, and the paper's counts (Table 4).

In the options `${raw}` stands for the folder of the downloads, local or a URI.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cdr_dist.errors import UserError, nearest

SCENARIOS = Path(__file__).resolve().parents[2] / "configs" / "scenario"
RAW = "${raw}"
COUNTS = ("users", "source_items", "source_behaviours", "target_items", "target_behaviours")
"""As `Manifest.counts` names them."""


def names() -> list[str]:
    return sorted(path.stem for path in SCENARIOS.glob("*.yaml"))


def words_of(name: str, raw: str) -> list[str]:
    """The words of jobs/prepare.py, all but `out=`. UserError: an unknown scenario, or no folder."""
    if not raw:
        raise UserError(f"scenario {name}: give the folder of the downloads")
    options = {option: value for option, value in _read(name).items() if option != "paper"}
    return [f"{option}={str(value).replace(RAW, raw.rstrip('/') or '/')}" for option, value in options.items()]


def paper_counts(name: str) -> dict[str, int]:
    """Table 4's counts of a scenario, by the names of `Manifest.counts`. UserError: an unknown scenario."""
    paper = _read(name)["paper"]
    return {count: paper[count] for count in COUNTS}


def beside_paper(counts: Mapping[str, int], paper: Mapping[str, int]) -> str:
    """A line for each count of the paper: ours, the paper's, and by how much ours is more or less."""
    lines = [f"{'':20}{'here':>12}{'paper':>12}"]
    for name, wanted in paper.items():
        ours = counts[name]
        off = "" if ours == wanted else f"  {ours - wanted:+,} ({ours / wanted - 1:+.1%})"
        lines.append(f"{name.replace('_', ' '):20}{ours:>12,}{wanted:>12,}{off}")
    return "\n".join(lines)


def _read(name: str) -> dict[str, Any]:
    known = names()
    if name not in known:
        raise UserError(f"scenario {name}: {nearest(name, known)}")
    return yaml.safe_load((SCENARIOS / f"{name}.yaml").read_text())
