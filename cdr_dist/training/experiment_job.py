"""The work of jobs/experiment.py: words in; runs, searches and a report out."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from cdr_dist.configuration import CONFIGS, from_words
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.demo import DEMOS, folder_of
from cdr_dist.data.words import apart, whole_number
from cdr_dist.errors import Stopped, UserError
from cdr_dist.evaluation.experiment_report import write_report
from cdr_dist.evaluation.experiment_tables import Findings, Run, grid_table
from cdr_dist.evaluation.paper import Paper, load_paper
from cdr_dist.jobs import DONE, FAILED, USERS_MISTAKE
from cdr_dist.training import experiment_runs
from cdr_dist.training.experiment import Cell, Experiment, Plan, check_words, chosen, load, plans
from cdr_dist.training.experiment_runs import Outcome, Places, check_parallel, parallel_of, run_all
from cdr_dist.training.run_folder import SCORES, RunFolder
from cdr_dist.training.search import Best, chosen_yaml, ends, search_all

PAPERS = CONFIGS / "paper"
WEIGHTS, BY_LENGTH = "weights.parquet", "weights_by_length.parquet"
NUMBERS = {"seeds": 1, "first_seed": 0, "budget": 0}
"""Options that are whole numbers, and the least that each may be."""
LISTS = ("methods", "models", "data", "paper")
OWN = dict.fromkeys(("experiment", "out", "runs", *NUMBERS, *LISTS), "")
OWN |= {"seeds": "5", "first_seed": "8", "parallel": "auto"}
"""The job's own options and their defaults; empty: the experiment's."""


@dataclass(frozen=True)
class Request:
    """The words of the job, read."""

    experiment: Experiment
    seeds: range
    out: Path
    runs: str
    """Where run folders lie: local or s3://. Experiments that share it share the runs that they have in common."""
    parallel: str
    others: list[str]
    """Scenarios of the paper to list, whatever the data are."""
    words: list[str]
    """For every run."""

    @property
    def search_seed(self) -> int:
        return self.seeds.start - 1


def read_words(words: Sequence[str]) -> Request:
    words = [word.replace("model=", "models=", 1) if word.startswith("model=") else word for word in words]
    given, rest = apart(words, OWN)
    if not given["experiment"]:
        raise UserError("experiment= is missing; see --help")
    numbers = {name: whole_number(name, given[name], NUMBERS[name]) for name in NUMBERS if given[name] or OWN[name]}
    check_parallel(given["parallel"])
    lists = {name: given[name].split(",") if given[name] else [] for name in LISTS}
    experiment = load(given["experiment"])
    experiment = chosen(experiment, lists["methods"], lists["models"], lists["data"])
    experiment = _with_budget(experiment, numbers.get("budget"))
    out = Path(given["out"] or f"runs/experiments/{experiment.name}").expanduser().absolute()
    runs = given["runs"] or str(out / "runs")
    request = Request(
        experiment=experiment,
        seeds=range(numbers["first_seed"], numbers["first_seed"] + numbers["seeds"]),
        out=out,
        runs=storage.absolute(runs),
        parallel=given["parallel"],
        others=lists["paper"],
        words=rest,
    )
    if experiment.search is not None and request.search_seed < 0:
        raise UserError("first_seed=0: a search takes the seed before it; give at least 1")
    return request


def _with_budget(experiment: Experiment, budget: int | None) -> Experiment:
    """The experiment with that many trials; a search of none is none."""
    search = experiment.search
    if budget and search is None:
        raise UserError(f"budget={budget}: configs/experiment/{experiment.name}.yaml has no search")
    if search is not None and budget is not None:
        search = dataclasses.replace(search, budget=budget)
    if search is not None and experiment.grid and search.budget:
        raise UserError(f"experiment={experiment.name}: has a grid and a search; leave one of them out")
    return dataclasses.replace(experiment, search=search if search and search.budget else None)


def experiment_job(words: Sequence[str], places: Places | None = None) -> int:
    """The exit code: 0, 1 where some run failed, 2 where all failed by the user's mistake."""
    request = read_words(words)
    experiment = request.experiment
    todo = plans(experiment, request.seeds, request.runs, request.words)
    configs = check_words(todo)
    check_words(_ends_of_search(request))
    paper = load_paper(PAPERS, experiment.paper) if experiment.paper else None
    if request.others and paper is None:
        raise UserError(f"paper=: experiment={experiment.name} is no table of the paper")
    others = [paper.checked(scenario) for scenario in request.others] if paper else []
    domains = {label: _domains(words) for label, words in experiment.data.items()}
    request.out.mkdir(parents=True, exist_ok=True)
    with _stopped_by_sigterm():
        places = places or experiment_runs.places_of(configs, request.parallel)
        try:
            at_once = parallel_of(request.parallel, configs, places.room())
            best = _searched(request, places, at_once) if experiment.search else {}
            chosen_words = {cell: found.words for cell, found in best.items()}
            todo = plans(experiment, request.seeds, request.runs, request.words, chosen_words)
            outcomes = run_all(todo, places, at_once)
        finally:
            places.close()
    findings = _findings(request, outcomes, best, paper, others, domains, words)
    summaries = [outcome.summary for outcome in outcomes if outcome.summary is not None]
    (request.out / "summaries.json").write_text(json.dumps(summaries, indent=1))
    if experiment.grid:
        text = grid_table(findings.rows, findings.main)
        (request.out / "table.md").write_text(text + "\n")
        print(f"{text}\n\n{request.out}/table.md")
    else:
        print(f"{write_report(findings, request.out)}\n\n{request.out}/report.html")
    return exit_code(outcomes)


