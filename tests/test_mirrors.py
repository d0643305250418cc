"""A run's numbers in MLflow's local store; a server that is not there costs a warning, not the run."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from cdr_dist.configuration import from_words
from cdr_dist.errors import UserError
from cdr_dist.training import mirrors
from cdr_dist.training.checks import check_before_start
from cdr_dist.training.run_folder import RunFolder
from tests import datasets
from tests.processes import free_port
from tests.runs import lines, summary, train, words

mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")


def given(folder, *more):
    return words(datasets.rated(), folder / "run", "recipe=joint", "trainer.log_every=10", *more)


def test_the_local_store_has_what_metrics_jsonl_has_and_a_continued_run_goes_on(tmp_path):
    (tmp_path / "plain").mkdir()
    train(given(tmp_path / "plain", "trainer.max_steps=40"))
    for steps in (20, 40):
        train(given(tmp_path, "trainer.mlflow=local", f"trainer.max_steps={steps}"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("cdr_dist")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.tags["run"] == str(tmp_path / "run")
    assert run.data.params["recipe.name"] == "joint"
    assert run.data.params["batch.size"] == "64"
    for split, name in (("train", "target_loss"), ("valid", "auc")):
        wanted = [(line["step"], line["values"][name]) for line in lines(tmp_path / "run", split)]
        found = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, f"{split}/{name}")]
        assert [step for step, _ in found] == [step for step, _ in wanted]
        assert [value for _, value in found] == pytest.approx([value for _, value in wanted])
        assert len(found) >= 3
    same = summary(tmp_path / "run")["parameters_sha256"]
    assert same == summary(tmp_path / "plain" / "run")["parameters_sha256"], "to look at a run does not change it"


def test_a_server_that_is_not_there_is_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    with caplog.at_level(logging.WARNING):
        train(given(tmp_path, f"trainer.mlflow={uri}", "trainer.max_steps=20"))
    assert summary(tmp_path / "run")["steps"] == 20
    (said,) = [r.getMessage() for r in caplog.records if r.name == "cdr_dist.training.mirrors"]
    assert said.startswith(f"trainer.mlflow={uri}: no more is written there (")
    assert "\n" not in said


def test_a_server_that_never_answers_does_not_hold_the_run_up(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(mirrors, "CLOSE_S", 0.2)
    monkeypatch.setattr(mirrors.MLflow, "_begin", lambda self, config: __import__("time").sleep(20))
    config = from_words(given(tmp_path, "trainer.mlflow=local"))
    with caplog.at_level(logging.WARNING):
        mirror = mirrors.MLflow(config, RunFolder(config.run))
        mirror.write(1, "train", {"loss": 1.0})
        mirror.close()
    assert "gives no answer" in caplog.text


def test_where_it_cannot_be_written_is_said_before_the_start(tmp_path, monkeypatch):
    data = str(datasets.rated())
    far = from_words([f"data={data}", "run=s3://bucket/run", "trainer.mlflow=local"])
    with pytest.raises(UserError, match=re.escape("trainer.mlflow=local: run=s3://bucket/run is on no disk")):
        check_before_start(far, data)
    monkeypatch.setattr(mirrors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("trainer.mlflow=local: the package is missing here")):
        check_before_start(from_words([f"data={data}", f"run={tmp_path}", "trainer.mlflow=local"]), data)
    assert not Path("mlflow.db").exists()
