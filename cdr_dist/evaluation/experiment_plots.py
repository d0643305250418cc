"""Figures of an experiment, as SVG and PNG: bars with a dot a seed, a curve over an option, weights of categories; of
fine-tuning, learning curves and what a policy tunes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from cdr_dist.data import storage
from cdr_dist.evaluation.experiment_tables import Findings, Row, Run, shown

INK, FAINT, RULE = "#1c2733", "#6b7785", "#dfe4ea"
SINGLE, AGAINST, HIGHLIGHTED, OTHER = "#c3ccd6", "#7d8b9b", "#0b7a75", "#8db4c8"
MODELS = ("#0b7a75", "#c2571a", "#3f5fa8", "#8a4f9e")
LINES = (*MODELS, "#b59a1d", "#5b6b2f", "#a63a2b", "#3a8fb7", "#7d8b9b", "#c86b9c", "#4b3f72")
HIGHEST, LOWEST, FEWEST = 10, 5, 5
"""Categories shown from either end, and the behaviours one needs on average to be shown."""
LENGTH_GROUPS = 10


def bars(found: Findings, models: Mapping[str, Sequence[Row]]) -> Any:
    """The mean of each method as a bar, of AUC from chance (0.5); a dot for each seed, the paper's as a diamond."""
    floor = 0.5 if found.main == "auc" else 0.0
    heights = [len(rows) for rows in models.values()]
    figure = _figure(7.6, 0.55 + sum(0.34 * n + 0.62 for n in heights))
    panels = np.atleast_1d(figure.subplots(len(models), 1, sharex=True, height_ratios=[n + 0.6 for n in heights]))
    every = [v for rows in models.values() for row in rows for v in _values(row)]
    every += [row.paper[found.main] for rows in models.values() for row in rows if found.main in row.paper]
    low, high = min([floor, *every]), max([floor + 0.01, *every])
    for axes, (model, rows) in zip(panels, models.items(), strict=True):
        for i, row in enumerate(rows):
            values = _values(row)
            axes.text(-0.015, i, row.name, transform=axes.get_yaxis_transform(), **_text("right"))
            if values:
                bold = "bold" if row.name == found.highlighted else "normal"
                axes.barh(i, np.mean(values) - floor, left=floor, height=0.66, color=colour(found, row.name))
                spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
                axes.scatter(values, i + np.array(spread), s=9, color=INK, alpha=0.75, linewidths=0, zorder=3)
                mean = f"{np.mean(values):.4f}"
                axes.text(1.01, i, mean, transform=axes.get_yaxis_transform(), weight=bold, **_text("left"))
            else:
                axes.text(floor, i, " failed", va="center", color=FAINT, style="italic")
            if found.main in row.paper:
                axes.scatter(
                    [row.paper[found.main]], [i], marker="D", s=26, facecolors="white", edgecolors=INK, zorder=4
                )
        axes.set(ylim=(len(rows) - 0.4, -0.6), xlim=(low - (0.01 if low < floor else 0), high + 0.02 * (high - low)))
        axes.set_yticks([])
        axes.set_title(model, loc="left", color=FAINT, size=9)
        _plain(axes, "x")
    with_paper = any(found.main in row.paper for rows in models.values() for row in rows)
    start = "from chance" if found.main == "auc" else "from 0"
    panels[-1].set_xlabel(
        f"test {shown(found.main)}, {start}; a dot a seed" + ("; diamond: the paper's" if with_paper else "")
    )
    return figure


def curve(found: Findings, models: Mapping[str, Sequence[Row]]) -> Any:
    """The mean over an option's values with standard deviations; a dotted line for methods without it."""
    figure = _figure(7.6, 3.6)
    axes = figure.subplots()
    points = sorted(set(found.points.values()))
    ends: list[tuple[float, str, str]] = []
    for ink, (model, rows) in zip(_repeated(MODELS, len(models)), models.items(), strict=True):
        known = sorted((found.points[row.name], row) for row in rows if row.name in found.points and row.method)
        x, y = [p for p, _ in known], [row.mean for _, row in known]
        error = [np.nan_to_num(row.method.sd(found.main)) if row.method else 0.0 for _, row in known]
        axes.errorbar(x, y, yerr=error, color=ink, marker="o", ms=4.5, lw=1.6, capsize=2.5, elinewidth=0.9)
        ends += [(y[-1], model, ink)] if y else []
        for row in rows:
            if row.name not in found.points and row.method:
                axes.axhline(row.mean, color=ink, ls=(0, (1, 2)), lw=1.4)
                ends.append((row.mean, f"{model}, {row.name}", ink))
    if points and points[0] > 0 and points[-1] / points[0] >= 10:
        axes.set_xscale("log")
    axes.set_xticks(points, [f"{p:g}" for p in points])
    axes.minorticks_off()
    axes.set(xlabel=found.curve, ylabel=f"test {shown(found.main)}")
    _plain(axes, "y")
    _labels_at_the_end(axes, ends)
    return figure


