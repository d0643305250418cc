"""What an experiment leaves: table.md, report.html (one file, no scripts, no network), figures/*.svg and *.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from cdr_dist.evaluation import experiment_plots as plots
from cdr_dist.evaluation.experiment_tables import (
    Findings,
    Row,
    Tables,
    as_markdown,
    begun,
    cells,
    columns,
    failures,
    notes,
    paper_cells,
    paper_columns,
    paper_header,
    paper_rows,
    shown,
    tables_of,
    verdict,
)

TEMPLATE = "experiment.html.j2"


@dataclass(frozen=True)
class Drawing:
    """A figure of the report."""

    name: str
    caption: str
    svg: bytes
    png: bytes


def write_report(found: Findings, out: Path) -> str:
    """Writes everything into `out`; the text of table.md."""
    tables = tables_of(found)
    text = as_markdown(found, tables)
    drawings = {data: _drawings(found, data, models) for data, models in tables.items()}
    if (figure := plots.tuned(found)) is not None:
        caption = "How much of every block is the fine-tuned copy's, mean over test users and seeds"
        drawings[next(reversed(tables))].append(_drawing("tuned", caption, figure))
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for drawing in (d for of in drawings.values() for d in of):
        (out / "figures" / f"{drawing.name}.svg").write_bytes(drawing.svg)
        (out / "figures" / f"{drawing.name}.png").write_bytes(drawing.png)
    (out / "table.md").write_text(text + "\n")
    (out / "report.html").write_text(as_html(found, tables, drawings))
    return text


def as_html(found: Findings, tables: Tables, drawings: Mapping[str, Sequence[Drawing]]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files("cdr_dist.evaluation").joinpath(TEMPLATE).read_text()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        found=found,
        sections=[_section(found, data, models) for data, models in tables.items()],
        drawings={
            data: [{"caption": d.caption, "svg": Markup(plots.inline(d.svg))} for d in of]  # our own, of matplotlib
            for data, of in drawings.items()
        },
        notes=notes(found),
        failed=failures(found),
        columns=columns(found),
        paper_columns=paper_columns(found) if found.paper else [],
        paper_header=paper_header(found) if found.paper else [],
        others={scenario: paper_rows(found, scenario) for scenario in found.others},
        seeds=sorted({run.seed for run in found.runs}),
        methods=list(dict.fromkeys(run.method for run in found.runs)),
        models=list(dict.fromkeys(run.model for run in found.runs)),
    )


def _section(found: Findings, data: str, models: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    tables = []
    for model, rows in models.items():
        best = max((row.mean for row in rows if row.method), default=None)
        lines = [
            {
                "name": row.name,
                "seeds": row.seeds,
                "cells": cells(found, row),
                "paper": paper_cells(found, row) if found.paper else [],
                "best": row.method is not None and row.mean == best,
                "colour": plots.colour(found, row.name),
            }
            for row in rows
        ]
        tables.append({"model": model, "rows": lines, "verdict": verdict(found, rows)})
    return {"data": data, "scenario": found.scenarios.get(data, ""), "tables": tables, "begun": begun(found, data)}


def _drawings(found: Findings, data: str, models: Mapping[str, Sequence[Row]]) -> list[Drawing]:
    drawn = []
    if found.curve:
        caption = f"Test {shown(found.main)} over {found.curve}, mean and standard deviation over seeds"
        drawn.append(_drawing(f"{data}-curve", caption, plots.curve(found, models)))
    drawn.append(_drawing(f"{data}-auc", f"Test {shown(found.main)} of every method", plots.bars(found, models)))
    for model in models:
        if (figure := plots.learning(found, data, model)) is not None:
            caption = f"Validation {shown(found.learning_curve)} over epochs, {model}: mean over seeds"
            drawn.append(_drawing(f"{data}-{model}-learning", caption, figure))
        runs = [run for run in found.runs if run.labels == (data, model, found.highlighted) and run.summary is not None]
        figure = plots.weights(found, runs, found.categories.get(data, {}))
        if figure is not None:
            caption = f"What {found.highlighted} makes of the source's categories, {model}: mean over {len(runs)} seeds"
            drawn.append(_drawing(f"{data}-{model}-weights", caption, figure))
        figure = plots.lengths(found, runs)
        if figure is not None:
            caption = f"What {found.highlighted} makes of history lengths, {model}: mean over {len(runs)} seeds"
            drawn.append(_drawing(f"{data}-{model}-lengths", caption, figure))
    return drawn


def _drawing(name: str, caption: str, figure: Any) -> Drawing:
    return Drawing(name, caption, plots.as_bytes(figure, "svg"), plots.as_bytes(figure, "png"))
