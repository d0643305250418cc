"""A report as one HTML page that needs nothing besides itself: no scripts, no other files, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Table:
    """Cells are text. The first `left` columns stand to the left, the others, numbers, to the right."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    folded: bool = False
    """Shown only where somebody opens it."""


@dataclass(frozen=True)
class Chart:
    """`svg` as evaluation.charts draws it, which escapes its texts; `says`: what one should see in it."""

    title: str
    svg: str
    says: str
    tall: bool = False

    @property
    def markup(self) -> Markup:
        """The svg, which screen readers take as one picture with a name."""
        start = Markup('<svg role="img" aria-label="{}"').format(f"{self.title}. {self.says}")
        return start + Markup(self.svg.removeprefix("<svg"))


@dataclass(frozen=True)
class Section:
    title: str
    says: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """headline: (name, value, note) of the few numbers that count. folded: title -> text shown where it is opened."""

    title: str
    subtitle: str
    headline: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    folded: dict[str, str] = field(default_factory=dict)


def page(report: Report) -> str:
    """The HTML; all texts are escaped."""
    pages = Environment(
        loader=PackageLoader("cdr_dist", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(TEMPLATE).render(report=report)
