"""Charts as SVG that stands within a page: curves, histograms, bars, means with intervals.

Importing this loads matplotlib, half a second: only what writes a report does. Labels are text that is never read as a
formula, ids begin with the chart's name, so that charts of one page do not meet, and equal data give equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

BLUE, ORANGE, RED, GREY = "#2a6299", "#cf7420", "#bb3e3e", "#8b929b"
INK, FAINT = "#39414b", "#e2e6eb"
WIDTH, HEIGHT, ROW = 4.7, 2.9, 0.2
"""Inches, ROW that of a bar that lies. Half a wide page: there, and on a phone, its letters can be read."""
MOST_POINTS = 300
"""Of a curve; a longer one is drawn as the means of as many stretches."""
LONGEST_LABEL = 26
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Curve:
    """x, y: [n] each."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = BLUE


@dataclass(frozen=True)
class Bar:
    """One that lies; `note` stands at the right. A label of None is a gap."""

    label: str | None
    value: float = 0.0
    note: str = ""
    colour: str = BLUE


def curves(name: str, drawn: Sequence[Curve], y: str, marks: Mapping[str, float] | None = None, x: str = "step") -> str:
    """Over steps, or what else `x` says; logarithmic where values are positive and spread over a factor of 20.

    marks: text -> the step where a line across says it.
    """

    def draw(axes: Axes) -> None:
        markers = all(len(curve.x) <= 20 for curve in drawn)
        for curve in drawn:
            axes.plot(*_thinned(curve), color=curve.colour, lw=1.6, marker="o" if markers else "", ms=3.5)
        values = np.concatenate([curve.y for curve in drawn])
        low, high = float(values.min()), float(values.max())
        if low > 0 and high > 20 * low:
            axes.set_yscale("log")
            decades = np.log10(high / low)
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=8))
            axes.yaxis.set_minor_locator(NullLocator())
        elif high - low <= 1e-6 * abs(high):  # a constant: no axis of rounding errors
            axes.set_ylim(*((-0.1, 1.0) if high == 0 else sorted((0.0, 2 * high))))
            axes.yaxis.set_major_locator(MaxNLocator(4))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        axes.grid(axis="y")
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_count))
        for text, step in (marks or {}).items():
            axes.axvline(step, color=GREY, lw=0.9, ls=(0, (3, 3)))
            left = step > sum(axes.get_xlim()) / 2
            axes.annotate(
                _cut(text),
                (step, 0.02),
                (-4 if left else 4, 0),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                ha="right" if left else "left",
                va="bottom",
                fontsize=8,
            )
        if len(drawn) > 1:
            _legend(axes, {curve.label: curve.colour for curve in drawn})

    return _svg(name, HEIGHT, draw)


def histogram(
    name: str, lower: Sequence[float], upper: Sequence[float], counts: Sequence[int], x: str, at: float
) -> str:
    """Bins of a logarithmic axis, and a line across at `at`."""

    def draw(axes: Axes) -> None:
        first, last = np.asarray(lower), np.asarray(upper)
        axes.bar(first, counts, last - first, align="edge", color=BLUE, edgecolor="white", lw=0.4)
        axes.axvline(at, color=ORANGE, lw=1.2)
        axes.set_xscale("log", base=2)
        span = np.log2(last.max() / first.min())
        finer = (1.0, 2**0.5) if span < 3.5 else (1.0,)
        axes.xaxis.set_major_locator(LogLocator(2, subs=finer, numticks=9))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(_count))
        axes.grid(axis="y")
        axes.set_xlabel(x)
        axes.set_ylabel("behaviours")

    return _svg(name, HEIGHT, draw)


