"""Methods x seeds: runs what is missing, then a table with means, deviations, RelaImpr and paired tests."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import yaml
from tqdm import tqdm

from cdr_dist.configuration import CONFIGS
from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.significance import paired_bootstrap
from cdr_dist.evaluation.table import markdown, result_table
from cdr_dist.training.run_folder import SCORES


@dataclass(frozen=True)
class Experiment:
    """configs/experiment/NAME.yaml. methods: label -> words of jobs/train.py."""

    name: str
    methods: dict[str, list[str]]
    common: list[str] = field(default_factory=list)
    single: str = "target_only"
    """The method that RelaImpr refers to."""
    against: str = "joint"
    """The method that the others are compared with."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Options and their values: every method runs with every combination, compared on validation data only."""

    def expanded(self) -> dict[str, list[str]]:
        """The methods with the grid written out; labels are method|key=value|…"""
        combinations = list(itertools.product(*([f"{k}={v}" for v in values] for k, values in self.grid.items())))
        return {"|".join([m, *c]): [*words, *c] for m, words in self.methods.items() for c in combinations}


@dataclass(frozen=True)
class Plan:
    """One run: a label, a seed, and its words."""

    method: str
    seed: int
    run: Path
    words: list[str]


def load(name: str) -> Experiment:
    known = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
    if name not in known:
        raise UserError(f"experiment={name}: unknown experiment; {nearest(name, known)}")
    return Experiment(name=name, **yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text()))


def chosen(experiment: Experiment, methods: Sequence[str]) -> Experiment:
    """Only the named methods."""
    for name in methods:
        if name not in experiment.methods:
            raise UserError(f"methods={name}: {nearest(name, list(experiment.methods))}")
    return dataclasses.replace(experiment, methods={m: experiment.methods[m] for m in methods})


def plans(experiment: Experiment, seeds: Sequence[int], out: Path, words: Sequence[str]) -> list[Plan]:
    """One run a method and seed, in a folder of its own; words of the command line win over the experiment's."""
    found = []
    for seed in seeds:
        for method, own in experiment.expanded().items():
            run = out / method.replace("|", "_") / f"seed-{seed}"
            chosen: dict[str, str] = {}
            for word in [*experiment.common, *own, *words]:
                key, separator, _ = word.partition("=")
                if not separator:
                    raise UserError(f"'{word}': options are written key=value")
                chosen[key] = word
            found.append(Plan(method, seed, run, [*chosen.values(), f"seed={seed}", f"run={run}"]))
    return found


def run_all(todo: Sequence[Plan], parallel: int) -> list[dict[str, Any]]:
    """Trains every plan, `parallel` processes at a time; finished ones are read. Summaries in the order of plans."""
    context = multiprocessing.get_context("spawn")
    summaries: dict[Plan_key, dict[str, Any]] = {}
    with ProcessPoolExecutor(parallel, mp_context=context) as pool, tqdm(total=len(todo), unit="run") as bar:
        futures = {pool.submit(run_one, plan.words): plan for plan in todo}
        for future in as_completed(futures):
            plan = futures[future]
            try:
                summary = future.result()
            except UserError as error:
                pool.shutdown(cancel_futures=True)
                raise UserError(f"{plan.method} seed {plan.seed}: {error}") from error
            summaries[plan.method, plan.seed] = summary | {"recipe": plan.method}
            bar.set_postfix_str(f"{plan.method} seed {plan.seed} valid AUC {summary['metrics']['valid']['auc']:.4f}")
            bar.update()
    return [summaries[plan.method, plan.seed] for plan in todo]


Plan_key = tuple[str, int]


def run_one(words: list[str]) -> dict[str, Any]:
    from cdr_dist.configuration import from_words
    from cdr_dist.data.demo import dataset_of
    from cdr_dist.training.launch import train

    config = from_words(words)
    return train(config, dataset_of(config.data), quiet=True)


