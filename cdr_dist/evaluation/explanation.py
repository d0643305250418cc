"""One user's source behaviours with what the perceptron finds in them, beside both histories: as text, as HTML.

Keys in, nothing else: what is shown here is found in `training/explain.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

from cdr_dist.evaluation.table import markdown

LEFT_OUT = "left out"
_BAR = 20


@dataclass(frozen=True)
class Behaviour:
    """A source behaviour. global_part, local_part: gamma_1 and gamma_2, None where the run leaves that part out."""

    item: str
    category: str
    label: float
    timestamp: int
    global_part: float | None
    local_part: float | None
    score: float
    weight: float

    @property
    def time(self) -> str:
        """A date where the number can only be seconds, else the number: logs may count as they like."""
        if 300_000_000 <= self.timestamp < 5_000_000_000:  # 1979 to 2128
            return datetime.fromtimestamp(self.timestamp, UTC).strftime("%Y-%m-%d")
        return str(self.timestamp)


@dataclass(frozen=True)
class Explanation:
    """histories: of "source" and "target", (item, category) from oldest to newest; typical: the relative weight of a
    behaviour like the mean one; about: what weights are relative to, in words."""

    user: str
    run: str
    step: int
    domains: Mapping[str, str]
    behaviours: Sequence[Behaviour]
    histories: Mapping[str, Sequence[tuple[str, str]]]
    typical: float
    about: str

    @property
    def by_weight(self) -> list[Behaviour]:
        return sorted(self.behaviours, key=lambda b: -b.weight)

    @property
    def scale(self) -> float:
        """The weight of a full bar."""
        return max([self.typical, *(b.weight for b in self.behaviours)]) or 1.0

    @cached_property
    def shared(self) -> dict[str, int]:
        """Categories that stand in more than one of the three lists, each with a hue (degrees) of its own."""
        lists = [{b.category for b in self.behaviours}, *({c for _, c in of} for of in self.histories.values())]
        count = Counter(category for of in lists for category in of)
        ordered = sorted(category for category, n in count.items() if n > 1)
        return {category: round(360 * i / len(ordered)) for i, category in enumerate(ordered)}


def as_text(found: Explanation) -> str:
    """Tables for a terminal; * marks categories that stand in more than one of the three lists."""

    def named(category: str) -> str:
        return category + (" *" if category in found.shared else "")

    header = ["source behaviour", "category", "label", "time", "global part", "local part", "score", "weight", ""]
    rows = [
        [b.item, named(b.category), f"{b.label:g}", b.time, part(b.global_part), part(b.local_part)]
        + [f"{b.score:+.4f}", f"{b.weight:.3f}", ("#" * round(_BAR * b.weight / found.scale)).ljust(_BAR)]
        for b in found.by_weight
    ]
    pairs = zip_longest(*(found.histories[d] for d in ("source", "target")), fillvalue=("", ""))
    histories = [[cell for item, category in pair for cell in (item, named(category))] for pair in pairs]
    beside = [f"{d} history ({found.domains[d]})" for d in ("source", "target")]
    return "\n".join(
        [
            f"user {found.user}: {len(found.behaviours)} source behaviours ({found.domains['source']}), by weight",
            markdown(header, rows, left=2),
            "",
            "both histories, oldest to newest",
            markdown([beside[0], "category", beside[1], "category"], histories, left=4),
            "",
            "* a category that stands in more than one of the three lists",
            found.about,
        ]
    )


def as_html(found: Explanation) -> str:
    """One page that needs nothing else: no script, no file, no network. What comes from logs is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["part"] = part
    return environment.from_string((Path(__file__).parent / "explain.html.j2").read_text()).render(found=found)


def part(value: float | None) -> str:
    return LEFT_OUT if value is None else f"{value:+.4f}"
