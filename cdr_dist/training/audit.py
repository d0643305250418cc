"""The work of jobs/audit.py: raw logs or datasets in, the answer to "should I transfer?" out.

Everything is tuned alike: popularity has nothing to tune, every other method has as many trials of a search on
validation data, on a seed that is not reported. The answer is about all users of the target (users=target), those that
no source knows included; several sources share them and the test rows, and are tried together, too.
"""

from __future__ import annotations

import io
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from cdr_dist.configuration import of_prepare_and_train
from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import options_from_words
from cdr_dist.data.words import apart, whole_number
from cdr_dist.errors import UserError
from cdr_dist.evaluation import verdict
from cdr_dist.evaluation.audit_page import Answer
from cdr_dist.evaluation.popularity import popularity, training_behaviours
from cdr_dist.evaluation.verdict import Category, OfSource, Rows, Tried
from cdr_dist.training import experiment_runs
from cdr_dist.training.experiment import Experiment, Plan, Search, check_words, plans
from cdr_dist.training.experiment_runs import Outcome, Places, check_parallel, parallel_of, run_all
from cdr_dist.training.run_folder import SCORES
from cdr_dist.training.search import search_all

OWN = {"seeds": "3", "first_seed": "8", "budget": "6", "parallel": "auto", "model": "conet", "out": "", "data": ""}
SPACE: dict[str, Any] = {
    "tables.lr": [0.05, 0.3, "log"],
    "dense.lr": [0.0005, 0.005, "log"],
    "upper.gamma0": [0.25, 1.0, 3.0],
}
TRANSFER = {m: [f"recipe={m}"] for m in ("source_features", "joint", "biao")}
COMMON = ["trainer.workers=0", "trainer.checkpoint_every=0", "trainer.epochs=50", "evaluation.patience=8"]
"""Time enough for every method: a learning curve that rests for a while is no end yet."""


@dataclass(frozen=True)
class Request:
    """The words of the job, read. data: name -> dataset folder, the first one's target is everybody's."""

    data: dict[str, str]
    model: str
    seeds: range
    budget: int
    parallel: str
    out: Path
    words: list[str]


def audit_job(words: Sequence[str]) -> None:
    """Words: source= target= (and any option of prepare), or data=; seeds= budget= model= out=; any option of train."""
    request = request_of(words)
    found, singles, _, lost = audit(request)
    request.out.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "jobs/audit.py", *words])
    transfer = verdict.recommended(found) is not None
    answer = Answer(transfer, verdict.sentence(found), verdict.tables(singles, found), notes(request, lost), command)
    (request.out / "audit.md").write_text(answer.markdown())
    (request.out / "audit.html").write_text(answer.html())
    (request.out / "audit.json").write_text(json.dumps(verdict.to_json(found), indent=1) + "\n")
    print(f"{answer.markdown()}\n{request.out}/audit.html")


def request_of(words: Sequence[str]) -> Request:
    """The words read; of raw logs, datasets are prepared first. UserError: a word that is nobody's, too few sources."""
    given, rest = apart(words, OWN)
    of_prepare, of_train = of_prepare_and_train(rest)
    of_train = [word for word in of_train if not word.startswith("seed=")]  # a run's is one of `seeds`
    least = {"seeds": 2, "first_seed": 1, "budget": 1}
    numbers = {name: whole_number(name, given[name], of) for name, of in least.items()}
    check_parallel(given["parallel"])
    if "://" in given["out"]:
        raise UserError(f"out={given['out']}: must be a folder here, or on a disk that all machines share")
    logs = [word for word in of_prepare if word.startswith(("source=", "target="))]
    if bool(given["data"]) == bool(logs):
        raise UserError("give source= and target=, or data=FOLDER[,FOLDER…] of jobs/prepare.py")
    out = Path(given["out"] or "runs/audit").expanduser().absolute()
    _check_words(given["model"], of_train)
    data = _datasets(given["data"], of_prepare) if given["data"] else _prepared(of_prepare, out / "datasets")
    _check_same_target(data)
    return Request(
        data,
        given["model"],
        range(numbers["first_seed"], numbers["first_seed"] + numbers["seeds"]),
        numbers["budget"],
        given["parallel"],
        out,
        of_train,
    )


def _check_words(model: str, words: Sequence[str]) -> None:
    """UserError: a word that no run can take; before anything is prepared."""
    of_any = {"any": ["data=any"]}
    for one in _experiments(of_any, model, "rating", 1):
        check_words(plans(one, [0], "any", words))


