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
from cdr_dist.data.words import pair_of
from cdr_dist.errors import UserError, nearest
from cdr_dist.training.options import smaller_is_better

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
    """configs/experiment/NAME.yaml. Every dimension: label -> words of jobs/train.py.

    With `like: OTHER` a file adds to another one's: methods, starts and common words are joined, its own settings win;
    title, paper and search are not taken over. `only: [METHOD, …]` then keeps these methods. `search: {like: OTHER}` is
    another one's search, where its own settings win, pattern by pattern in `search.only`.
    """

    name: str
    methods: Choices
    title: str = ""
    models: Choices = field(default_factory=dict)
    """Also written as a list of files of configs/model/. None: the default model."""
    data: Choices = field(default_factory=dict)
    """Also written as label: FOLDER. None: data= of the command line."""
    common: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=lambda: ["auc", "logloss"])
    """Of the test split: the columns of the tables. Methods are compared by the first, of which more must be better."""
    starts: dict[str, str] = field(default_factory=dict)
    """Method -> the method whose run of the same data, model and seed it starts from (warm_start.run). That one is only
    a beginning: it has no row of its own, and runs without the grid and the search."""
    single: str = "target_only"
    """The method that RelaImpr refers to."""
    against: str = "joint"
    """The method that the others are compared with."""
    weights: str = "biao"
    """The method whose weights of source categories are drawn."""
    curve: str = ""
    """An option whose values are drawn as a curve; methods without it become dotted lines."""
    learning_curve: str = ""
    """A validation metric that is drawn over a run's validations, a line a method."""
    paper: str = ""
    """FILE/TABLE, a table of configs/paper/FILE.yaml: its figures stand beside ours."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Options and their values: every method runs with every combination, compared on validation data only."""
    search: Search | None = None

    def __post_init__(self) -> None:
        for pattern, methods in self.search.only.items() if self.search else ():
            for method in methods:
                _known(f"search.only.{pattern}", method, self.methods)
        for method, start in self.starts.items():
            _known("starts", method, self.methods)
            _known(f"starts.{method}", start, self.methods)
            if start in self.starts:
                raise UserError(f"starts.{method}: {start} starts from {self.starts[start]} itself")
        if not self.metrics or smaller_is_better(self.metrics[0]):
            raise UserError(f"metrics={self.metrics}: begin with one of which more is better, such as auc")

    @property
    def beginnings(self) -> set[str]:
        """The methods that others start from."""
        return set(self.starts.values())

    def expanded(self) -> Choices:
        """The methods with the grid written out; labels are method|key=value|…"""
        combinations = list(itertools.product(*([f"{k}={v}" for v in values] for k, values in self.grid.items())))
        return {
            "|".join([method, *more]): [*words, *more]
            for method, words in self.methods.items()
            for more in ([()] if method in self.beginnings else combinations)
        }


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
    start: str = ""
    """The run that it starts from and waits for; '' where there is none."""

    def __str__(self) -> str:
        return f"{self.cell} / seed {self.seed}"


def load(name: str) -> Experiment:
    _known("experiment", name, names())
    path = FOLDER / f"{name}.yaml"
    raw = _raw(path)
    try:
        only = raw.pop("only", [])
        raw["models"] = _models(raw.get("models", {}))
        raw["data"] = {label: _data_words(given) for label, given in raw.get("data", {}).items()}
        raw["search"] = Search(**_search(path, raw["search"], raw["methods"])) if raw.get("search") else None
        return _with_methods(Experiment(name=name, **raw), only)
    except TypeError as error:
        raise UserError(f"{path}: {str(error).split('__init__() ')[-1]}") from error


def _raw(path: Path) -> dict[str, Any]:
    own: dict[str, Any] = yaml.safe_load(path.read_text())
    if not (like := own.pop("like", "")):
        return own
    _known(f"{path}: like", like, names())
    other = {key: v for key, v in _raw(FOLDER / f"{like}.yaml").items() if key not in ("title", "paper", "search")}
    joined: dict[str, Any] = {key: other.get(key, {}) | own.get(key, {}) for key in ("methods", "starts")}
    return other | own | joined | {"common": [*other.get("common", []), *own.get("common", [])]}


