"""An audit's answer to read: as Markdown and as one page of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cdr_dist.evaluation.table import markdown
from cdr_dist.evaluation.verdict import Table


@dataclass(frozen=True)
class Answer:
    transfer: bool
    sentence: str
    tables: Sequence[Table]
    notes: str
    command: str

    def markdown(self) -> str:
        parts = ["# Should I transfer?", self.sentence]
        for table in self.tables:
            parts += [f"## {table.title}", markdown(table.header, table.rows, table.left)]
        return "\n\n".join([*parts, self.notes, f"`{self.command}`"]) + "\n"

    def html(self) -> str:
        """Self-contained; nothing in it is taken from elsewhere."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        pages = Environment(
            loader=PackageLoader("cdr_dist.evaluation", "."), autoescape=True, undefined=StrictUndefined
        )
        return pages.get_template("audit.html.j2").render(answer=self)
