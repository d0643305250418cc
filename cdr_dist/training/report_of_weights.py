"""The report's section on what the perceptron found: how weights spread, by category and by length of histories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.data import storage
from cdr_dist.data.dataset import PADDING, UNKNOWN, Manifest
from cdr_dist.data.truth import KINDS, of_categories, usefulness_by_category
from cdr_dist.evaluation.charts import BLUE, GREY, RED, Bar, bars, histogram, intervals
from cdr_dist.evaluation.report import Chart, Section, Table
from cdr_dist.training.run_folder import BY_LENGTH, HISTOGRAM, WEIGHTS, RunFolder

MOST_BINS = 30
END = 12
"""Categories shown at either end, where there are more than twice as many."""
LEAST = 30
"""Behaviours of a category that stands among the ends: the mean of fewer says little."""
GROUPS = 9
"""Of differences of lengths."""
COLOURS = dict(zip(KINDS, (BLUE, GREY, RED), strict=True))


def section_of_weights(
    place: RunFolder, summary: Mapping[str, Any], folder: str | None, manifest: Manifest | None
) -> Section | None:
    """None: nothing was weighed. folder: of the dataset, which has the categories' names."""
    if "weights" not in summary or not storage.exists(place.file(WEIGHTS)):
        return None
    mean, truth = summary["weights"]["mean"], summary["weights"].get("truth")
    by_category = _named(_read(place, WEIGHTS), folder, manifest)
    charts: list[Chart | None] = [_by_category(by_category, mean)]
    if storage.exists(place.file(HISTOGRAM)):  # runs of earlier versions have none
        charts.append(_spread(_read(place, HISTOGRAM), mean))
    if storage.exists(place.file(BY_LENGTH)):
        charts.append(_by_length(_read(place, BY_LENGTH), mean))
    tables = [_truth(truth)] if truth else []
    if manifest is not None and len(manifest.sources) > 1:
        tables.append(_by_source(by_category, manifest.sources))
    return Section(
        "What counts: learned weights of source behaviours",
        f"Every source behaviour got a weight w; shown is w × B, with the batch's rows B. Over "
        f"{by_category['behaviours'].sum():,} behaviours, of an epoch's first batches, it is {mean:.3g} on average "
        "(the orange lines): what is above counts more than others.",
        [chart for chart in charts if chart is not None],
        [*tables, _table(by_category)],
    )


def _read(place: RunFolder, name: str) -> pl.DataFrame:
    uri = place.file(name)
    with storage.naming(uri):
        found = pl.from_arrow(pq.read_table(pa.BufferReader(storage.read_bytes(uri))))
    assert isinstance(found, pl.DataFrame)
    return found


def _named(found: pl.DataFrame, folder: str | None, manifest: Manifest | None) -> pl.DataFrame:
    """With name and kind ('' unless planted) of each category, by falling weight."""
    names = {PADDING: "(none)", UNKNOWN: "(unknown)"}
    kinds: Sequence[str] = ()
    if folder is not None and manifest is not None:
        vocabulary = pq.read_table(
            pa.BufferReader(storage.read_bytes(storage.join(folder, manifest.vocab["source_category"].path)))
        ).to_pydict()
        names |= dict(zip(vocabulary["id"], vocabulary["key"], strict=True))
        if of_categories(folder):
            kinds = usefulness_by_category(folder, manifest)
    ids = found["category"].to_list()
    return found.with_columns(
        name=pl.Series([names.get(c, f"category {c}") for c in ids], dtype=pl.String),
        kind=pl.Series([kinds[c] if kinds else "" for c in ids], dtype=pl.String),
    ).sort("weight", "category", descending=[True, False])


def _by_category(found: pl.DataFrame, mean: float) -> Chart:
    shown, left_out = found, ""
    gap: list[Bar] = []
    if len(found) > 2 * END:
        frequent = found.filter(pl.col("behaviours") >= LEAST)
        if len(frequent) >= 2 * END:
            shown, left_out = (
                frequent,
                f" Those of fewer than {LEAST} behaviours are left out." * (frequent.height < found.height),
            )
        gap = [Bar(None, note=f"{len(shown) - 2 * END} between")] * (len(shown) > 2 * END)

    def drawn(part: pl.DataFrame) -> list[Bar]:
        columns = part.select("name", "weight", "behaviours", "kind").rows()
        return [Bar(name, w, f"{w:.2f} · {n:,}", COLOURS.get(kind, BLUE)) for name, w, n, kind in columns]

    every = [*drawn(shown.head(END)), *gap, *drawn(shown.tail(END))] if gap else drawn(shown)
    kinds = [kind for kind in KINDS if kind in set(shown["kind"])]
    top, bottom = shown.row(0, named=True), shown.row(-1, named=True)
    which = (
        f"The {END} highest and the {END} lowest of {len(shown)} source categories" if gap else "All source categories"
    )
    ends = f"Most counts {top['name']} ({top['weight']:.2f}), least {bottom['name']} ({bottom['weight']:.2f})."
    says = f"{which}, with mean weight · behaviours.{left_out} {ends}"
    if kinds:
        says += " Colours are the planted truth, which training did not see."
    legend = {kind: COLOURS[kind] for kind in kinds}
    return Chart(
        "Mean weight by source category", bars("categories", every, "mean weight × B", mean, legend), says, True
    )


