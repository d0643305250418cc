"""A run that begins where an earlier one ended, on a dataset that has grown: which rows it takes, and where new ones
start."""

from __future__ import annotations

import functools
import json

import numpy as np
import polars as pl
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.item_columns import item_categories
from cdr_dist.data.prepare import PrepareOptions, prepare
from cdr_dist.errors import UserError
from cdr_dist.training.evaluation_job import evaluate_run, evaluation_job
from cdr_dist.training.job import check_run
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.session import Session
from cdr_dist.training.warm_start import warm_start
from tests.datasets import rated, scratch
from tests.processes import on_workers
from tests.runs import KILLED, lines, same_run, summary, tensors, train, words

STEPS = "trainer.max_steps=19"


@functools.cache
def grown():
    """rated() and 100 users more, some of whose items are new: of a category that is there, and of one that is not."""
    return _prepared("grown", extends=str(rated()))


def _prepared(name, **options):
    raw, out = scratch() / "rated-logs", scratch() / name
    rated()
    logs = {}
    for domain in ("source", "target"):
        log = pl.read_parquet(raw / f"{domain}.parquet")
        number = pl.col("item_id").str.slice(1).cast(pl.Int64)
        new = log.filter(pl.col("user_id") < "u000100").with_columns(
            user_id="v" + pl.col("user_id").str.slice(1),
            item_id=pl.when(number % 3 == 0).then("n" + pl.col("item_id")).otherwise("item_id"),
            category=pl.when(number % 6 == 0).then(pl.lit("new")).otherwise("category"),
        )
        logs[domain] = str(scratch() / f"{name}-{domain}.parquet")
        pl.concat([log, new]).write_parquet(logs[domain])
    own = {"source_domain": "source", "target_domain": "target", "out": str(out), "rows_per_shard": 300, "seed": 8}
    prepare(PrepareOptions(**logs, **own, labels="rating", **options))
    return out


@functools.cache
def yesterday(recipe="biao"):
    """Two epochs on rated(); the best checkpoint may be of either."""
    run = scratch() / f"yesterday-{recipe}"
    train(words(rated(), run, f"recipe={recipe}", "trainer.max_steps=38"))
    return run


def started(rank, given, run, new_rows, statistics):
    config = from_words(given)
    session = Session(config, config.data)
    try:
        known = warm_start(session, RunFolder(run), new_rows, statistics)
        tables = {t: session.tables.unsharded(t) for t in session.tables.specs}
        states = {t: s[0].sum().item() for t, s in session.tables.optimiser_shards().items()}
        return known, tables, states, dict(session.model.state_dict())
    finally:
        session.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_old_rows_are_the_earlier_runs_and_new_ones_the_mean_of_their_category(workers):
    given = words(grown(), "nowhere", "recipe=joint")
    known, tables, states, model = on_workers(workers, started, given, str(yesterday("joint")), "mean", False)[0]
    before = best_tensors(yesterday("joint"))
    old, new = read_manifest(str(rated())), read_manifest(str(grown()))
    for table, now in tables.items():
        rows = old.rows[table]
        assert known[table] == rows
        assert len(now) == new.rows[table]
        was = before[f"tables.{table}.weights"]
        assert torch.equal(now[:rows], was[:rows])
        group = np.zeros(len(now), dtype=int)
        if table.endswith("_item"):
            group = item_categories(str(grown()), new, table.removesuffix("_item"))
        assert rows < len(now) or table == "source_user"
        for row in range(rows, len(now)):
            same = [was[r] for r in range(2, rows) if group[r] == group[row]] or list(was[2:rows])
            np.testing.assert_allclose(now[row], torch.stack(same).double().mean(0), atol=1e-6)
    assert any(group[r] not in group[2:rows] for r in range(rows, len(group))) or "item" not in table
    assert set(states.values()) == {0.0}
    assert all(torch.equal(values, before[f"dense.modules.model.{name}"]) for name, values in model.items())


