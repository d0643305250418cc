"""Options chosen on validation data: Optuna's TPE, the same number of trials for every method, data and model.

What is chosen is a function of the space, the seed and the validation metrics, not of timing: trials are asked for in
rounds (`Search.together`), a round only when the one before it is known, and every draw has a seed of its own. The
journal in the experiment's folder holds what was asked and found; a killed search goes on with the same trials.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdr_dist.data.hashing import key
from cdr_dist.errors import UserError
from cdr_dist.training.experiment import Cell, Experiment, Plan, Search, plans
from cdr_dist.training.experiment_runs import Outcome
from cdr_dist.training.options import smaller_is_better

JOURNAL = "search.journal"
RANGES = ("log", "linear", "int")


@dataclass(frozen=True)
class Best:
    """What a search came to."""

    words: list[str]
    value: float
    trial: int
    trials: int
    failed: int


def searched(search: Search, method: str) -> dict[str, Any]:
    """The part of the space that a method searches."""
    return {
        option: values
        for option, values in search.space.items()
        if all(method in of for pattern, of in search.only.items() if fnmatch.fnmatchcase(option, pattern))
    }


def ends(search: Search, method: str) -> list[list[str]]:
    """Words with the first values of everything that a method searches, the last ones, and all choices between."""
    space = searched(search, method)
    lists = [values[:2] if _is_range(values) else values for values in space.values()]
    most = max((len(values) for values in lists), default=0)
    return [[_word(o, v[min(i, len(v) - 1)]) for o, v in zip(space, lists, strict=True)] for i in range(most)]


def search_all(
    experiment: Experiment,
    seed: int,
    runs: str,
    words: Sequence[str],
    folder: Path,
    run: Callable[[list[Plan]], list[Outcome]],
) -> dict[Cell, Best]:
    """The best words of every cell by its validation metric. `run` trains plans; of their summaries only that is read.

    A trial that fails counts as one of the budget. UserError: all trials of a cell failed.
    """
    search = experiment.search
    assert search is not None
    named = {word.partition("=")[0] for word in words}
    for option in search.space:
        if option in named:
            raise UserError(f"{option}: is searched (search.space); leave it out, or say budget=0")
    every = plans(experiment, [seed], runs, words)
    beginnings = [plan for plan in every if plan.cell.method in experiment.beginnings]
    studies = {plan.cell: Study(search, plan.cell, seed, folder) for plan in every if plan not in beginnings}
    for first in range(0, search.budget, search.together):
        todo, asked = [], []
        for cell, study in studies.items():
            for number in range(first, min(first + search.together, search.budget)):
                if (own := study.ask(number)) is not None:
                    asked.append((study, number))
                    trial = f"{runs.rstrip('/')}/search/trial-{number}"
                    found = plans(_only(experiment, cell), [seed], trial, words, {cell: own}, runs)
                    todo += [plan for plan in found if plan.cell == cell]
        outcomes = run([*beginnings, *todo])[len(beginnings) :] if todo else []
        for (study, number), outcome in zip(asked, outcomes, strict=True):
            study.tell(number, validation(outcome, search.metric))
    return {cell: study.best() for cell, study in studies.items()}


def validation(outcome: Outcome, metric: str) -> float | None:
    """The validation metric of a run and nothing else of it; None: it failed, or has none."""
    if outcome.ended.summary is None:
        return None
    values = outcome.ended.summary["metrics"]["valid"]
    if metric not in values:
        raise UserError(f"search.metric={metric}: runs have no such validation metric; known: {', '.join(values)}")
    value = values[metric]
    return None if value is None or not math.isfinite(value) else float(value)


class Study:
    """The trials of one cell, kept in the journal."""

    def __init__(self, search: Search, cell: Cell, seed: int, folder: Path) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self._search, self._cell, self._seed = search, cell, seed
        self._space = searched(search, cell.method)
        folder.mkdir(parents=True, exist_ok=True)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
            study_name=str(cell),
            direction="minimize" if smaller_is_better(search.metric) else "maximize",
            load_if_exists=True,
        )
        self._check_same(folder)

    def ask(self, number: int) -> list[str] | None:
        """The words of trial `number`; None where it is known already. All trials before its round are known."""
        import optuna

        trials = self._study.get_trials(deepcopy=False)
        if number < len(trials):
            if trials[number].state.is_finished():
                return None
            trial = optuna.Trial(self._study, trials[number]._trial_id)  # asked for by a search that was killed
        else:
            trial = self._study.ask()
        return [_word(option, self._value(trial, option, values)) for option, values in self._space.items()]

    def tell(self, number: int, value: float | None) -> None:
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else None
        self._study.tell(number, value, state=state)

    def best(self) -> Best:
        trials = self._study.get_trials(deepcopy=False)[: self._search.budget]
        known = [trial for trial in trials if trial.value is not None]
        if not known:
            raise UserError(f"{self._cell}: all {len(trials)} trials of the search failed")
        sign = -1 if smaller_is_better(self._search.metric) else 1
        best = max(known, key=lambda trial: (sign * trial.value, -trial.number))  # type: ignore[operator]
        words = [_word(option, best.params[option]) for option in self._space]
        return Best(words, float(best.value or 0.0), best.number, len(trials), len(trials) - len(known))

    def _value(self, trial: Any, option: str, values: list[Any]) -> Any:
        """Each draw has a seed of its own: one that comes again, after a kill, is the same."""
        import optuna

        self._study.sampler = optuna.samplers.TPESampler(
            seed=int(key(self._seed, "search", str(self._cell), trial.number, option)) % 2**32,
            n_startup_trials=self._search.together,
            constant_liar=True,  # trials of the same round keep apart
            multivariate=False,
        )
        if not _is_range(values):
            return trial.suggest_categorical(option, values)
        low, high, kind = values
        if kind == "int":
            return trial.suggest_int(option, low, high)
        return trial.suggest_float(option, low, high, log=kind == "log")

    def _check_same(self, folder: Path) -> None:
        """A journal of another space or seed would mix two searches."""
        now = {"space": {o: list(v) for o, v in self._space.items()}, "seed": self._seed, "metric": self._search.metric}
        before = self._study.user_attrs.get("searched")
        if before is None:
            self._study.set_user_attr("searched", now)
        elif before != now:
            raise UserError(f"{folder / JOURNAL}: holds a search of another space, seed or metric; choose another out=")


def chosen_yaml(found: Mapping[Cell, Best], metric: str) -> dict[str, Any]:
    """What best.yaml holds: data -> model -> method -> words, and what they are chosen by."""
    tree: dict[str, Any] = {}
    for cell, best in found.items():
        tree.setdefault(cell.data, {}).setdefault(cell.model, {})[cell.method] = {
            "words": best.words,
            f"valid_{metric}": round(best.value, 6),
            "trial": best.trial,
            "trials": best.trials,
            "failed": best.failed,
        }
    return tree


def _only(experiment: Experiment, cell: Cell) -> Experiment:
    """The experiment of one cell alone, with what it starts from."""
    methods = [cell.method, *filter(None, [experiment.starts.get(cell.method)])]
    return dataclasses.replace(
        experiment,
        data={cell.data: experiment.data[cell.data]},
        models={cell.model: experiment.models[cell.model]},
        methods={method: experiment.methods[method] for method in methods},
        starts={m: s for m, s in experiment.starts.items() if m == cell.method},
        grid={},
        search=None,
    )


def _is_range(values: Sequence[Any]) -> bool:
    return len(values) == 3 and values[2] in RANGES


def _word(option: str, value: Any) -> str:
    """As typed, four digits: what is written in a table is what was run."""
    return f"{option}={value:.4g}" if isinstance(value, float) else f"{option}={value}"