def weights(found: Findings, runs: Sequence[Run], names: Mapping[int, str]) -> Any | None:
    """Mean weight of the source's categories, highest and lowest, averaged over seeds; None without weights."""
    frames = [_read(run.weights, "category").with_columns(seed=pl.lit(run.seed)) for run in runs if run.weights]
    if not frames:
        return None
    mean = (
        pl.concat(frames)
        .group_by("category")
        .agg(pl.col("weight").mean(), pl.col("weight").std().alias("sd"), pl.col("behaviours").mean())
        .filter(pl.col("behaviours") >= FEWEST)
        .sort("weight", "category", descending=[True, False])
    )
    if mean.is_empty():
        return None
    middle = float(np.average(mean["weight"], weights=mean["behaviours"]))
    cut = mean.height > HIGHEST + LOWEST
    shown = pl.concat([mean.head(HIGHEST), mean.tail(LOWEST)]) if cut else mean
    figure = _figure(7.6, 0.75 + 0.26 * (shown.height + cut))
    axes = figure.subplots()
    for i, row in enumerate(shown.iter_rows(named=True)):
        y = i + (cut and i >= HIGHEST)
        axes.barh(y, row["weight"], height=0.66, color=HIGHLIGHTED if row["weight"] >= middle else OTHER)
        sd = row["sd"] or 0.0
        axes.errorbar(row["weight"], y, xerr=[[min(sd, row["weight"])], [sd]], color=INK, elinewidth=0.9, capsize=2)
        name = names.get(int(row["category"]), f"category {row['category']}")
        label = name if len(name) <= 34 else name[:33] + "…"
        axes.text(-0.015, y, label, transform=axes.get_yaxis_transform(), **_text("right"))
    if cut:
        hidden = f"… {mean.height - shown.height} categories between"
        axes.text(0.0, HIGHEST, f"  {hidden}", va="center", color=FAINT, style="italic", size=8.5)
    axes.axvline(middle, color=INK, lw=1, ls=(0, (1, 2)))
    axes.set_yticks([])
    axes.set_ylim(shown.height + cut - 0.4, -0.6)
    axes.set_xlabel(f"mean weight of a behaviour ({found.highlighted}; dotted: of all behaviours)")
    _plain(axes, "x")
    return figure


def lengths(found: Findings, runs: Sequence[Run]) -> Any | None:
    """Mean weight by how much longer a user's source history is than the target's (the paper's Figure 4), averaged over
    seeds, in ten groups of about as many behaviours; None without weights."""
    frames = [_read(run.lengths, "difference").with_columns(seed=pl.lit(run.seed)) for run in runs if run.lengths]
    if not frames:
        return None
    whole = pl.concat(frames).sort("difference")
    place = (whole["behaviours"].cum_sum() - whole["behaviours"] / 2) / whole["behaviours"].sum()
    group = (place * LENGTH_GROUPS).floor().cast(pl.Int64)
    one = pl.DataFrame({"difference": whole["difference"], "group": group}).unique("difference", keep="first")
    weighed = pl.col("weight").dot("behaviours") / pl.col("behaviours").sum()
    middles = pl.col("difference").dot("behaviours") / pl.col("behaviours").sum()
    by_seed = whole.join(one, on="difference").group_by("group", "seed").agg(weighed, middles.alias("at"))
    mean = by_seed.group_by("group").agg(pl.col("at", "weight").mean(), pl.col("weight").std().alias("sd")).sort("at")
    figure = _figure(7.6, 3.0)
    axes = figure.subplots()
    x, y, spread = (mean[name].fill_null(0.0).to_numpy().astype(np.float64) for name in ("at", "weight", "sd"))
    axes.errorbar(x, y, yerr=np.nan_to_num(spread), color=HIGHLIGHTED, marker="o", ms=4.5, capsize=2.5, elinewidth=0.9)
    axes.axhline(float(np.average(whole["weight"], weights=whole["behaviours"])), color=INK, lw=1, ls=(0, (1, 2)))
    axes.set(xlabel="source minus target history length (dotted: of all behaviours)", ylabel="mean weight")
    _plain(axes, "y")
    return figure