def _search(path: Path, own: dict[str, Any], methods: Mapping[str, Any]) -> dict[str, Any]:
    own = dict(own)
    if not (like := own.pop("like", "")):
        return own
    _known(f"{path}: search.like", like, names())
    there = FOLDER / f"{like}.yaml"
    if not (theirs := _raw(there).get("search")):
        raise UserError(f"{path}: search.like: {like} has no search of its own")
    other = _search(there, theirs, methods)
    only = {pattern: [m for m in of if m in methods] for pattern, of in other.get("only", {}).items()}
    return other | own | {"only": only | own.get("only", {})}


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def chosen(
    experiment: Experiment, methods: Sequence[str] = (), models: Sequence[str] = (), data: Sequence[str] = ()
) -> Experiment:
    """Of the methods and models only the named ones (a model may also be any file of configs/model/); on these data."""
    files = {path.stem: [f"model={path.stem}"] for path in sorted((CONFIGS / "model").glob("*.yaml"))}
    every_model = files | experiment.models
    for label in models:
        _known("models", label, every_model)
    return dataclasses.replace(
        _with_methods(experiment, methods),
        models={m: every_model[m] for m in models} or experiment.models or {"conet": ["model=conet"]},
        data=_labelled(data) or experiment.data,
    )


def _with_methods(experiment: Experiment, methods: Sequence[str]) -> Experiment:
    """Of the methods only the named ones, with what they start from; none named: all."""
    if not methods:
        return experiment
    for method in methods:
        _known("methods", method, experiment.methods)
    beginnings = [s for m in methods if (s := experiment.starts.get(m))]
    return dataclasses.replace(
        experiment,
        methods={m: experiment.methods[m] for m in [*beginnings, *methods]},
        starts={m: s for m, s in experiment.starts.items() if m in methods},
        search=_search_of(experiment.search, methods),
    )


def _search_of(search: Search | None, methods: Sequence[str]) -> Search | None:
    if search is None or not methods:
        return search
    return dataclasses.replace(search, only={p: [m for m in of if m in methods] for p, of in search.only.items()})


def plans(
    experiment: Experiment,
    seeds: Sequence[int],
    runs: str,
    words: Sequence[str],
    best: Mapping[Cell, list[str]] = {},
    beginnings: str = "",
) -> list[Plan]:
    """A run for every choice, each in a folder of its own; those that others start from in `beginnings`, if given.

    Of words with the same key the last one counts: common, data, model, method, `best` (of a search), command line.
    """

    def folder(cell: Cell, seed: int) -> str:
        above = beginnings if beginnings and cell.method in experiment.beginnings else runs
        return storage.join(above, *(label.replace("|", "_") for label in cell), f"seed-{seed}")

    _check_own(experiment, words)
    if not experiment.data:
        raise UserError(f"experiment={experiment.name}: needs data=FOLDER[,FOLDER…], written by jobs/prepare.py")
    found = []
    for seed in seeds:
        for labels in itertools.product(experiment.data, experiment.models, experiment.expanded()):
            cell = Cell(*labels)
            own = [*experiment.data[cell.data], *experiment.models[cell.model], *experiment.expanded()[cell.method]]
            run, beginning = folder(cell, seed), experiment.starts.get(cell.method.split("|")[0])
            start = folder(cell._replace(method=beginning), seed) if beginning else ""
            merged = last_of_each([*experiment.common, *own, *best.get(cell, []), *words])
            warm = [f"warm_start.run={start}"] if start else []
            found.append(Plan(cell, seed, run, [*merged, *warm, f"seed={seed}", f"run={run}"], start))
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


def _check_own(experiment: Experiment, words: Sequence[str]) -> None:
    """UserError: a word of the command line that would undo what tells the runs apart."""
    instead = {"recipe": "methods", "seed": "first_seed and seeds", "run": "runs"}
    if experiment.starts:
        instead["warm_start.run"] = "methods"
    for word in words:
        key = word.partition("=")[0]
        if key in instead:
            raise UserError(f"{word}: every run of experiment={experiment.name} has its own; choose {instead[key]}=")
    alike: dict[tuple[str, ...], str] = {}
    for method, own in experiment.expanded().items():
        merged = tuple(sorted(last_of_each([*own, *words])))
        other = alike.setdefault(merged, method)
        if other != method and set(own) != set(experiment.expanded()[other]):
            raise UserError(f"{' '.join(words)}: makes {other} and {method} the same; methods= chooses")


def last_of_each(words: Sequence[str]) -> list[str]:
    return list({pair_of(word)[0]: word for word in words}.values())


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
    return data if data in DEMOS else storage.absolute(data)


def _known(what: str, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if name not in known:
        raise UserError(f"{what}={name}: unknown; {nearest(name, list(known))}")
