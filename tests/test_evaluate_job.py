"""jobs/evaluate.py: the best checkpoint measured again gives the very numbers of the summary."""

from __future__ import annotations

import json

import polars as pl
import pytest

from cdr_dist.jobs import run_job
from cdr_dist.training.evaluation_job import evaluation_job
from tests.datasets import rated, sampled
from tests.runs import summary, train, words

OVERFITS = ["tables.lr=0.5", "dense.lr=0.02", "evaluation.metric=logloss"]
"""The best checkpoint is then not the last one."""


@pytest.fixture
def job(monkeypatch, capsys):
    def run(*given):
        monkeypatch.setattr("sys.argv", ["evaluate.py", *given])
        capsys.readouterr()  # what TorchRec said while the run was trained
        code = run_job("evaluate", None, evaluation_job)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    ("dataset", "more"), [(rated, []), (sampled, ["evaluation.ks=[1,3]"])], ids=["rated", "sampled"]
)
def test_the_best_checkpoint_gives_the_numbers_of_the_summary(dataset, more, workers, job, tmp_path):
    run, scores = tmp_path / "run", tmp_path / "scores.parquet"
    train(words(dataset(), run, "recipe=joint", "evaluation.every=13", *OVERFITS, *more), workers)
    for split in ("test", "valid"):
        code, out, error = job(f"run={run}", f"split={split}", f"scores={scores}")
        assert (code, error) == (0, "")
        found = json.loads(out)
        assert found["metrics"] == summary(run)["metrics"][split]
        assert found["step"] == summary(run)["best"]["step"] < 40
    assert pl.read_parquet(scores).height == summary(run)["metrics"]["valid"]["rows"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "run= is missing"),
        (["run"], "'run': options are written key=value"),
        (["run=x", "splt=test"], "splt: unknown option; did you mean 'split'?"),
        (["run=x", "split=train"], "split=train: choose valid or test"),
        (["run=x"], "x: not a run (no config.yaml)"),
    ],
)
def test_a_mistake_is_one_line(given, message, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = job(*given)
    assert (code, out) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1