def learning(found: Findings, data: str, model: str) -> Any | None:
    """A validation metric over a run's validations, averaged over seeds (UAF, Figure 4); None where there is none."""
    curves: dict[str, list[list[float]]] = {}
    for run in found.rows:
        values = [v for of in run.validations if (v := of.get(found.learning_curve)) is not None]
        if (run.data, run.model) == (data, model) and values:
            curves.setdefault(run.method, []).append(values)
    if not curves:
        return None
    figure = _figure(7.6, 4.0)
    axes, ends = figure.subplots(), []
    for ink, (method, of) in zip(_repeated(LINES, len(curves)), curves.items(), strict=True):
        epochs = min(map(len, of))  # as far as every seed came
        mean = np.mean([values[:epochs] for values in of], axis=0)
        bold = 2.2 if method == found.highlighted else 1.4
        axes.plot(range(1, epochs + 1), mean, color=ink, lw=bold, marker="o", ms=3.0)
        ends.append((float(mean[-1]), method, ink))
    axes.set(xlabel="validation", ylabel=f"validation {shown(found.learning_curve)}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes, "y")
    _labels_at_the_end(axes, ends)
    return figure


def tuned(found: Findings) -> Any | None:
    """The share of the fine-tuned copy in each block (UAF, Figure 3), a row for every data, model and method with a
    policy; None where there is none."""
    rows: dict[tuple[str, str, str], list[list[float]]] = {}
    for run in found.rows:
        if run.summary is not None and (share := run.summary.get("policy", {}).get("tuned_share", {}).get("test")):
            rows.setdefault(run.labels, []).append(share)
    if not rows:
        return None
    means = [np.mean(of, axis=0) for of in rows.values()]
    blocks = max(map(len, means))
    grid = np.array([[*mean, *[np.nan] * (blocks - len(mean))] for mean in means])
    figure = _figure(7.6, 0.9 + 0.42 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(grid):
        if not np.isnan(share):
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", size=8.5, color="white" if share < 0.6 else INK)
    varied = [len({labels[i] for labels in rows}) > 1 for i in range(3)]
    names = [" / ".join(n for n, of in zip(labels, varied, strict=True) if of) or labels[2] for labels in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xticks(range(blocks), [str(block + 1) for block in range(blocks)])
    axes.set_xlabel("block")
    _plain(axes, "x")
    axes.grid(visible=False)
    figure.colorbar(image, ax=axes, label="share of the fine-tuned copy")
    return figure


def colour(found: Findings, method: str) -> str:
    kinds = {found.single: SINGLE, found.against: AGAINST, found.highlighted: HIGHLIGHTED}
    return kinds.get(method, OTHER)


def as_bytes(figure: Any, kind: str) -> bytes:
    """svg or png; the same figure gives the same bytes."""
    import matplotlib

    out = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "cdr_dist"}):
        figure.savefig(out, format=kind, dpi=160, metadata=metadata, bbox_inches="tight", pad_inches=0.05)
    return out.getvalue()


def inline(svg: bytes) -> str:
    """An SVG file's element alone, without prolog, metadata and fixed size, to stand within a page."""
    text = svg.decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    head, rest = text.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", head) + ' aria-hidden="true">' + rest.strip()


def _figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure((width, height), layout="constrained")
    figure.set_facecolor("white")
    return figure


def _plain(axes: Any, grid: str) -> None:
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelcolor=FAINT, labelsize=8.5)
    axes.grid(axis=grid, color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=FAINT, size=8.5)


def _labels_at_the_end(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right of their lines, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    least, at = 0.06 * (high - low), -math.inf
    for y, name, ink in sorted(ends):
        at = max(y, at + least)
        axes.annotate(name, (1.01, at), xycoords=axes.get_yaxis_transform(), color=ink, va="center", size=8.5)


def _text(side: str) -> dict[str, Any]:
    return {"ha": side, "va": "center", "color": INK, "size": 8.5}


def _values(row: Row) -> list[float]:
    return [v for v in row.method.values[row.main] if not math.isnan(v)] if row.method else []


def _read(uri: str, by: str) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(storage.read_bytes(uri)), columns=[by, "behaviours", "weight"])


def _repeated(colours: Sequence[str], n: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(n)]
