"""The work of jobs/demo.py: joint training and BIAO on the demo data, side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cdr_dist.configuration import from_words
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.truth import KINDS
from cdr_dist.evaluation.table import markdown
from cdr_dist.training.launch import cluster, train

RECIPES = ("joint", "biao")


def demo_job(words: Sequence[str]) -> None:
    out = next((w.partition("=")[2] for w in words if w.startswith("out=")), "runs/demo")
    rest = [w for w in words if not w.startswith("out=")]
    configs = {r: from_words(["data=demo", f"recipe={r}", *rest, f"run={out}/{r}"]) for r in RECIPES}
    rows, found = [], {}
    with cluster(configs["biao"].trainer.workers):
        for recipe, config in configs.items():
            start = time.perf_counter()
            summary = train(config, dataset_of(config.data))
            found[recipe] = summary
            test = summary["metrics"]["test"]
            seconds = f"{time.perf_counter() - start:.0f} s"
            run = str(Path(config.run).absolute())
            rows.append([recipe, f"{test['auc']:.4f}", f"{test['logloss']:.4f}", seconds, run])
    print("\n" + markdown(["recipe", "test AUC", "logloss", "time", "run"], rows))
    print("\n" + what_the_weights_found(found["biao"]))
    print(f"\nA page of each run: {out}/biao/report.html      Your own data: see README.md")


def what_the_weights_found(summary: dict[str, Any]) -> str:
    """One line: mean weight of each planted kind of source behaviour."""
    weights = summary["weights"]
    if not weights["truth"]:
        return f"Mean weight of a source behaviour: {weights['mean']:.2f} (joint: 1)"
    means = weights["truth"]["mean_weight"]
    parts = ", ".join(f"{kind} {means[kind]:.2f}" for kind in KINDS if kind in means)
    return (
        f"BIAO's mean weight of source behaviours planted as: {parts} (joint: 1 each); "
        f"AUC of weight against helpful: {weights['truth']['auc']:.2f}"
    )