def bars(name: str, drawn: Sequence[Bar], x: str, at: float, legend: Mapping[str, str]) -> str:
    """Bars below one another from 0, the first on top, and a line across at `at`. legend: text -> colour."""

    def draw(axes: Axes) -> None:
        place = [-float(i) for i in range(len(drawn))]
        axes.barh(place, [bar.value for bar in drawn], 0.72, color=[bar.colour for bar in drawn])
        for y, bar in zip(place, drawn, strict=True):
            if bar.label is None:
                axes.text(0, y, f" ⋮  {bar.note}", va="center", fontsize=8, color=GREY)
            else:
                across = axes.get_yaxis_transform()
                axes.text(1, y, bar.note, ha="right", va="center", fontsize=8, transform=across)
        axes.axvline(at, color=ORANGE, lw=1.2)
        named = [(y, _cut(bar.label)) for y, bar in zip(place, drawn, strict=True) if bar.label is not None]
        axes.set_yticks([y for y, _ in named], [label for _, label in named])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-len(drawn) + 0.4, 0.6)
        highest = max(at, *(bar.value for bar in drawn)) or 1.0
        axes.set_xlim(0, 1.35 * highest)  # room for the notes
        axes.set_xticks([tick for tick in MaxNLocator(5).tick_values(0, highest) if 0 <= tick <= highest])
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlabel(x)
        if legend:
            _legend(axes, legend)

    return _svg(name, 0.9 + ROW * len(drawn), draw)


def intervals(
    name: str,
    labels: Sequence[str],
    mean: Sequence[float],
    half: Sequence[float],
    counts: Sequence[int],
    x: str,
    y: str,
    at: float,
) -> str:
    """Means with intervals of +- half, and below them what they are the means of. A line across at `at`."""

    def draw(upper: Axes, lower: Axes) -> None:
        place = np.arange(len(labels))
        upper.axhline(at, color=ORANGE, lw=1.2)
        upper.errorbar(place, mean, half, color=BLUE, fmt="o", ms=4, lw=1.4, capsize=2.5)
        upper.yaxis.set_major_formatter(FuncFormatter(_short))
        upper.yaxis.set_major_locator(MaxNLocator(5))
        upper.grid(axis="y")
        upper.set_ylabel(y)
        upper.tick_params(axis="x", length=0, labelbottom=False)
        lower.bar(place, counts, 0.72, color="#b9c9da")
        lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        lower.yaxis.set_major_formatter(FuncFormatter(_count))
        lower.set_ylabel("behaviours")
        crowded = sum(map(len, labels)) > 34
        lower.set_xticks(place, labels, rotation=45 if crowded else 0, ha="right" if crowded else "center")
        lower.tick_params(axis="x", length=0)
        lower.set_xlabel(x)

    return _svg(name, HEIGHT + 0.6, draw, {"height_ratios": [2.4, 1]})


def _svg(name: str, height: float, draw: Callable[..., None], panels: dict[str, Any] | None = None) -> str:
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the reader's fonts count, not those here
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(2 if panels else 1, sharex=bool(panels), squeeze=False, gridspec_kw=panels)
        draw(*axes[:, 0])
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _within_a_page(written.getvalue(), name)


_TAG = re.compile(r"<[a-zA-Z][^>]*>")


def _within_a_page(written: str, name: str) -> str:
    """The svg element alone, as wide as what it stands in, with ids of its own."""
    found = written[written.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.S)
    found = re.sub(r"<!--.*?-->", "", found, flags=re.S)

    def tag(match: re.Match[str]) -> str:
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", match[0]).replace("xlink:href", "href")
        if text.startswith("<svg"):
            text = re.sub(r' (width|height|version)="[^"]*"', "", text)
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)

    return _TAG.sub(tag, found).strip()


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
    if len(x) <= MOST_POINTS:
        return x, y
    first = np.linspace(0, len(x), MOST_POINTS, endpoint=False).astype(int)
    each = np.diff(first, append=len(x))
    return np.add.reduceat(x, first) / each, np.add.reduceat(y, first) / each


def _legend(axes: Axes, colours: Mapping[str, str]) -> None:
    """Above the axes, where nothing is covered."""
    keys = [matplotlib.patches.Patch(color=colour, label=label) for label, colour in colours.items()]
    axes.legend(
        handles=keys,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        handlelength=0.9,
        handleheight=0.9,
        columnspacing=1.2,
        borderaxespad=0.2,
        fontsize=8.5,
    )


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"


def _short(value: float, _: object = None) -> str:
    """Without zeros that say nothing, and powers only where they save something."""
    if value == 0:
        return "0"
    if 1e-4 < abs(value) < 1e5:
        return f"{value:.6g}"
    digits, _, power = f"{value:.3g}".partition("e")
    return f"{digits}e{int(power)}" if power else digits


def _count(value: float, _: object = None) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"