def _datasets(given: str, of_prepare: Sequence[str]) -> dict[str, str]:
    if only := [word for word in of_prepare if not of_prepare_and_train([word])[1]]:
        raise UserError(f"{only[0]}: is of jobs/prepare.py; data= names datasets that are prepared already")
    folders = [dataset_of(folder) for folder in given.split(",")]
    found = {folder.rstrip("/").rpartition("/")[2]: folder for folder in folders}
    if len(found) < len(folders):
        raise UserError(f"data={given}: two folders have one name; rename one of them")
    return {name: storage.absolute(f) for name, f in found.items()}


def _prepared(words: Sequence[str], folder: Path) -> dict[str, str]:
    """A dataset for every source, and where there are several, one of all of them."""
    named = dict(word.split("=", 1) for word in words)
    logs, count = named.get("source", "").split(","), len(named.get("source", "").split(","))
    named.setdefault("users", "target")
    of_each = {key: named[key].split(",") for key in ("source_items", "source_domain") if named.get(key)}
    found: dict[str, str] = {}
    for number in [*range(count), *([None] if count > 1 else [])]:
        own = dict(named)
        if number is not None:
            own |= {"source": logs[number]} | {key: of[number] for key, of in of_each.items() if len(of) == count}
        name = _name(own) if number is not None else " + ".join(found)
        out = folder / name.replace(" + ", "+")
        prepare(options_from_words([f"{key}={value}" for key, value in own.items() if value] + [f"out={out}"]))
        found[name] = str(out)
    return found


def _name(words: dict[str, str]) -> str:
    from cdr_dist.data.sources import formats

    return words.get("source_domain") or formats.of(words.get("format", "table")).domain_name(words.get("source", ""))


def _check_same_target(data: dict[str, str]) -> None:
    manifests = {name: read_manifest(folder) for name, folder in data.items()}
    first, *others = manifests.items()
    for name, other in others:
        for split in ("valid", "test"):
            if other.examples(split) != first[1].examples(split) or other.label != first[1].label:
                raise UserError(
                    f"{first[0]} and {name} have other {split} rows, so no answer could compare them: prepare both of "
                    "the same target log with users=target and the same options"
                )


def experiments(request: Request, label: str) -> tuple[Experiment, Experiment]:
    """The single-domain methods on the first dataset, and those of transfer on all of them."""
    data = {name: [f"data={folder}"] for name, folder in request.data.items()}
    return _experiments(data, request.model, label, request.budget)


def _experiments(data: dict[str, list[str]], model: str, label: str, budget: int) -> tuple[Experiment, Experiment]:
    singles = {
        "BPR-MF" if label == "sampled" else "MF": [
            "model=mf",
            "recipe=target_only",
            f"model.loss={'bpr' if label == 'sampled' else 'bce'}",
        ],
        "target_only": ["recipe=target_only"],
    }
    models = {model: [f"model={model}"]}

    def of(name: str, methods: dict[str, list[str]], on: dict[str, list[str]]) -> Experiment:
        only = {
            "upper.gamma0": [m for m in methods if m in ("joint", "biao")],
            "dense.lr": [m for m in methods if not m.endswith("MF")],
        }
        space = {option: values for option, values in SPACE.items() if only.get(option, methods)}
        search = Search(space, budget, only={o: m for o, m in only.items() if o in space}, together=2)
        return Experiment(name, methods, models=models, data=on, common=COMMON, search=search)

    first = next(iter(data))
    return of("single", singles, {first: data[first]}), of("transfer", TRANSFER, data)


class Audited(NamedTuple):
    """What an audit found, on which test rows; lost: the runs that did not come through, and why."""

    found: list[OfSource]
    singles: list[Tried]
    rows: Rows
    lost: list[str]


