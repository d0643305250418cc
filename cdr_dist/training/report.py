"""A finished run as report.html: its numbers, curves, learned weights, cost, data and configuration.

Importing this loads matplotlib, which training does not need.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.errors import UserError
from cdr_dist.evaluation.charts import BLUE, ORANGE, Bar, Curve, bars, curves
from cdr_dist.evaluation.report import Chart, Report, Section, Table, page
from cdr_dist.training.report_of_weights import section_of_weights
from cdr_dist.training.run_folder import CONFIG, REPORT, RunFolder

MODELS = {"conet": "CoNet", "minet": "MiNet", "dasl": "DASL", "nextitnet": "NextItNet"}
"""As their papers write them; others are written as the summary has them."""
METRICS = {
    "auc": "AUC",
    "gauc": "AUC within users",
    "logloss": "log loss",
    "accuracy": "accuracy",
    "f1": "F1",
    "nll": "next-item loss",
}
COUNTS = ("rows", "gauc_users")


def write_report(place: RunFolder, folder: str | None) -> str:
    """Writes report.html of a finished run and returns its URI. folder: of the dataset, None where it is gone.

    UserError: the run is not finished, or a file of it is damaged.
    """
    content = page(report_of(place, folder)).encode()
    with durable("run.report"):
        storage.write_bytes(place.file(REPORT), content)
    return place.file(REPORT)


def report_of(place: RunFolder, folder: str | None) -> Report:
    summary = place.summary()
    if summary is None:
        raise UserError(f"{place.uri}: is not finished (no summary.json), so there is nothing to report yet")
    manifest = _manifest(folder, summary)
    lines = place.lines()
    dataset = folder if manifest is not None else None
    sections = [_metrics(summary), _curves(summary, lines), section_of_policy(summary)]
    sections += [section_of_weights(place, summary, dataset, manifest), _cost(summary), _data(summary, manifest)]
    config = storage.read_bytes(place.file(CONFIG)).decode()
    made_with = json.loads(storage.read_bytes(place.file("versions.json")))
    folded = {
        "Full configuration": config,
        "Versions": "\n".join(f"{name} {version}" for name, version in made_with.items()),
        "Fingerprint": f"SHA-256 of all parameters after the last step\n{summary['parameters_sha256']}",
    }
    data, workers = summary["data"]["name"], summary["world_size"]
    model = MODELS.get(summary["model"], summary["model"])
    return Report(
        title=f"{summary['recipe']} with {model} on {_last(data)}",
        subtitle=f"Seed {summary['seed']}, {summary['steps']:,} steps on {workers} worker{'s' * (workers > 1)}. "
        f"Data: {data}. Run: {place.uri}",
        headline=_headline(summary),
        sections=[section for section in sections if section is not None],
        folded=folded,
    )


def _manifest(folder: str | None, summary: Mapping[str, Any]) -> Manifest | None:
    """None: there is none that can be read, or it is that of other data than the run's."""
    if folder is None:
        return None
    try:
        found = read_manifest(folder)
    except UserError:
        return None
    examples = {split: found.examples(split) for split in summary["data"]["examples"]}
    same = examples == summary["data"]["examples"] and found.counts["users"] == summary["data"]["users"]
    return found if same else None


def _last(data: str) -> str:
    return data.rstrip("/").rpartition("/")[2] or data