def exit_code(outcomes: Sequence[Outcome]) -> int:
    failed = [outcome.ended for outcome in outcomes if outcome.ended.summary is None]
    if not failed:
        return DONE
    print(
        f"experiment: {len(failed)} of {len(outcomes)} runs failed; the same command tries them again", file=sys.stderr
    )
    return USERS_MISTAKE if len(failed) == len(outcomes) and all(ended.mistake for ended in failed) else FAILED


def _ends_of_search(request: Request) -> list[Plan]:
    """A plan for every value at the end of a searched range, only to be checked."""
    search = request.experiment.search
    if search is None:
        return []
    todo = plans(request.experiment, [request.search_seed], request.runs, request.words)
    found = []
    for plan in {plan.cell.method: plan for plan in todo}.values():
        for number, words in enumerate(ends(search, plan.cell.method)):
            cell = plan.cell._replace(method=f"{plan.cell.method}, search.space {number}")
            found.append(Plan(cell, plan.seed, plan.run, [*plan.words, *words]))
    return found


def _searched(request: Request, places: Places, at_once: int) -> dict[Cell, Best]:
    def run(todo: list[Plan]) -> list[Outcome]:
        return run_all(todo, places, at_once)

    experiment = request.experiment
    assert experiment.search is not None
    best = search_all(experiment, request.search_seed, request.runs, request.words, request.out, run)
    text = yaml.safe_dump(chosen_yaml(best, experiment.search.metric), sort_keys=False, allow_unicode=True)
    (request.out / "best.yaml").write_text(text)
    return best


def _findings(
    request: Request,
    outcomes: Sequence[Outcome],
    best: dict[Cell, Best],
    paper: Paper | None,
    others: list[str],
    domains: dict[str, tuple[str, str] | None],
    words: Sequence[str],
) -> Findings:
    experiment, search = request.experiment, request.experiment.search
    scenarios = {label: paper.scenario(*of) for label, of in domains.items() if of} if paper else {}
    how = ""
    if search is not None:
        how = (
            f"{search.budget} trials (TPE) for every method, data and model, on seed {request.search_seed}, which is "
            f"none of the reported; best validation {search.metric}."
        )
    return Findings(
        name=experiment.name,
        title=experiment.title,
        metrics=experiment.metrics,
        beginnings=sorted(experiment.beginnings),
        runs=[_run(outcome) for outcome in outcomes],
        single=experiment.single,
        against=experiment.against,
        highlighted=experiment.weights,
        curve=experiment.curve,
        points=_points(experiment),
        learning_curve=experiment.learning_curve,
        paper=paper,
        scenarios={label: scenario for label, scenario in scenarios.items() if scenario},
        others=others,
        chosen={cell: _told(found, search.metric) for cell, found in best.items()} if search else {},
        searched=how,
        categories={label: _categories(words) for label, words in experiment.data.items()},
        command=shlex.join(["python", "jobs/experiment.py", *words]),
    )


def _told(found: Best, metric: str) -> str:
    failed = f", {found.failed} failed" if found.failed else ""
    return f"{' '.join(found.words)} (valid {metric} {found.value:.4f}, trial {found.trial} of {found.trials}{failed})"


def _run(outcome: Outcome) -> Run:
    plan, summary = outcome.plan, outcome.summary

    def file(name: str) -> str:
        uri = storage.join(plan.run, name)
        return uri if summary is not None and storage.exists(uri) else ""

    lines = RunFolder(plan.run).lines() if summary is not None else []
    validations = [line["values"] for line in lines if line["split"] == "valid"]
    files = file(SCORES), file(WEIGHTS), file(BY_LENGTH)
    return Run(*plan.cell, plan.seed, summary, outcome.ended.failure, *files, validations)


def _points(experiment: Experiment) -> dict[str, float]:
    """Of the methods that set the curve's option, its value."""
    found = {}
    for method, words in experiment.methods.items():
        for key, _, value in (word.partition("=") for word in words):
            if experiment.curve and key == experiment.curve:
                found[method] = float(value)
    return found


def _folder(words: Sequence[str]) -> str:
    """The dataset that a choice of data names; the demo's may not be there yet."""
    data = from_words(words).data
    return folder_of(data)


def _domains(words: Sequence[str]) -> tuple[str, str] | None:
    """Source and target. UserError: no dataset there; None: the demo, which is written on first use."""
    folder = _folder(words)
    if from_words(words).data in DEMOS:
        return None
    manifest = read_manifest(folder)
    return manifest.source_domain, manifest.target_domain


def _categories(words: Sequence[str]) -> dict[int, str]:
    uri = storage.join(_folder(words), "vocab", "source_category.parquet")
    if not storage.exists(uri):
        return {}
    frame = pl.read_parquet(io.BytesIO(storage.read_bytes(uri)), columns=["id", "key"])
    return dict(zip(frame["id"].to_list(), frame["key"].to_list(), strict=True))


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM asks the runs to stop after their steps, and ends the job."""

    def stop(number: int, _: Any) -> None:
        raise Stopped("stopped; the same command continues", number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