def audit(request: Request, places: Places | None = None) -> Audited:
    """Runs what is missing, and judges. UserError: a method none of whose runs came through."""
    folder = next(iter(request.data.values()))
    manifest = read_manifest(folder)
    rows = popularity(folder, manifest, "test")
    of_user = training_behaviours(folder, manifest)
    known = Rows(rows.user, rows.label, of_user[rows.user])
    valid = popularity(folder, manifest, "valid")
    popular = Tried("popularity", [valid.compute()["auc"]], [rows.compute()["auc"]], rows.score[None])
    done: dict[tuple[str, str], list[Outcome]] = {}
    of_words: dict[tuple[str, str], str] = {}
    both = experiments(request, manifest.label)
    runs = {one.name: str(request.out / "runs" / one.name) for one in both}
    seed = request.seeds.start - 1
    configs = [c for one in both for c in check_words(plans(one, [seed], runs[one.name], request.words))]
    places = places or experiment_runs.places_of(configs, request.parallel)
    try:
        at_once = parallel_of(request.parallel, configs, places.room())
        for one in both:

            def run(todo: list[Plan]) -> list[Outcome]:
                return run_all(todo, places, at_once)

            best = search_all(one, seed, runs[one.name], request.words, request.out / f"search-{one.name}", run)
            words = {cell: found.words for cell, found in best.items()}
            for outcome in run_all(plans(one, request.seeds, runs[one.name], request.words, words), places, at_once):
                key = outcome.plan.cell.data, outcome.plan.cell.method
                done.setdefault(key, []).append(outcome)
                of_words[key] = " ".join(words[outcome.plan.cell])
    finally:
        places.close()
    first = next(iter(request.data))
    singles = [popular, *(_tried(done[first, m], of_words[first, m], rows) for m in both[0].methods)]
    found = []
    for name, own in request.data.items():
        tried = [_tried(done[name, m], of_words[name, m], rows) for m in TRANSFER]
        categories = _categories(own, read_manifest(own), done[name, "biao"])
        found.append(verdict.judge(name, known, singles, tried, categories, len(request.data)))
    every = [outcome for outcomes in done.values() for outcome in outcomes]
    lost = [f"{o.plan}: {o.ended.failure}" for o in every if o.summary is None]
    return Audited(found, singles, known, lost)


def _tried(outcomes: Sequence[Outcome], words: str, rows: Any) -> Tried:
    """The seeds that came through."""
    good = [o for o in outcomes if o.summary is not None]
    cell = outcomes[0].plan.cell
    if not good:
        raise UserError(f"{cell}: no run came through: {outcomes[0].ended.failure}")
    scores = []
    for outcome in good:
        frame = pl.read_parquet(io.BytesIO(storage.read_bytes(storage.join(outcome.plan.run, SCORES))))
        same = np.array_equal(frame["user"].to_numpy(), rows.user) and np.array_equal(frame["label"], rows.label)
        if not same:
            raise UserError(f"{cell}: has other test rows than {next(iter(outcomes)).plan.cell.data}")
        scores.append(frame["score"].to_numpy())
    summaries = [o.summary for o in good if o.summary is not None]

    def mean(of: str, *names: str) -> float:
        return float(np.mean([sum(s[of][n] or 0.0 for n in names) for s in summaries]))

    return Tried(
        cell.method,
        [s["metrics"]["valid"]["auc"] for s in summaries],
        [s["metrics"]["test"]["auc"] for s in summaries],
        np.stack(scores),
        mean("throughput", "train_s"),
        mean("backward_passes", "lower", "head", "upper"),
        words,
        tuple(o.plan.seed for o in good),
    )


def _categories(folder: str, manifest: Manifest, outcomes: Sequence[Outcome]) -> list[Category]:
    """BIAO's mean weights over seeds, relative to the mean over all behaviours, with a t interval."""
    from scipy.stats import t

    uri = storage.join(folder, manifest.vocab["source_category"].path)
    names = pl.read_parquet(io.BytesIO(storage.read_bytes(uri))).rename({"id": "category"})
    frames = []
    for outcome in outcomes:
        if outcome.summary is not None:
            frame = pl.read_parquet(io.BytesIO(storage.read_bytes(storage.join(outcome.plan.run, "weights.parquet"))))
            mean = np.average(frame["weight"], weights=frame["behaviours"])
            frames.append(frame.select("category", "behaviours", pl.col("weight") / mean))
    named = names.with_columns(pl.col("category").cast(pl.Int64))
    found = []
    for (key,), part in pl.concat(frames).join(named, on="category").group_by("key"):
        weights, n = part["weight"].to_numpy(), part.height
        mean, half = float(weights.mean()), math.inf
        if n > 1:
            half = float(t.ppf(0.975, n - 1) * weights.std(ddof=1) / math.sqrt(n))
        behaviours = round(float(part["behaviours"].to_numpy().mean()))  # drawn by each seed for itself
        found.append(Category(str(key), behaviours, mean, mean - half, mean + half))
    return found


def notes(request: Request, lost: Sequence[str]) -> str:
    sources, several = len(request.data), ""
    if sources > 1:
        several = (
            f" Those of sources are {verdict.level_of(sources):.1%} ones, so that all {sources} hold together at 95%."
        )
    failed = f" Failed, and left out with their seeds: {'; '.join(lost)}." if lost else ""
    return (
        f"Seeds {request.seeds.start} to {request.seeds.stop - 1}; {request.budget} trials of a search on validation "
        f"data for every method, on seed {request.seeds.start - 1}. A source's method and its opponent are the best on "
        "validation data; gains are measured on test data, by a paired bootstrap over users and seeds. "
        f'"not shown": the interval holds 0.{several} A source does harm where the same backbone is better without it. '
        f"A weight of 1 is what joint training gives every behaviour.{failed}"
    )