def metric_name(metric: str) -> str:
    if metric in METRICS:
        return METRICS[metric]
    kind, at, k = metric.removeprefix("full_").partition("@")
    return f"{kind.upper()}{at}{k}" + (" among all items" if metric.startswith("full_") else "")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def decimals(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def size_of(summary: Mapping[str, Any], split: str) -> str:
    """What the metrics of a split were measured on."""
    if "rows" in summary["metrics"][split]:
        return f"{summary['metrics'][split]['rows']:,} rows"
    known = summary["data"].get("sequences")  # runs of earlier versions did not say
    return f"{known[split]:,} sequences" if known else "all sequences"


def _headline(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    best, test = summary["best"], summary["metrics"]["test"]
    metric = best["metric"]
    shown = [
        (f"Test {metric_name(m)}", decimals(test[m]), size_of(summary, "test"))
        for m in dict.fromkeys(["auc", metric, "logloss"])
        if test.get(m) is not None
    ]
    shown.append((f"Best validation {metric_name(metric)}", decimals(best["value"]), f"at step {best['step']:,}"))
    truth = (summary.get("weights") or {}).get("truth")
    if truth and truth["auc"] is not None:
        shown.append(("Weights against the truth, AUC", decimals(truth["auc"]), "0.5 is chance, 1 is perfect"))
    return shown


def _metrics(summary: Mapping[str, Any]) -> Section:
    valid, test = (summary["metrics"][split] for split in ("valid", "test"))
    rows = [
        [_sentence(metric_name(m)), decimals(valid.get(m)), decimals(test.get(m))]
        for m in test
        if m not in COUNTS and (test[m], valid.get(m)) != (None, None)
    ]
    sizes = [size_of(summary, split).split() for split in ("valid", "test")]
    unit = sizes[0][1]
    rows.append([_sentence(unit), *(size for size, _ in sizes)])
    best = summary["best"]
    return Section(
        "Result",
        f"All numbers are those of the checkpoint at step {best['step']:,}, the best by "
        f"{metric_name(best['metric'])} on the validation {unit}. The test {unit} played no part in the choice.",
        tables=[Table("Metrics of the best checkpoint", ["Metric", "Validation", "Test"], rows)],
    )


Lines = Sequence[Mapping[str, Any]]


def series(lines: Lines, split: str, value: str) -> tuple[list[float], list[float]]:
    """(steps, values) of what metrics.jsonl says, but for what has no value."""
    found = [(line["step"], line["values"].get(value)) for line in lines if line["split"] == split]
    kept = [(step, float(v)) for step, v in found if v is not None]
    return [step for step, _ in kept], [v for _, v in kept]


def _curves(summary: Mapping[str, Any], lines: Lines) -> Section | None:
    best = summary["best"]
    marks = {
        str(line["phase"]): before["step"]  # where it began
        for before, line in itertools.pairwise(lines)
        if before["phase"] != line["phase"] and before["phase"]
    }
    charts = [_next_items(lines), _losses(lines, marks)]
    for metric in dict.fromkeys(["auc", best["metric"], "logloss"]):
        if metric == "nll":  # drawn with its training loss
            continue
        charts.append(
            _curve(
                lines,
                "valid",
                metric,
                f"Validation {metric_name(metric)}",
                marks | ({"best": best["step"]} if metric == best["metric"] else {}),
            )
        )
    charts += [
        _curve(lines, "upper", "gamma", "Gamma, the sum of a batch's weights", marks),
        _series(lines, marks),
        _curve(lines, "upper", "hypergradient_norm", "Norm of the hypergradient", marks),
    ]
    shown = [chart for chart in charts if chart is not None]
    return Section("Training", charts=shown) if shown else None


def _course(name: str, x: Sequence[float], y: Sequence[float]) -> str:
    """What a curve does, in words."""
    low, high = min(y), max(y)
    if high - low <= 1e-6 * abs(high):
        return f"{name} is {y[0]:.4g} throughout."
    way = f"from {y[0]:.4g} at step {x[0]:,} to {y[-1]:.4g} at step {x[-1]:,}"
    return f"{name} goes {way} (between {low:.4g} and {high:.4g})."


def _next_items(lines: Lines) -> Chart | None:
    """Of pre-training: what it minimises, and the same of the validation sequences."""
    found = {label: series(lines, split, "nll") for label, split in (("training", "train"), ("validation", "valid"))}
    colours = {"training": BLUE, "validation": ORANGE}
    drawn = [Curve(label, *of, colours[label]) for label, of in found.items() if of[0]]
    if not drawn:
        return None
    says, marks = " ".join(_course(f"The {curve.label} loss", curve.x, curve.y) for curve in drawn), {}
    steps, values = found["validation"]
    if steps:
        best = steps[int(np.argmin(values))]
        marks = {"best": best}
        says += f" The dashed line is the best checkpoint of pre-training, step {best:,.0f}."
    return Chart("Pre-training: next-item loss", curves("next-items", drawn, "next-item loss", marks), says)


def section_of_policy(summary: Mapping[str, Any]) -> Section | None:
    """None: no policy decided anything."""
    shares = (summary.get("policy") or {}).get("tuned_share") or {}
    if not shares.get("test"):
        return None
    test = shares["test"]
    drawn = [Bar(f"block {i}", share, f"{share:.2f}") for i, share in enumerate(test, 1)]
    columns = [shares.get("valid"), test, (summary["policy"].get("tuned_sd") or {}).get("test")]
    rows = [
        [f"Block {i}", *(f"{column[i - 1]:.3f}" if column else "–" for column in columns)]
        for i in range(1, len(test) + 1)
    ]
    mean = sum(test) / len(test)
    chart = Chart(
        "Share of users whose block is the fine-tuned one",
        bars("policy", drawn, "share of the fine-tuned copy, test rows", 0.5, {}),
        f"{mean:.1%} on average over the blocks, the first one next to the items. At the orange line, one half, both "
        "are as frequent.",
    )
    return Section(
        "The policy: which blocks are fine-tuned, for whom",
        "Of each block there is a pre-trained one, which stayed as it was, and a copy that was fine-tuned. A share of "
        "0: every user goes through the pre-trained block; 1: through the copy. A soft policy mixes both, and this is "
        "the copy's mean share. A deviation of 0: the policy decides the same for every user.",
        [chart],
        [Table("Mean share of the fine-tuned copy", ["Block", "Validation", "Test", "Test, standard deviation"], rows)],
    )


def _losses(lines: Lines, marks: Mapping[str, float]) -> Chart | None:
    """Of the domains where there are two; their sum is then no curve of its own."""
    names = {"target_loss": ("target", BLUE), "source_loss": ("weighted source", ORANGE)}
    found = {label: (series(lines, "train", name), colour) for name, (label, colour) in names.items()}
    drawn = [Curve(label, *of, colour) for label, (of, colour) in found.items() if of[0]]
    if not drawn:
        return None
    says = [_course(f"The {curve.label} loss", curve.x, curve.y) for curve in drawn]
    return Chart("Training loss", curves("losses", drawn, "loss", marks), " ".join(says))


def _curve(lines: Lines, split: str, value: str, title: str, marks: Mapping[str, float]) -> Chart | None:
    x, y = series(lines, split, value)
    if not x:
        return None
    name = value.replace("@", "-")
    label = "gamma" if value == "gamma" else "norm" if split == "upper" else metric_name(value)
    says = _course(title.partition(",")[0], x, y)
    if "best" in marks:
        says += f" The dashed line is the best checkpoint, step {marks['best']:,.0f}."
    return Chart(title, curves(name, [Curve(label, x, y)], label, marks), says)


def _series(lines: Lines, marks: Mapping[str, float]) -> Chart | None:
    """|v_n| at both ends of the series for the inverse Hessian; of one without terms both are the same."""
    first, last = (series(lines, "upper", f"series_{end}") for end in ("first", "last"))
    if not first[0]:
        return None
    drawn = [Curve("first, n = 0", *first, ORANGE), Curve("last, n = K", *last)]
    if first == last:
        says = f"The series has no terms after the first. {_course('|v_0|', *first)}"
        drawn = [Curve("n = 0", *first)]
    else:
        grown = sum(b > a for a, b in zip(first[1], last[1], strict=True))
        says = (
            f"It converges where the last vector is smaller than the first: so it was at "
            f"{len(first[0]) - grown:,} of {len(first[0]):,} upper updates."
        )
    title = "Vectors of the hypergradient's series, |v_n|"
    return Chart(title, curves("series", drawn, "|v_n|", marks), says)


def _cost(summary: Mapping[str, Any]) -> Section:
    passes, speed = summary["backward_passes"], summary["throughput"]
    kinds = {"lower": "Lower: the model", "head": "Head: the extra target head", "upper": "Upper: the hypergradient"}
    counted = {kind: passes.get(kind, 0) for kind in kinds}
    steps = max(summary["steps"], 1)
    rows = [[name, f"{counted[k]:,}", f"{counted[k] / steps:.2f}"] for k, name in kinds.items() if counted[k]]
    total = sum(counted.values())
    rows.append(["Together", f"{total:,}", f"{total / steps:.2f}"])
    if passes.get("predicted") is not None:
        rows.append(["Predicted, lower and upper", f"{passes['predicted']:,}", f"{passes['predicted'] / steps:.2f}"])
    facts = [["Workers", f"{summary['world_size']:,}"], ["Steps", f"{summary['steps']:,}"]]
    if summary["upper_steps"]:
        facts.append(["Upper updates", f"{summary['upper_steps']:,}"])
    facts.append(["Seconds of training", f"{speed['train_s']:,.1f}"])
    if speed["examples_per_s"] is not None:
        both = "Sequences and examples" if "rows" in summary["metrics"]["test"] else "Sequences"
        what = both if "sequences" in summary["data"] else "Examples"
        facts.append([f"{what} a second", f"{speed['examples_per_s']:,.0f}"])
    if speed["stall_share"] is not None:
        facts.append(["Share of it spent waiting for data", f"{speed['stall_share']:.1%}"])
    facts.append(["Seconds waiting for checkpoints", f"{speed['checkpoint_stall_s']:.3f}"])
    if speed.get("replica_fallbacks"):
        facts.append(["Reads that another replica served", f"{speed['replica_fallbacks']:,}"])
    return Section(
        "Cost",
        "Time is that since the last start of the run; seconds of training and speed leave out its first steps.",
        tables=[
            Table("Backward passes", ["Kind", "Passes", "Per step"], rows),
            Table("Time", ["What", "Value"], facts),
        ],
    )


def _data(summary: Mapping[str, Any], manifest: Manifest | None) -> Section:
    data = summary["data"]
    header, rows = ["Split", "Examples"], [[s.capitalize(), f"{n:,}"] for s, n in data["examples"].items()]
    items = data["items"]
    facts = [
        ["Users", f"{data['users']:,}"],
        *([f"{d.capitalize()} items", f"{items[d]:,}"] for d in ("source", "target")),
    ]
    says = "The dataset could not be read when this was written: names and unseen shares are missing."
    if sequences := data.get("sequences"):
        header.insert(2, "Sequences")
        for row, split in zip(rows, data["examples"], strict=True):
            row.append(f"{sequences[split]:,}")
    if manifest is not None:
        header += ["Unseen users", "Unseen items", "Unknown ids"]
        for row, split in zip(rows, data["examples"], strict=True):
            unseen = manifest.unseen.get(split)
            row += [f"{unseen[of]:.1%}" if unseen else "–" for of in ("user", "item")]
            row.append(f"{manifest.unknown[split]:.1%}")
        domains = {"source": manifest.source_domain, "target": manifest.target_domain}
        facts = [["Users", f"{data['users']:,}"]]
        for role, domain in domains.items():
            facts.append([f"Items of {domain} ({role})", f"{items[role]:,}"])
            facts.append([f"Behaviours of {domain} ({role})", f"{manifest.counts[f'{role}_behaviours']:,}"])
        labels = {
            "rating": "Labels are ratings, made likes and dislikes.",
            "sampled": "Labels are behaviours (likes) and sampled negatives.",
        }
        says = (
            f"What happened in {domains['source']} (source) helps to predict {domains['target']} (target). "
            f"{labels.get(manifest.label, '')} Unseen: the training rows have no such user, or item."
        )
    return Section("Data", says, tables=[Table("Rows", header, rows), Table("Size", ["What", "Count"], facts)])
