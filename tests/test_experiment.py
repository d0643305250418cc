"""Experiments: which runs they are made of, what becomes of those that fail, and what a search chooses."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import yaml

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import read_manifest
from cdr_dist.errors import UserError
from cdr_dist.training import experiment_job, experiment_runs
from cdr_dist.training.experiment import Cell, Experiment, Plan, Search, _search, chosen, load, names, plans
from cdr_dist.training.experiment_runs import Ended, Outcome, Processes, Room, parallel_of, run_all
from cdr_dist.training.memory import need
from cdr_dist.training.search import JOURNAL, ends, search_all, searched
from tests import datasets
from tests.experiments import Here, answer, summary
from tests.forks import FORKS


def experiment(**more):
    methods = {"joint": ["recipe=joint"], "biao": ["recipe=biao", "upper.interval=7"]}
    return Experiment(
        "mine", **{"methods": methods, "models": {"conet": ["model=conet"]}, "data": {"d": ["data=/d"]}} | more
    )


def test_a_run_is_one_choice_of_every_dimension_in_a_folder_of_its_own():
    found = plans(experiment(models={"conet": ["model=conet"], "wide": ["model=minet"]}), [8, 9], "/runs", [])
    assert len({plan.run for plan in found}) == len(found) == 2 * 2 * 2
    assert found[-1].run == "/runs/d/wide/biao/seed-9"
    assert found[-1].words == [
        "data=/d", "model=minet", "recipe=biao", "upper.interval=7", "seed=9", "run=/runs/d/wide/biao/seed-9"
    ]  # fmt: skip


def test_of_words_with_the_same_key_the_last_one_counts():
    of = experiment(common=["dense.lr=1", "upper.interval=1"], models={"m": ["model=conet", "dense.lr=2"]})
    words = {plan.cell.method: plan.words for plan in plans(of, [8], "/runs", [])}
    assert "dense.lr=2" in words["joint"]
    assert "upper.interval=7" in words["biao"]
    best = {Cell("d", "m", "biao"): ["upper.interval=9"]}
    words = {plan.cell.method: plan.words for plan in plans(of, [8], "/runs", ["dense.lr=3"], best)}
    assert "upper.interval=1" in words["joint"]
    assert {"dense.lr=3", "upper.interval=9"} <= set(words["biao"])


def test_data_of_the_command_line_are_called_by_their_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = chosen(load("table1"), methods=["biao"], models=["minet", "dasl"], data=["a/books-toys/", "s3://b/c"])
    assert found.data == {"books-toys": [f"data={tmp_path}/a/books-toys"], "c": ["data=s3://b/c"]}
    assert found.models == {"minet": ["model=minet"], "dasl": ["model=dasl"]}
    assert list(found.methods) == ["biao"]


def of_transfer(**more):
    methods = {"joint": ["recipe=joint"], "pretrain": ["recipe=pretrain"], "tuned": ["recipe=uaf_hard", "model=x"]}
    return experiment(**{"methods": methods, "starts": {"tuned": "pretrain"}} | more)


def test_a_method_starts_from_the_run_of_another_at_the_same_data_model_and_seed():
    found = plans(of_transfer(models={"a": ["model=a"], "b": ["model=b"]}), [8, 9], "/runs", [])
    starts = {str(plan): plan.start for plan in found if plan.start}
    assert starts == {f"d / {m} / tuned / seed {s}": f"/runs/d/{m}/pretrain/seed-{s}" for m in "ab" for s in (8, 9)}
    assert all((f"warm_start.run={plan.start}" in plan.words) == bool(plan.start) for plan in found)
    assert all("model=x" in plan.words for plan in found if plan.start), "a method's words win over the dimension's"


def test_what_a_chosen_method_starts_from_is_kept_and_has_no_grid():
    assert list(chosen(of_transfer(), methods=["tuned"]).methods) == ["pretrain", "tuned"]
    assert list(chosen(of_transfer(), methods=["joint"]).methods) == ["joint"]
    found = plans(of_transfer(grid={"dense.lr": [1, 2]}), [8], "/runs", [])
    assert [plan.cell.method for plan in found if "tuned" in plan.cell.method] == [
        f"tuned|dense.lr={n}" for n in (1, 2)
    ]
    assert {plan.start for plan in found if plan.start} == {"/runs/d/conet/pretrain/seed-8"} < {p.run for p in found}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"starts": {"tuned": "pretrian"}}, "starts.tuned=pretrian: unknown; did you mean 'pretrain'"),
        ({"starts": {"tuned": "pretrain", "pretrain": "joint"}}, "starts.tuned: pretrain starts from joint itself"),
        ({"metrics": ["nll"]}, "begin with one of which more is better"),
    ],
)
def test_an_experiment_that_cannot_be_is_one_line(more, message):
    with pytest.raises(UserError, match=message):
        of_transfer(**more)


def test_a_file_that_is_like_another_adds_to_it():
    whole, found = load("uaf_table2"), load("uaf_table7")
    assert found.methods.items() < whole.methods.items()
    assert "pretrain" in found.methods
    assert found.common[: len(whole.common)] == whole.common
    assert (found.metrics, found.search) == (["accuracy", "f1"], None)
    gru = load("uaf_table4")
    assert gru.starts["uaf_hard_gru"] == "pretrain"
    assert gru.methods["uaf_hard"] == whole.methods["uaf_hard"]


@pytest.mark.parametrize("name", names())
def test_every_file_of_experiments_is_made_of_words_that_jobs_train_takes(name):
    found = load(name)
    found = chosen(found, data=[] if found.data else ["/anywhere"])
    for plan in plans(found, [8], "/runs", []):
        from_words(plan.words)
    alike = {str(searched(found.search, method)): method for method in found.methods} if found.search else {}
    for method in alike.values():
        for words in ends(found.search, method):
            from_words([*found.methods[method], *words])


def test_a_search_like_another_ones_is_searched_by_the_methods_that_it_names():
    """What figure 5 is drawn over is left out of table 1's, and so are methods that are not there."""
    theirs, ours = load("table1").search, load("figure5").search
    assert ours.space == theirs.space
    assert set(searched(theirs, "biao")) == set(theirs.space)
    assert set(searched(ours, "interval_20")) == set(theirs.space) - {"upper.interval"}
    assert set(searched(ours, "joint")) == set(searched(theirs, "joint")) > {"upper.gamma0"}
    assert searched(load("table2").search, "without_user") == searched(theirs, "biao")
    fifth = load("table5")
    assert all(searched(fifth.search, method) == searched(theirs, method) for method in fifth.methods)
    again = _search(Path("mine.yaml"), {"like": "figure5", "budget": 2}, {"joint": []})
    assert (again["space"], again["only"]["upper.gamma0"], again["budget"]) == (theirs.space, ["joint"], 2)
    with pytest.raises(UserError, match=r"mine\.yaml: search\.like: demo has no search of its own"):
        _search(Path("mine.yaml"), {"like": "demo"}, {})