def _spread(found: pl.DataFrame, mean: float) -> Chart | None:
    """Fine bins are joined until the page can show them; an odd number of them, so that 1 stays within one.

    None: all weights are 0.
    """
    none = int(found.filter(pl.col("upper") == 0)["behaviours"].sum())
    bins = found.filter(pl.col("upper") > 0)
    total = int(found["behaviours"].sum())
    says = f"{none:,} of {total:,} behaviours have weight 0. " * (none > 0)
    if bins.is_empty():
        return None
    fine = math.log2(bins["upper"][0] / bins["lower"][0])
    number = (((bins["lower"] * bins["upper"]).log(2) / 2) / fine).round().cast(pl.Int64)
    first, last = int(number.min()), int(number.max())  # type: ignore[arg-type]
    each = 1
    while (last - first) / each > MOST_BINS:
        each += 2
    grouped = pl.DataFrame({"bin": (number / each).round().cast(pl.Int64), "behaviours": bins["behaviours"]})
    grouped = grouped.group_by("bin").agg(pl.col("behaviours").sum()).sort("bin")
    lower, upper = ([2 ** ((b + half) * each * fine) for b in grouped["bin"]] for half in (-0.5, 0.5))
    low, middle, high = (_quantile(bins, q) for q in (0.05, 0.5, 0.95))
    says += f"Half of the behaviours weigh less than {middle:.2g}; nine of ten lie between {low:.2g} and {high:.2g}."
    svg = histogram("spread", lower, upper, grouped["behaviours"].to_list(), "weight × B", mean)
    return Chart("How the weights spread", svg, says)


def _quantile(bins: pl.DataFrame, share: float) -> float:
    """To the width of a fine bin."""
    counts = bins["behaviours"].to_numpy()
    row = bins.row(int((counts.cumsum() >= share * counts.sum()).argmax()), named=True)
    return math.sqrt(row["lower"] * row["upper"])


def _by_length(found: pl.DataFrame, mean: float) -> Chart:
    """Means with 95% intervals, of behaviours taken as independent, by groups of differences."""
    groups = _grouped(found)
    labels, means, halves, counts = [], [], [], []
    for label, part in groups:
        n = int(part["behaviours"].sum())
        average, squared = (float((part[c] * part["behaviours"]).sum()) / n for c in ("weight", "weight_squared"))
        variance = max(0.0, squared - average**2) * n / max(n - 1, 1)
        labels.append(label)
        means.append(average)
        halves.append(1.96 * math.sqrt(variance / n))
        counts.append(n)
    svg = intervals(
        "lengths", labels, means, halves, counts, "source minus target history length", "mean weight × B", mean
    )
    says = (
        "How many behaviours the user's stored source history has more than the target history (at most what "
        "prepare's history_length keeps of each). Points are means, with their 95% intervals, a user's behaviours "
        f"taken as independent. From {means[0]:.3g} at {labels[0]} to {means[-1]:.3g} at {labels[-1]}."
    )
    return Chart("Mean weight by difference of history lengths", svg, says)


def _grouped(found: pl.DataFrame) -> list[tuple[str, pl.DataFrame]]:
    """Label -> the differences of a group: each its own, or as many after one another, the ends open."""
    found = found.sort("difference")
    at = found["behaviours"].cum_sum() / found["behaviours"].sum()
    # The ends, which few reach, would make the groups of all the others wide.
    low = int(found.filter(at >= 0.005)["difference"][0])
    high = int(found.filter(at >= 0.995)["difference"][0])
    width = next(w for w in _widths() if high // w - low // w < GROUPS)
    first, last = low // width, high // width
    numbered = found.with_columns(group=(pl.col("difference") // width).clip(first, last))
    return [
        (_label(part["difference"].to_list(), int(group), width, group == first, group == last), part)
        for (group,), part in numbered.group_by("group", maintain_order=True)
    ]


def _widths() -> Any:
    return (step * 10**power for power in range(9) for step in (1, 2, 5))


def _label(within: Sequence[int], group: int, width: int, first: bool, last: bool) -> str:
    start, stop = group * width, group * width + width - 1
    if first and min(within) < start:
        return f"≤ {_signed(stop)}"
    if last and max(within) > stop:
        return f"≥ {_signed(start)}"
    return _signed(start) if width == 1 else f"{_signed(start)}…{_signed(stop)}"


def _signed(number: int) -> str:
    return str(number).replace("-", "−")


def _truth(truth: Mapping[str, Any]) -> Table:
    means = truth["mean_weight"]
    rows = [[kind, f"{means[kind]:.3f}"] for kind in KINDS if kind in means]
    rows.append(["AUC of helpful against harmful", "–" if truth["auc"] is None else f"{truth['auc']:.4f}"])
    return Table("Against the planted truth", ["Kind of source behaviour", "Mean weight × B"], rows)


def _by_source(found: pl.DataFrame, sources: Sequence[str]) -> Table:
    """Of several source domains, whose categories' names begin with the domain's."""
    rows = []
    for source in sources:
        own = found.filter(pl.col("name").str.starts_with(f"{source}:"))
        count = int(own["behaviours"].sum())
        mean = f"{float((own['weight'] * own['behaviours']).sum()) / count:.4f}" if count else "–"
        rows.append([source, mean, f"{count:,}"])
    return Table("By source domain", ["Source", "Mean weight × B", "Behaviours"], rows)


def _table(found: pl.DataFrame) -> Table:
    planted = any(found["kind"])
    rows = [
        [row["name"], *([row["kind"] or "–"] if planted else []), f"{row['weight']:.4f}", f"{row['behaviours']:,}"]
        for row in found.head(MOST_ROWS).iter_rows(named=True)
    ]
    caption = f"All {len(found):,} source categories"
    if len(found) > MOST_ROWS:
        caption = f"The {MOST_ROWS:,} highest of {len(found):,} source categories"
    header = ["Category", *(["Planted"] if planted else []), "Mean weight × B", "Behaviours"]
    return Table(caption, header, rows, left=1 + planted, folded=True)


MOST_ROWS = 500