def best_tensors(run):
    """As `tensors`, of the best checkpoint."""
    step = summary(run)["best"]["step"]
    folder = next((run / "checkpoints").glob(f"step-{step:08d}*"))
    return tensors(run, folder)


def test_statistics_come_along_where_that_is_asked_for_and_new_rows_start_from_the_seed():
    given = words(grown(), "nowhere", "recipe=joint")
    _, tables, states, _ = on_workers(1, started, given, str(yesterday("joint")), "seed", True)[0]
    before = best_tensors(yesterday("joint"))
    rows = read_manifest(str(rated())).rows
    for table, total in states.items():
        assert total == pytest.approx(before[f"tables.{table}.state0"][: rows[table]].sum().item(), rel=1e-5)
    fresh = on_workers(1, untouched, given)[0]
    assert torch.equal(tables["user"][rows["user"] :], fresh[rows["user"] :])
    assert not torch.equal(tables["user"][: rows["user"]], fresh[: rows["user"]])


def untouched(rank, given):
    config = from_words(given)
    session = Session(config, config.data)
    session.close()
    return session.tables.unsharded("user")


def test_a_run_begins_there_and_a_killed_one_still_does(tmp_path):
    given = [f"warm_start.run={yesterday()}", STEPS]
    train(words(grown(), tmp_path / "whole", *given))
    (start,) = lines(tmp_path / "whole", "start")
    assert start["values"]["user"] == read_manifest(str(rated())).rows["user"]
    assert summary(tmp_path / "whole")["started"] == start["values"]
    assert train(words(grown(), tmp_path / "killed", *given), killed_after=5) == [KILLED]
    train(words(grown(), tmp_path / "killed", *given))
    same_run(tmp_path / "whole", tmp_path / "killed")
    train(words(grown(), tmp_path / "cold", STEPS))
    cold, warm = (summary(tmp_path / run)["metrics"]["valid"]["auc"] for run in ("cold", "whole"))
    assert warm > cold, "one epoch more is one epoch more"


def test_an_old_model_is_measured_on_the_new_days(tmp_path, capsys):
    step, found = evaluate_run(str(yesterday()), "test", str(tmp_path / "scores.parquet"), data=str(grown()))
    assert step == summary(yesterday())["best"]["step"]
    assert len(pl.read_parquet(tmp_path / "scores.parquet")) == read_manifest(str(grown())).examples("test")
    assert 0.5 < found["auc"] < 1
    _, again = evaluate_run(str(yesterday()), "test", data=str(rated()))
    assert again["auc"] == summary(yesterday())["metrics"]["test"]["auc"]
    evaluation_job([f"run={yesterday()}", f"data={grown()}", "split=valid"])
    assert json.loads(capsys.readouterr().out)["data"] == str(grown())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["tables.width=16"], r"does not fit: tables.width is 12 there, 16 here"),
        (["model=minet"], r"does not fit: model is .*CoNet.* there, .*MiNet.* here"),
        (["recipe=target_only"], r"does not fit: the recipe's source is True there, False here"),
        (["warm_start.run=nowhere"], r"nowhere: not a run"),
    ],
)
def test_an_earlier_run_that_does_not_fit_is_one_line(more, message, tmp_path):
    given = words(grown(), tmp_path / "run", f"warm_start.run={yesterday()}", *more)
    with pytest.raises(UserError, match=message):
        check_run(from_words(given))


def test_a_dataset_with_other_ids_is_refused(tmp_path):
    alone = _prepared("alone")
    with pytest.raises(UserError, match=r"\w+ \S+ was \d+ in \S+ and is \d+ now: prepare it with extends="):
        check_run(from_words(words(alone, tmp_path / "run", f"warm_start.run={yesterday()}")))
    with pytest.raises(UserError, match="prepare it with extends="):
        evaluate_run(str(yesterday()), "test", data=str(alone))