def report(experiment: Experiment, todo: Sequence[Plan], summaries: Sequence[dict[str, Any]]) -> str:
    """The table over seeds, and the paired bootstrap of each method against `against`."""
    if experiment.grid:
        return _search_table(todo, summaries)
    present = {plan.method for plan in todo}
    single = experiment.single if experiment.single in present else None
    against = experiment.against if experiment.against in present else None
    metrics = ["auc", "logloss"]
    parts = [result_table(summaries, metrics=metrics, single=single or "", against=against)] if single else []
    if not parts:
        parts = [result_table(summaries, metrics=metrics, against=against)]
    if against is not None and len(present) > 1:
        parts.append(_bootstrap_table(todo, against))
    seconds: dict[str, list[float]] = {}
    for plan, summary in zip(todo, summaries, strict=True):
        seconds.setdefault(plan.method, []).append(summary["throughput"]["train_s"] or 0.0)
    parts.append("Training seconds (mean): " + ", ".join(f"{m} {np.mean(s):.1f}" for m, s in seconds.items()))
    return "\n\n".join(parts)


def _search_table(todo: Sequence[Plan], summaries: Sequence[dict[str, Any]]) -> str:
    """Every combination by its mean validation AUC, each method's best first; test metrics are not looked at."""
    found: dict[str, list[float]] = {}
    for plan, summary in zip(todo, summaries, strict=True):
        found.setdefault(plan.method, []).append(summary["metrics"]["valid"]["auc"])
    ranked = sorted(found, key=lambda m: (m.split("|")[0], -float(np.mean(found[m]))))
    rows = [[m.replace("|", " "), f"{np.mean(found[m]):.4f}", f"{np.std(found[m]):.4f}"] for m in ranked]
    return "Validation AUC, mean over seeds:\n" + markdown(["method and options", "mean", "sd"], rows)


def _bootstrap_table(todo: Sequence[Plan], against: str) -> str:
    by_method: dict[str, list[Plan]] = {}
    for plan in todo:
        by_method.setdefault(plan.method, []).append(plan)
    base = _scores(by_method[against])
    rows = []
    for method, runs in by_method.items():
        if method == against:
            continue
        mine = _scores(runs)
        found = paired_bootstrap(base["user"], base["label"], mine["score"], base["score"])
        rows.append([method, f"{found.difference:+.4f}", f"{found.low:+.4f} … {found.high:+.4f}", f"{found.p:.3f}"])
    title = f"Test AUC minus that of {against}, mean over seeds; paired bootstrap over users and seeds:\n"
    return title + markdown(["method", "difference", "95% interval", "p"], rows)


def _scores(runs: Sequence[Plan]) -> dict[str, Any]:
    """user, label [rows] and score [seeds, rows] of the test split."""
    frames = [pl.read_parquet(plan.run / SCORES) for plan in runs]
    return {
        "user": frames[0]["user"].to_numpy(),
        "label": frames[0]["label"].to_numpy(),
        "score": np.stack([f["score"].to_numpy() for f in frames]),
    }


def experiment_job(words: Sequence[str]) -> None:
    """Words: experiment= methods= seeds= out= parallel= first_seed=, and any word of jobs/train.py for all runs."""
    given = {"seeds": "5", "first_seed": "8", "parallel": "1"}
    rest = []
    for word in words:
        key, _, value = word.partition("=")
        if key in ("experiment", "out", "methods", *given):
            given[key] = value
        else:
            rest.append(word)
    if "experiment" not in given:
        raise UserError("experiment= is missing; see --help")
    numbers = {}
    for key in ("seeds", "first_seed", "parallel"):
        if not given[key].isdigit() or (key != "first_seed" and given[key] == "0"):
            raise UserError(f"{key}={given[key]}: must be a whole number, at least {int(key != 'first_seed')}")
        numbers[key] = int(given[key])
    experiment = load(given["experiment"])
    if "methods" in given:
        experiment = chosen(experiment, given["methods"].split(","))
    out = Path(given.get("out") or f"runs/experiments/{experiment.name}").absolute()
    seeds = range(numbers["first_seed"], numbers["first_seed"] + numbers["seeds"])
    todo = plans(experiment, seeds, out, rest)
    summaries = run_all(todo, numbers["parallel"])
    text = report(experiment, todo, summaries)
    (out / "table.md").write_text(text + "\n")
    (out / "summaries.json").write_text(json.dumps(summaries, indent=1))
    print(f"{text}\n\n{out}/table.md")
