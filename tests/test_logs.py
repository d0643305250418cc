"""CDR_LOG=json: every line on stderr is an object that a collector can read, and names the job and the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from cdr_dist import logs
from tests import datasets
from tests.forks import python
from tests.runs import words

ROOT = Path(__file__).parents[1]


def said(job, given, folder, code=0):
    done = python([ROOT / "jobs" / f"{job}.py", *given], folder, CDR_LOG="json")
    assert done.code == code, done.error
    return [json.loads(line) for line in done.error.splitlines()], done.out


def test_a_run_and_a_mistake(tmp_path):
    given = words(datasets.rated(), tmp_path / "run", "recipe=joint", "trainer.max_steps=25", "trainer.log_every=10")
    found, result = said("train", given, tmp_path)
    assert result.startswith("joint: test AUC 0."), "what a job finds stays as it is"
    assert {(line["job"], line["run"]) for line in found} == {("train", str(tmp_path / "run"))}
    assert [(line["step"], line["split"]) for line in found] == [
        (10, "train"),
        (19, "valid"),
        (20, "train"),
        (25, "valid"),
    ]
    assert found[0]["values"]["target_loss"] > 0
    assert all(line["time"].endswith("+00:00") and line["level"] == "info" for line in found)
    (line,), _ = said("train", [*given, "batch.sise=4"], tmp_path, code=2)
    assert line["level"] == "error"
    assert "batch.sise" in line["message"]


def test_prepare_says_its_stages_and_names_its_folder(tmp_path, monkeypatch, capsys):
    from cdr_dist.data.prepare_job import prepare_job

    monkeypatch.setenv("CDR_LOG", "json")
    logs_folder = datasets.rated().parent / "rated-logs"
    given = [f"{role}={logs_folder}/{role}.parquet" for role in ("source", "target")]
    prepare_job([*given, f"out={tmp_path / 'data'}"])
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"].partition(":")[0] for line in found][:2] == ["read the logs", "ordered and split"]
    assert {(line["job"], line["run"]) for line in found} == {("prepare", str(tmp_path / "data"))}
    monkeypatch.delenv("CDR_LOG")
    logs.configure("prepare", level=logging.WARNING)


@pytest.mark.parametrize("message", ['a "quoted" word', "two\nlines", "é"])
def test_any_message_is_one_line(message):
    assert json.loads(logs.line("train", "run", message))["message"] == message
    assert "\n" not in logs.line("train", "run", message)