MISTAKES = {
    "no experiment": ([], "experiment= is missing"),
    "an unknown one": (["experiment=tabel1"], "experiment=tabel1: unknown; did you mean 'table1'?"),
    "no data": (["experiment=table1"], "experiment=table1: needs data=FOLDER[,FOLDER…]"),
    "no dataset": (["experiment=table1", "data=/nowhere"], "/nowhere: not a dataset"),
    "two of a name": (["experiment=table1", "data=/a/x,/b/x"], "two folders are called x"),
    "a method": (["experiment=demo", "methods=bio"], "methods=bio: unknown; did you mean 'biao'?"),
    "a model": (["experiment=demo", "models=conett"], "models=conett: unknown; did you mean 'conet'?"),
    "an option": (["experiment=demo", "dense.lrr=1"], "demo / conet / target_only: dense.lrr: unknown option"),
    "no option": (["experiment=demo", "fast"], "'fast': options are written key=value"),
    "seeds": (["experiment=demo", "seeds=0"], "seeds=0: must be a whole number, at least 1"),
    "seeds in other digits": (["experiment=demo", "seeds=²"], "seeds=²: must be a whole number, at least 1"),
    "seeds empty": (["experiment=demo", "seeds="], "seeds=: must be a whole number, at least 1"),
    "an option twice": (["experiment=demo", "seeds=1", "seeds=2"], "seeds= is given twice"),
    "a list by both names": (["experiment=demo", "model=conet", "models=minet"], "models= is given twice"),
    "parallel": (["experiment=demo", "parallel=some"], "parallel=some: must be auto or a whole number"),
    "a recipe": (
        ["experiment=demo", "recipe=biao"],
        "recipe=biao: every run of experiment=demo has its own; choose met",
    ),
    "a seed": (["experiment=demo", "seed=9"], "seed=9: every run of experiment=demo has its own; choose first_seed"),
    "a run": (["experiment=demo", "run=x"], "run=x: every run of experiment=demo has its own; choose runs="),
    "what a curve is of": (
        ["experiment=figure5", "data={rated}", "upper.interval=9"],
        "upper.interval=9: makes interval_5 and interval_20 the same; methods= chooses",
    ),
    "no search": (["experiment=demo", "budget=3"], "budget=3: configs/experiment/demo.yaml has no search"),
    "searched and given": (["experiment=table1", "data={rated}", "budget=3", "tables.lr=1"], "tables.lr: is searched"),
    "no seed to search on": (
        ["experiment=table1", "data={rated}", "budget=3", "first_seed=0"],
        "first_seed=0: a search",
    ),
    "no table of the paper": (["experiment=demo", "paper=books_toys"], "experiment=demo is no table of the paper"),
    "no such scenario": (
        ["experiment=table5", "data={rated}", "paper=cds_cloth"],
        "paper=cds_cloth: table5 of the paper",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found_before_anything_starts(case, tmp_path):
    words, expected = MISTAKES[case]
    places = Here(lambda given: pytest.fail("started"))
    with pytest.raises(UserError) as error:
        experiment_job.experiment_job(
            [*(word.format(rated=datasets.rated()) for word in words), f"out={tmp_path}/out"], places
        )
    assert expected in str(error.value)
    assert not places.started


def plan(number, recipe, folder):
    run = f"{folder}/{number}"
    return Plan(Cell("d", "m", recipe), number, run, [f"recipe={recipe}", f"seed={number}", f"run={run}"])


def test_a_killed_process_or_a_mistake_takes_only_its_own_run_along(tmp_path):
    recipes = ["joint", "killed", "mistaken", "joint", "killed", "joint"]
    places = Processes(answer)
    outcomes = run_all([plan(i, recipe, tmp_path) for i, recipe in enumerate(recipes)], places, 2, quiet=True)
    places.close()
    assert [o.plan.cell.method for o in outcomes] == recipes
    assert [bool(o.summary) for o in outcomes] == [recipe == "joint" for recipe in recipes]
    assert outcomes[1].ended.failure == "its process was killed by SIGKILL; out of memory?"
    assert (outcomes[2].ended.failure, outcomes[2].ended.mistake) == ("recipe: cannot be", True)
    assert outcomes[0].summary["recipe"] == "joint"
    assert len({o.summary["process"] for o in outcomes if o.summary}) <= 3


@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_runs_wait_for_what_they_start_from(at_once):
    todo = plans(of_transfer(), [8, 9], "/runs", [])[::-1]
    begun, done = [], []

    class Places(Here):
        def start(self, number, words):
            assert not todo[number].start or todo[number].start in done
            begun.append(number)

        def next(self):
            number = begun.pop()
            done.append(todo[number].run)
            return number, Ended(summary(0.7, 0.6))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment_runs.storage, "exists", lambda uri: True)
        outcomes = run_all(todo, Places(None), at_once, quiet=True)
    assert [outcome.plan for outcome in outcomes] == todo
    assert all(outcome.summary for outcome in outcomes)
    assert len(done) == 6


def test_a_failed_start_fails_what_depends_on_it_and_nothing_else(tmp_path):
    def run(given):
        lost = given["recipe"] == "pretrain" and given["seed"] == "8"
        return Ended(None, "diverged", True) if lost else Ended(summary(0.7, 0.6))

    places = Here(run)
    outcomes = run_all(plans(of_transfer(), [8, 9], str(tmp_path), []), places, 2, quiet=True)
    failed = {str(outcome.plan): outcome.ended for outcome in outcomes if outcome.summary is None}
    assert list(failed) == ["d / conet / pretrain / seed 8", "d / conet / tuned / seed 8"]
    why = failed["d / conet / tuned / seed 8"]
    assert (why.failure, why.mistake) == ("starts from d / conet / pretrain / seed 8, which failed", True)
    assert len(places.started) == 5


@pytest.mark.parametrize(
    ("ended", "code"),
    [
        ([Ended({}), Ended({})], 0),
        ([Ended({}), Ended(None, "mistake", True)], 1),
        ([Ended(None, "lost"), Ended(None, "mistake", True)], 1),
        ([Ended(None, "mistake", True)] * 2, 2),
    ],
)
def test_exit_codes(ended, code):
    assert experiment_job.exit_code([Outcome(plan(i, "joint", "/"), e) for i, e in enumerate(ended)]) == code


def test_a_run_whose_folder_stayed_on_another_machine_has_failed(tmp_path):
    class Elsewhere(Here):
        def next(self):
            return self._waiting.pop()[0], Ended(summary(0.7, 0.6))

    outcome = run_all([plan(1, "joint", tmp_path)], Elsewhere(None), 1, quiet=True)[0]
    assert "is a folder that all machines share, or s3://" in outcome.ended.failure


def test_as_many_runs_at_once_as_there_are_cores_and_memory_for():
    data = f"data={datasets.rated()}"
    one, two = ([data, "trainer.workers=0"], [data, "trainer.workers=2", "trainer.threads=3"])
    one, two = from_words(one), from_words(two)
    plenty = 2**40
    assert parallel_of("auto", [one], Room(8, plenty)) == 8
    assert parallel_of("auto", [one, two], Room(8, plenty)) == 1
    assert parallel_of("auto", [one, two], Room(13, plenty)) == 2
    assert parallel_of("5", [two], Room(1, 0)) == 5
    cuda = from_words([data, "trainer.workers=2", "trainer.device=cuda"])
    assert parallel_of("auto", [cuda], Room(64, plenty, gpus=6)) == 3
    assert parallel_of("auto", [cuda], Room(64, plenty)) == 32, "a machine's own are not counted"
    of_one = need(one, read_manifest(str(datasets.rated()))).host
    assert 2**29 < of_one < 2**30, "else the next lines say nothing"
    assert parallel_of("auto", [one], Room(8, int(3.5 * 2**30))) == 3
    wide = from_words([data, "trainer.workers=0", "tables.width=65536"])
    of_wide = need(wide, read_manifest(str(datasets.rated()))).host
    assert parallel_of("auto", [one, wide], Room(8, 2 * of_wide)) == 2
    assert parallel_of("auto", [one, wide], Room(8, of_wide // 2)) == 1


SPACE = {"tables.lr": [0.01, 1.0, "log"], "upper.interval": [5, 20, 100], "dense.lr": [0.001, 0.1, "log"]}


def searching(budget=11, **more):
    return experiment(search=Search(SPACE, budget, only={"upper.*": ["biao"]}, **more))


def landscape(given, test=0.5):
    """Best at tables.lr .1; interval 20 for biao. The test metric is whatever it is told to be."""
    away = abs(math.log10(float(given["tables.lr"]) / 0.1)) + abs(math.log10(float(given["dense.lr"]) / 0.01))
    interval = 0.1 * (given["recipe"] == "biao" and given["upper.interval"] != "20")
    return Ended(summary(0.8 - 0.1 * away - interval, test))


def search(folder, of=None, run=landscape, at_once=3, forwards=False):
    places = Here(run, forwards)
    found = search_all(
        of or searching(), 7, f"{folder}/runs", [], folder, lambda todo: run_all(todo, places, at_once, quiet=True)
    )
    return found, [[word for word in words if not word.startswith("run=")] for words in places.started]


def test_every_method_has_the_same_number_of_trials_on_the_seed_of_the_search(tmp_path):
    best, started = search(tmp_path)
    assert {cell.method: found.trials for cell, found in best.items()} == {"joint": 11, "biao": 11}
    assert sum("recipe=joint" in words for words in started) == sum("recipe=biao" in words for words in started) == 11
    assert all("seed=7" in words for words in started)


def test_an_option_is_searched_only_where_it_matters(tmp_path):
    best, started = search(tmp_path)
    assert list(searched(searching().search, "joint")) == ["tables.lr", "dense.lr"]
    assert not any(word.startswith("upper.interval") for words in started if "recipe=joint" in words for word in words)
    assert "upper.interval=20" in best[Cell("d", "conet", "biao")].words


def test_a_search_finds_more_than_its_random_start(tmp_path):
    best, _ = search(tmp_path, searching(budget=24))
    assert all(found.trial >= 4 for found in best.values())
    assert all(found.value > 0.75 for found in best.values())


def test_choices_do_not_depend_on_how_many_run_at_once_or_which_ends_first(tmp_path):
    one, started = search(tmp_path / "a", at_once=1)
    other, others = search(tmp_path / "b", at_once=8, forwards=True)
    assert one == other
    assert sorted(started) == sorted(others)


def test_test_metrics_are_not_looked_at(tmp_path):
    one, started = search(tmp_path / "a")
    other, others = search(
        tmp_path / "b", run=lambda given: landscape(given, test=float(hash(given["tables.lr"]) % 997) / 997)
    )
    assert one == other
    assert started == others


@pytest.mark.parametrize("after", [2, 9, 13])
def test_a_killed_search_goes_on_with_the_same_trials(tmp_path, after):
    whole, started = search(tmp_path / "whole")
    left = iter(range(after))

    def dies(given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return landscape(given)

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path / "killed", run=dies, at_once=1)
    found, rest = search(tmp_path / "killed", at_once=1)
    assert found == whole
    assert set(map(tuple, rest)) <= set(map(tuple, started))
    again, none = search(tmp_path / "killed")
    assert (again, none) == (whole, [])


def test_a_larger_budget_goes_on_where_the_smaller_one_ended(tmp_path):
    _, first = search(tmp_path, searching(budget=4))
    _, second = search(tmp_path, searching(budget=8))
    assert (len(first), len(second)) == (8, 8)
    assert sorted(first + second) == sorted(search(tmp_path / "at-once", searching(budget=8))[1])


def test_a_journal_of_another_space_is_not_gone_on_with(tmp_path):
    search(tmp_path, searching(budget=2))
    with pytest.raises(UserError, match=f"{JOURNAL}: holds a search of another space, seed or metric"):
        search(tmp_path, experiment(search=Search({"tables.lr": [0.1, 1.0, "log"]}, 2)))


def test_trials_that_fail_count_and_all_failing_is_an_error(tmp_path):
    def some(given):
        return Ended(None, "diverged") if float(given["tables.lr"]) > 0.1 else landscape(given)

    best, started = search(tmp_path / "a", run=some)
    assert len(started) == 22
    assert all(found.failed for found in best.values())
    with pytest.raises(UserError, match="all 11 trials of the search failed"):
        search(tmp_path / "b", run=lambda given: Ended(None, "diverged"))


def test_trials_start_from_a_run_that_is_not_searched(tmp_path):
    of = of_transfer(search=Search({"dense.lr": [0.001, 0.1, "log"]}, 5, together=5))
    best, started = search(tmp_path, of, lambda given: Ended(summary(0.5, 0.5)))
    assert {cell.method for cell in best} == {"joint", "tuned"}
    assert sum("recipe=pretrain" in words for words in started) == 1
    warm = {word for words in started for word in words if word.startswith("warm_start.run=")}
    assert warm == {f"warm_start.run={tmp_path}/runs/d/conet/pretrain/seed-7"}


@pytest.mark.parametrize("metric", ["logloss", "nll"])
def test_the_smallest_loss_is_the_best(tmp_path, metric):
    def run(given):
        found = summary(0.9, 0.9)
        found["metrics"]["valid"][metric] = float(given["tables.lr"])
        return Ended(found)

    best, started = search(tmp_path, searching(metric=metric), run)
    lowest = min(float(word[10:]) for words in started for word in words if word.startswith("tables.lr"))
    assert min(found.value for found in best.values()) == lowest


WORDS = ["batch.size=64", "trainer.max_steps=20", "seeds=2", "first_seed=3"]


def test_an_experiment_from_words_to_the_page(tmp_path, monkeypatch, capsys):
    """Really trained; oracle cannot be, since nothing was planted in these data."""
    monkeypatch.setattr(experiment_runs, "_CONTEXT", FORKS)
    dataset = datasets.edited(datasets.copied(datasets.sampled(), tmp_path), source_domain="cds", target_domain="cloth")
    (dataset / "truth.parquet").unlink()
    words = ["experiment=demo", f"data={dataset}", "methods=target_only,biao,oracle", f"out={tmp_path}/out", *WORDS]
    assert experiment_job.experiment_job(words) == 1
    text = (tmp_path / "out" / "table.md").read_text()
    assert "## sampled" in text
    assert "## Failed: 2 of 6 runs" in text
    assert "needs data with planted truth" in text
    summaries = json.loads((tmp_path / "out" / "summaries.json").read_text())
    assert [(s["recipe"], s["seed"], s["steps"]) for s in summaries] == [
        ("target_only", 3, 20), ("biao", 3, 20), ("target_only", 4, 20), ("biao", 4, 20)
    ]  # fmt: skip
    assert "needs data with planted truth" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "figures" / "sampled-conet-weights.svg").exists()
    before = (tmp_path / "out" / "runs/sampled/conet/biao/seed-3/summary.json").stat().st_mtime_ns
    assert experiment_job.experiment_job([*words[:2], "methods=target_only,biao", *words[3:]]) == 0
    assert (tmp_path / "out" / "runs/sampled/conet/biao/seed-3/summary.json").stat().st_mtime_ns == before
    assert "Failed" not in capsys.readouterr().out.rpartition("# demo")[2]


def test_a_search_from_words_to_the_footnote(tmp_path):
    def run(given):
        return Ended(summary(0.8 - abs(float(given["tables.lr"]) - 0.1), 0.7, int(given["seed"])))

    places = Here(run)
    words = ["experiment=table1", f"data={datasets.rated()}", "methods=joint,biao", "models=conet", "budget=5"]
    assert experiment_job.experiment_job([*words, f"out={tmp_path}", "seeds=2"], places) == 0
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())["rated"]["conet"]
    assert best["joint"]["trials"] == best["biao"]["trials"] == 5
    reported = [words for words in places.started if "seed=8" in words or "seed=9" in words]
    assert len(places.started) == 10 + 4
    assert all(set(best["joint"]["words"]) <= set(w) for w in reported if "recipe=joint" in w)
    text = (tmp_path / "table.md").read_text()
    assert "5 trials (TPE) for every method, data and model, on seed 7, which is none of the reported" in text
    assert " ".join(best["biao"]["words"]) in text


def _gpu(_words):
    import ray

    own = ray.get_runtime_context().get_assigned_resources()["GPU"]
    return Ended(None, f"GPU {os.environ['CUDA_VISIBLE_DEVICES']} of {own}")


@pytest.mark.ray
def test_on_a_cluster_the_same_runs_are_ray_tasks(tmp_path, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    places = experiment_runs.RayTasks(Room(1, 2**30))
    words = [f"data={datasets.rated()}", "trainer.workers=0", "batch.size=64", "trainer.max_steps=5", "recipe=joint"]
    more = {"joint": [], "mistaken": ["evaluation.metric=hr@3"]}
    runs = {method: f"{tmp_path}/{method}" for method in more}
    todo = [Plan(Cell("d", "m", m), 1, run, [*words, *more[m], f"run={run}"]) for m, run in runs.items()]
    try:
        assert places.room()[::2] == (2, 1)
        assert places.room().memory > 2**30
        shared = experiment_runs.RayTasks(Room(1, 0, gpus=1), at_once=2, run=_gpu)
        assert [outcome.ended.failure for outcome in run_all(todo, shared, 2, quiet=True)] == ["GPU 0 of 0.5"] * 2
        joint, mistaken = run_all(todo, places, 2, quiet=True)
    finally:
        places.close()
    assert joint.summary["steps"] == 5
    assert (joint.summary["recipe"], joint.summary["data"]["name"]) == ("joint", "d")
    assert mistaken.ended.mistake
    assert "evaluation.metric=hr@3: needs evaluation.ks=[3]" in mistaken.ended.failure
