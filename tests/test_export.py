"""An exported run: its rows are the run's, and a program without cdr_dist scores as the run does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.feature_names import of_history
from cdr_dist.data.histories import History
from cdr_dist.errors import UserError
from cdr_dist.models.conet import CoNet
from cdr_dist.models.dasl import DASL
from cdr_dist.models.minet import MiNet
from cdr_dist.production.export_job import export_job, export_worker
from cdr_dist.production.scorer import exported
from cdr_dist.training.best import best_of_run
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.launch import alone
from cdr_dist.training.run_folder import RunFolder
from tests import datasets
from tests.processes import on_workers
from tests.test_recommend import dataset, run, scores

DOCUMENT = Path(__file__).parents[1] / "docs" / "serving.md"


def test_the_documents_program_scores_as_the_run_does_without_this_project(tmp_path):
    out = tmp_path / "export"
    export_job([f"run={run()}", f"out={out}", "workers=0"])
    (program,) = re.findall(r"```python\n(# score\.py.*?)```", DOCUMENT.read_text(), re.S)
    (tmp_path / "score.py").write_text("import sys\nsys.modules['cdr_dist'] = None\n" + program)
    vocabulary = {
        n: dict(pl.read_parquet(out / "vocab" / f"{n}_item.parquet").select("id", "key").iter_rows())
        for n in ("source", "target")
    }
    some = [i for i in vocabulary["target"] if i % 7 == 3]
    rows = {row["user_id"]: row for row in datasets.rows_of(dataset(), "users").iter_rows(named=True)}
    for user in ("u000100", "u000001"):  # one with a row of their own, one of the source alone
        latest = vocabulary["source"][rows[user]["source_candidates_item"][-1]]
        words = [str(out), user, latest, *(vocabulary["target"][i] for i in some)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        said = subprocess.run(
            [sys.executable, "-I", "score.py", *words],
            cwd=tmp_path,
            env=clean,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert said.returncode == 0, said.stderr
        found = [line.split() for line in said.stdout.splitlines()]
        assert [key for key, _ in found] == words[3:]
        expected = 1 / (1 + np.exp(-scores("joint", "rating")[user][some]))
        np.testing.assert_allclose([float(score) for _, score in found], expected, atol=1.5e-6, rtol=0)
        assert np.std(expected) > 2e-4


def export(rank, given):
    export_worker(given)


def test_the_tables_are_the_runs_whatever_number_of_workers_writes_them(tmp_path):
    place = RunFolder(str(run()))
    export_job([f"run={place.uri}", f"out={tmp_path / 'one'}", "workers=0"])
    given = {
        "config": (place.file("config.yaml")),
        "folder": str(dataset()),
        "run": place.uri,
        "step": best_step(place),
    }
    given |= {"config": Path(given["config"]).read_text(), "out": str(tmp_path / "two")}
    on_workers(2, export, given)
    killed = tmp_path / "two"
    (killed / "tables" / "user" / "part-00009.parquet").write_bytes(b"half")
    export_job([f"run={place.uri}", f"out={killed}", "workers=0"])
    assert sorted(path.name for path in (killed / "tables" / "user").iterdir()) == ["part-00000.parquet"]
    shutil.rmtree(killed)
    on_workers(2, export, given)
    with alone(), best_of_run(place.config(), str(dataset()), place, best_step(place)) as session:
        weights = {name: shard.clone().numpy() for name, (_, shard) in session.tables.shards().items()}
    about = json.loads((tmp_path / "one" / "export.json").read_text())
    assert set(about["tables"]) == set(weights)
    for name, rows in weights.items():
        for folder in ("one", "two"):
            found = pl.read_parquet(tmp_path / folder / "tables" / name / "*.parquet").sort("id")
            assert found["id"].to_list() == list(range(about["tables"][name]["rows"]))
            np.testing.assert_array_equal(np.array(found["vector"].to_list(), dtype=np.float32), rows[: len(found)])
            keys = dict(pl.read_parquet(dataset() / "vocab" / f"{name}.parquet").select("id", "key").iter_rows())
            assert found["key"].to_list()[FIRST_ID:] == [keys[i] for i in range(FIRST_ID, len(found))]


@pytest.mark.parametrize(
    "model",
    [
        lambda: CoNet(8, (16, 8)),
        lambda: MiNet(8, (16, 8)),
        lambda: DASL(8, (16, 8), recent=3),
    ],
)
def test_every_backbone_is_exported_and_scores_as_it_does_here(model):
    """Here: histories as training has them, one after the other without padding."""
    torch.manual_seed(5)
    model, longest = model().eval(), 5
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    program = exported(model, 8, longest).module()
    for rows in (1, 2, 7):
        lengths = torch.tensor([3, 0, 5, 1, 2, 5, 4])[:rows]
        names = list(model.spec().features)
        features = {f: torch.randn(rows, longest, 8) if of_history(f) else torch.randn(rows, 8) for f in names}
        domains = {f.partition("_")[0] for f in names if of_history(f)}
        real = torch.arange(longest) < lengths[:, None]
        plain = {f: x[real] if of_history(f) else x for f, x in features.items()}
        at = torch.arange(int(lengths.sum()))
        histories = {d: History(at, at, at, lengths) for d in domains}
        labels = type("Labels", (), {"histories": histories, "source_before": torch.zeros(rows).long()})()
        with torch.no_grad():
            expected = model(plain, labels).target_logit
            found = program(features, dict.fromkeys(domains, lengths))
        torch.testing.assert_close(found, expected)
        assert rows == 1 or expected.std() > 1e-4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["out=full"], "full: is not empty; choose another out="),
        (["run=nowhere"], "nowhere: not a run"),
        (["workers=-1"], "workers=-1: must be 0 or more"),
        (["workers=9"], "workers=9: more than stream.lanes=8"),
        (["top=3"], "top: unknown option"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("x")
    given = {"run": str(run()), "out": "out", "workers": "0"} | dict(word.split("=", 1) for word in more)
    with pytest.raises(UserError, match=re.escape(message)):
        export_job([f"{name}={value}" for name, value in given.items()])
    assert not Path("out").exists()
