"""An experiment: data x models x methods x seeds; a run is one choice of each."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cdr_dist.configuration import CONFIGS, TrainConfig, from_words
from cdr_dist.data import storage
from cdr_dist.data.demo import DEMOS
from cdr_dist.errors import UserError, nearest

FOLDER = CONFIGS / "experiment"
Choices = dict[str, list[str]]
"""A dimension: label -> words of jobs/train.py."""


@dataclass(frozen=True)
class Search:
    """Options chosen on validation data before the seeds that are reported: the same trials for everyone."""

    space: dict[str, Any]
    """Option -> [low, high, log | linear | int], or a list of choices."""
    budget: int = 0
    """Trials of every method on every data and model; 0: no search."""
    metric: str = "auc"
    """Of the validation rows; of logloss the smallest is the best."""
    only: dict[str, list[str]] = field(default_factory=dict)
    """Option, or a pattern such as upper.*, -> the methods that search it; the others leave it as it is."""
    together: int = 4
    """Trials that are chosen before the first of them is known: so the choice does not depend on `parallel`."""

    def __post_init__(self) -> None:
        for option, values in self.space.items():
            if not isinstance(values, list) or len(values) < 2:
                raise UserError(f"search.space.{option}: write [low, high, log] or a list of choices")
        if self.together < 1 or self.budget < 0:
            raise UserError("search: budget must not be negative, together at least 1")


@dataclass(frozen=True)
class Experiment:
    """configs/experiment/NAME.yaml. Every dimension: label -> words of jobs/train.py."""

    name: str
    methods: Choices
    title: str = ""
    models: Choices = field(default_factory=dict)
    """Also written as a list of files of configs/model/. None: the default model."""
    data: Choices = field(default_factory=dict)
    """Also written as label: FOLDER. None: data= of the command line."""
    common: list[str] = field(default_factory=list)
    single: str = "target_only"
    """The method that RelaImpr refers to."""
    against: str = "joint"
    """The method that the others are compared with."""
    weights: str = "biao"
    """The method whose weights of source categories are drawn."""
    curve: str = ""
    """An option whose values are drawn as a curve; methods without it become dotted lines."""
    paper: str = ""
    """The table of configs/paper/biao.yaml whose figures stand beside ours."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Options and their values: every method runs with every combination, compared on validation data only."""
    search: Search | None = None

    def __post_init__(self) -> None:
        for pattern, methods in self.search.only.items() if self.search else ():
            for method in methods:
                _known(f"search.only.{pattern}", method, self.methods)

    def expanded(self) -> Choices:
        """The methods with the grid written out; labels are method|key=value|…"""
        combinations = list(itertools.product(*([f"{k}={v}" for v in values] for k, values in self.grid.items())))
        return {"|".join([m, *c]): [*words, *c] for m, words in self.methods.items() for c in combinations}


class Cell(NamedTuple):
    """What the seeds of a mean have in common: labels of three dimensions."""

    data: str
    model: str
    method: str

    def __str__(self) -> str:
        return " / ".join(self)


@dataclass(frozen=True)
class Plan:
    """One run: a choice of every dimension, its words, its folder (local or s3://)."""

    cell: Cell
    seed: int
    run: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.cell} / seed {self.seed}"


def load(name: str) -> Experiment:
    _known("experiment", name, names())
    path = FOLDER / f"{name}.yaml"
    raw = yaml.safe_load(path.read_text())
    try:
        raw["models"] = _models(raw.get("models", {}))
        raw["data"] = {label: _data_words(given) for label, given in raw.get("data", {}).items()}
        raw["search"] = Search(**raw["search"]) if raw.get("search") else None
        return Experiment(name=name, **raw)
    except TypeError as error:
        raise UserError(f"{path}: {str(error).split('__init__() ')[-1]}") from error


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def chosen(
    experiment: Experiment, methods: Sequence[str] = (), models: Sequence[str] = (), data: Sequence[str] = ()
) -> Experiment:
    """Of the methods and models only the named ones (a model may also be any file of configs/model/); on these data."""
    files = {path.stem: [f"model={path.stem}"] for path in sorted((CONFIGS / "model").glob("*.yaml"))}
    every_model = files | experiment.models
    for dimension, labels, known in (("methods", methods, experiment.methods), ("models", models, every_model)):
        for label in labels:
            _known(dimension, label, known)
    return dataclasses.replace(
        experiment,
        methods={m: experiment.methods[m] for m in methods} or experiment.methods,
        models={m: every_model[m] for m in models} or experiment.models or {"conet": ["model=conet"]},
        data=_labelled(data) or experiment.data,
        search=_search_of(experiment.search, methods),
    )


def _search_of(search: Search | None, methods: Sequence[str]) -> Search | None:
    if search is None or not methods:
        return search
    return dataclasses.replace(search, only={p: [m for m in of if m in methods] for p, of in search.only.items()})


def plans(
    experiment: Experiment, seeds: Sequence[int], runs: str, words: Sequence[str], best: Mapping[Cell, list[str]] = {}
) -> list[Plan]:
    """A run for every choice, each in a folder of its own.

    Of words with the same key the last one counts: common, data, model, method, `best` (of a search), command line.
    """
    if not experiment.data:
        raise UserError(f"experiment={experiment.name}: needs data=FOLDER[,FOLDER…], written by jobs/prepare.py")
    found = []
    for seed in seeds:
        for labels in itertools.product(experiment.data, experiment.models, experiment.expanded()):
            cell = Cell(*labels)
            own = [*experiment.data[cell.data], *experiment.models[cell.model], *experiment.expanded()[cell.method]]
            run = storage.join(runs, *(label.replace("|", "_") for label in cell), f"seed-{seed}")
            merged = last_of_each([*experiment.common, *own, *best.get(cell, []), *words])
            found.append(Plan(cell, seed, run, [*merged, f"seed={seed}", f"run={run}"]))
    return found


def check_words(todo: Sequence[Plan]) -> list[TrainConfig]:
    """A configuration of each cell. UserError: an unknown option, or a value that cannot be; nothing started."""
    first: dict[Cell, TrainConfig] = {}
    for plan in todo:
        if plan.cell not in first:
            try:
                first[plan.cell] = from_words(plan.words)
            except UserError as error:
                raise UserError(f"{plan.cell}: {error}") from error
    return list(first.values())


def last_of_each(words: Sequence[str]) -> list[str]:
    chosen: dict[str, str] = {}
    for word in words:
        key, separator, _ = word.partition("=")
        if not separator:
            raise UserError(f"'{word}': options are written key=value")
        chosen[key] = word
    return list(chosen.values())


def _models(given: Any) -> Choices:
    return {m: [f"model={m}"] for m in given} if isinstance(given, list) else given


def _data_words(given: Any) -> list[str]:
    return [f"data={_absolute(given)}"] if isinstance(given, str) else given


def _labelled(folders: Sequence[str]) -> Choices:
    """Datasets by the names of their folders."""
    found: Choices = {}
    for folder in folders:
        label = folder.rstrip("/").rpartition("/")[2]
        if label in found:
            raise UserError(f"data={','.join(folders)}: two folders are called {label}; rename one of them")
        found[label] = _data_words(folder)
    return found


def _absolute(data: str) -> str:
    """Runs may take place elsewhere, and in one folder whatever the path was typed as."""
    return data if data in DEMOS or "://" in data else str(Path(data).expanduser().absolute())


def _known(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in known:
        raise UserError(f"{what}={name}: unknown; {nearest(name, list(known))}")
