"""Declared columns of item and user files, from the file to the model: brand, title words, region, whatever else."""

from __future__ import annotations

import functools
import json

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.prepare import check, prepare
from cdr_dist.data.prepare_options import options_from_words
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.production.export_job import export_job
from cdr_dist.production.forget_dataset import forget_in_dataset
from cdr_dist.production.recommendation_job import recommendation_job
from cdr_dist.training.best import best_of_run
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.checks import check_before_start
from cdr_dist.training.full_ranking import full_ranking
from cdr_dist.training.launch import alone
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests.datasets import copied, described, rated, scratch
from tests.runs import distances, summary, train, words

MINET = ["model=minet", "model.hidden=[16,8]", "model.attention=8", "model.features=[brand,title]"]
MINET += ["model.user_features=[region,hobbies]"]


def logs(folder, **items):
    """Three users of both domains, whose items are those named; -> words of prepare."""
    names = list(items["item_id"])
    behaviours = [(f"u{u}", name, 10 * place) for u in range(3) for place, name in enumerate(names)]
    log = pl.DataFrame(behaviours, schema=["user_id", "item_id", "timestamp"], orient="row").with_columns(rating=5)
    for role in ("source", "target"):
        log.write_csv(folder / f"{role}.csv")
        pl.DataFrame({"category": ["c"] * len(names)} | items).write_parquet(folder / f"{role}_items.parquet")
    found = [f"{role}={folder}/{role}.csv" for role in ("source", "target")]
    found += [f"{role}_items={folder}/{role}_items.parquet" for role in ("source", "target")]
    return [*found, f"out={folder}/out"]


def values_of(folder, column, role="target"):
    """Item or user key -> the keys of its values."""
    key = {1: "?"} | dict(pl.read_parquet(folder / f"vocab/{role}_{column}.parquet").select("id", "key").iter_rows())
    items = pl.read_parquet(folder / f"vocab/{role if role == 'user' else f'{role}_item'}.parquet")
    return {name: [key[v] for v in values] for name, values in items.select("key", column).iter_rows()}


def test_values_come_from_the_texts_in_their_order(tmp_path):
    items = {
        "item_id": ["a", "b", "c", "d"],
        "brand": ["Acme, Ltd", "Acme, Ltd", None, "Rare"],
        "title": ["The Blue-hat, the BLUE one", "ÉTUDE hat 2", "", "hat Étude étude"],
        "tags": ["x y|z", "z| |x y", "|", "lonely|z"],
    }
    given = logs(tmp_path, **items)
    prepare(options_from_words([*given, "item_columns.features=brand,title:words,tags:|"]))
    out = tmp_path / "out"
    assert values_of(out, "brand") == {"a": ["Acme, Ltd"], "b": ["Acme, Ltd"], "c": [], "d": ["?"]}
    assert values_of(out, "title") == {"a": ["?", "hat"], "b": ["étude", "hat", "?"], "c": [], "d": ["hat", "étude"]}
    assert values_of(out, "tags") == {"a": ["x y", "z"], "b": ["z", "x y"], "c": [], "d": ["?", "z"]}
    manifest = read_manifest(str(out))
    assert manifest.features == {"source": ["brand", "title", "tags"], "target": ["brand", "title", "tags"]}
    assert manifest.rows["target_title"] == 2 + 2


def test_rare_values_and_long_bags_are_cut_as_asked(tmp_path):
    given = logs(tmp_path, item_id=["a", "b", "c"], title=["one two three four", "five", "one"])
    options = [*given, "item_columns.features=title:words", "feature_items=1", "feature_values=2"]
    prepare(options_from_words(options))
    assert values_of(tmp_path / "out", "title") == {"a": ["one", "two"], "b": ["five"], "c": ["one"]}


def test_a_domain_may_have_columns_of_its_own(tmp_path):
    given = logs(tmp_path, item_id=["a", "b", "c"], brand=["x", "x", "x"], title=["p", "p", "q"])
    own = ["item_columns.features=brand", "source_item_columns.features=title:words"]
    prepare(options_from_words([*given, *own]))
    assert read_manifest(str(tmp_path / "out")).features == {"source": ["title"], "target": ["brand"]}


def users_of(folder, **users):
    """Words of prepare for a user file."""
    pl.DataFrame(users).write_csv(folder / "users.csv")
    return [f"user_file={folder}/users.csv", "user_columns.features=region,tags:|"]


def test_of_users_likewise(tmp_path):
    """Also of those that no log has (left out), or that the file does not name; of one named twice the first line."""
    given = logs(tmp_path, item_id=["a", "b", "c"])
    said = {"user_id": ["u1", "u0", "u9", "u1"], "region": ["north", "north", "x", "y"], "tags": ["p|q", "q", "p", "p"]}
    prepare(options_from_words([*given, *users_of(tmp_path, **said)]))
    out = tmp_path / "out"
    assert values_of(out, "region", "user") == {"u0": ["north"], "u1": ["north"], "u2": []}
    assert values_of(out, "tags", "user") == {"u0": ["q"], "u1": ["?", "q"], "u2": []}
    manifest = read_manifest(str(out))
    assert manifest.features == {"source": [], "target": [], "user": ["region", "tags"]}
    assert (manifest.rows["user_region"], manifest.rows["user_tags"]) == (3, 3)


def test_what_was_said_of_a_user_stays_until_something_else_is_said(tmp_path):
    given = logs(tmp_path, item_id=["a", "b", "c"])
    first = {"user_id": ["u0", "u1", "u2"], "region": ["north", "north", "south"], "tags": ["p", "p", ""]}
    prepare(options_from_words([*given, *users_of(tmp_path, **first), "feature_items=1"]))
    second = {"user_id": ["u1"], "region": ["east"], "tags": ["q"]}
    again = [word for word in given if not word.startswith("out=")]
    again += [*users_of(tmp_path, **second), "feature_items=1", f"extends={tmp_path}/out", f"out={tmp_path}/later"]
    prepare(options_from_words(again))
    assert values_of(tmp_path / "later", "region", "user") == {"u0": ["north"], "u1": ["east"], "u2": ["south"]}
    assert values_of(tmp_path / "later", "tags", "user") == {"u0": ["p"], "u1": ["q"], "u2": []}
    keys = pl.read_parquet(tmp_path / "later/vocab/user_region.parquet")["key"].to_list()
    assert keys == ["north", "south", "east"], "new values come behind"


@pytest.mark.parametrize(
    ("words_", "expected"),
    [
        (["user_columns.features=age"], "user_columns.features=age: needs user_file="),
        (["user_file={folder}/users.csv"], "user_file=: needs user_columns.features="),
        (
            ["user_file={folder}/users.csv", "user_columns.features=age"],
            "no column 'age' (user_columns.features, age=)",
        ),
        (["user_file={folder}/nowhere.csv", "user_columns.features=region"], "nowhere.csv"),
    ],
)
def test_a_mistake_about_the_users_is_named(tmp_path, words_, expected):
    given = logs(tmp_path, item_id=["a", "b", "c"])
    users_of(tmp_path, user_id=["u0"], region=["x"])
    with pytest.raises(UserError) as error:
        check(options_from_words([*given, *(word.format(folder=tmp_path) for word in words_)]))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("colour", "no column 'colour' (item_columns.features, colour=)"),
        ("brand,brand", "names brand twice"),
        ("category", "'category' cannot be a feature's name"),
        ("my_history", "'my_history' cannot be a feature's name"),
    ],
)
def test_a_mistake_in_the_declaration_is_named(tmp_path, features, expected):
    given = logs(tmp_path, item_id=["a", "b", "c"], brand=["x", "x", "x"])
    with pytest.raises(UserError) as error:
        check(options_from_words([*given, f"item_columns.features={features}"]))
    assert expected in str(error.value)


def test_features_need_an_item_file():
    with pytest.raises(UserError, match="needs source_items="):
        options_from_words(["source=a.csv", "target=b.csv", "out=c", "item_columns.features=brand"])


def test_a_model_that_wants_what_the_dataset_lacks_is_told_both_names(tmp_path):
    config = from_words(words(rated(), tmp_path, *MINET[:-1], "recipe=joint"))
    with pytest.raises(UserError) as error:
        check_before_start(config, str(rated()))
    assert "MiNet reads the feature target_brand, which" in str(error.value)
    assert "item_columns.features=brand" in str(error.value)
    config = from_words(words(rated(), tmp_path, "model=minet", "model.user_features=[age]", "recipe=joint"))
    with pytest.raises(
        UserError, match=r"reads the feature user_age, .*: prepare it with user_file= and user_columns\.fe"
    ):
        check_before_start(config, str(rated()))


def test_a_bag_is_the_sum_of_its_values_rows(tmp_path):
    """Of rows and of histories, against the item vocabulary read by itself."""
    config = from_words(words(described(), tmp_path, *MINET, "recipe=joint"))
    with alone():
        session = Session(config, str(described()), phases_of(config)[0].cycle)
        batch = session.lower.next().batch
        found = session.tables.read(ids_by_table(batch.train, session.features))
        embedded = rows_by_feature(found, batch.train, session.features)
        tables = {name: session.tables.unsharded(name) for name in session.tables.specs}
        session.close()
    users = pl.read_parquet(described() / "vocab/user.parquet")
    for column, most in (("region", 1), ("hobbies", 2)):
        values, table = dict(users.select("id", column).iter_rows()), tables[f"user_{column}"]
        assert (min(map(len, values.values())), max(map(len, values.values()))) == (0, most)
        expected = [sum((table[v] for v in values[u]), torch.zeros(table.shape[1])) for u in batch.user.tolist()]
        torch.testing.assert_close(embedded[f"user_{column}"], torch.stack(expected))
    for domain in ("target", "source"):
        items = pl.read_parquet(described() / f"vocab/{domain}_item.parquet")
        for column in ("brand", "title"):
            values = dict(items.select("id", column).iter_rows())
            table = tables[f"{domain}_{column}"]
            assert max(map(len, values.values())) > (1 if column == "title" else 0)
            for feature, of in (
                (f"{domain}_{column}", batch.train[f"{domain}_item"].values()),
                (f"{domain}_history_{column}", batch.histories[domain].item),
            ):
                expected = [
                    sum((table[v] for v in values.get(i, [])), torch.zeros(table.shape[1])) for i in of.tolist()
                ]
                torch.testing.assert_close(embedded[feature], torch.stack(expected))


@pytest.mark.parametrize("more", [["recipe=joint"], ["recipe=biao", "hypergradient.theta=[dense,tables]"]])
def test_two_workers_train_as_one(more, tmp_path):
    for workers in (1, 2):
        train(words(described(), tmp_path / f"{workers}", *MINET, *more), workers)
    one, two = (summary(tmp_path / f"{workers}")["metrics"]["valid"]["logloss"] for workers in (1, 2))
    assert one == pytest.approx(two, abs=2e-4)
    apart = distances(tmp_path / "1", tmp_path / "2")
    assert max(apart.values()) < 1e-3, apart


def test_values_that_only_histories_have_train(tmp_path):
    config = from_words(words(described(), tmp_path, *MINET, "recipe=joint"))
    with alone():
        session = Session(config, str(described()), phases_of(config)[0].cycle)
        (update,) = phases_of(config)[0].cycle
        update.bind(session)
        update.run(False)
        before = {name: session.tables.unsharded(name).clone() for name in session.tables.specs}
        batch = session.lower.peek().batch
        update.run(False)
        after = {name: session.tables.unsharded(name) for name in session.tables.specs}
        session.close()
    for name in ("target_title", "source_brand"):
        domain, column = name.split("_")
        used = {*batch.train[name].values().tolist(), *batch.train[f"{domain}_history_{column}"].values().tolist()}
        moved = set((after[name] != before[name]).any(1).nonzero().flatten().tolist())
        assert moved
        assert moved <= used


def test_a_step_in_parts_is_the_step(tmp_path):
    for parts in (1, 3):
        more = [f"batch.accumulate={parts}", "recipe=joint", "trainer.max_steps=4"]
        train(words(described(), tmp_path / f"{parts}", *MINET, *more))
    one, three = (summary(tmp_path / f"{parts}")["metrics"]["valid"]["logloss"] for parts in (1, 3))
    assert one == pytest.approx(three, abs=1e-6)


def test_the_full_ranking_scores_items_with_their_values(tmp_path):
    """HR@all is 1, and a model whose candidates' values are hidden ranks otherwise."""
    config = from_words(words(described(), tmp_path, *MINET, "recipe=joint"))
    with alone():
        session = Session(config, str(described()), phases_of(config)[0].cycle)
        (update,) = phases_of(config)[0].cycle
        update.bind(session)
        for _ in range(20):
            update.run(False)
        every = full_ranking(session, "test", [5, session.manifest.rows["target_item"]])
        empty = session.builder._values["target"]
        for column, lists in empty.items():
            empty[column] = type(lists).jagged(np.zeros(0, np.int32), np.zeros(len(lists.lengths), np.int64))
        without = full_ranking(session, "test", [5])
        session.close()
    assert every[f"full_hr@{session.manifest.rows['target_item']}"] == 1.0
    assert every["full_ndcg@5"] != without["full_ndcg@5"]


@pytest.mark.parametrize("hidden", [False, True], ids=["as said", "another region"])
def test_recommendations_are_by_what_is_said_of_a_user(tmp_path, hidden):
    """The best item of a user, every pair scored by itself; and another one where all are said to be of one region."""
    run, out = trained_run(), tmp_path / "out"
    recommendation_job([f"run={run}", f"out={out}", "top=1", "seen=keep", "workers=0", f"data={described()}"])
    found = dict(pl.read_parquet(out / "part-*.parquet").select("user_id", pl.col("item_id").list.first()).iter_rows())
    place = RunFolder(str(run))
    keys = dict(pl.read_parquet(described() / "vocab/target_item.parquet").select("id", "key").iter_rows())
    items = np.array(sorted(keys))
    with alone(), best_of_run(place.config(), str(described()), place, best_step(place)) as session, torch.no_grad():
        session.model.eval()
        if hidden:
            regions = session.builder._values["user"]["region"]
            one = np.full(len(regions.lengths), 2, np.int32)
            session.builder._values["user"]["region"] = type(regions).jagged(one, np.ones(len(one), np.int64))
        asked = session.builder.target_items(items)
        of_items = {f: t for f, t in session.features.items() if f.startswith("target") and "history" not in f}
        candidates = rows_by_feature(session.tables.read(ids_by_table(asked, of_items)), asked, of_items)
        best = {}
        stored = StoredRows.of(pq.read_table(described() / "users"))
        for row, user in enumerate(stored.texts("user_id").to_pylist()):
            batch = session.builder.users(stored.arranged(np.array([row])), 1)
            rows = session.tables.read(ids_by_table(batch.train, session.features))
            own = rows_by_feature(rows, batch.train, session.features)
            many = {f: of if "history" in f else of.expand(len(items), -1) for f, of in own.items()} | candidates
            best[user] = keys[items[int(session.model(many, batch).target_logit.argmax())]]
    same = np.mean([found[user] == item for user, item in best.items()])
    assert same < 0.9 if hidden else same > 0.99  # two items may be the best


@functools.cache
def trained_run():
    run = scratch() / "of-users"
    train(words(described(), run, *MINET, "recipe=joint", "tables.lr=0.3", "dense.lr=0.01"))
    return run


def test_who_is_forgotten_leaves_nothing_that_was_said(tmp_path):
    folder = copied(described(), tmp_path)
    before = pl.read_parquet(folder / "vocab/user.parquet")
    forget_in_dataset(str(folder), ["u000007"], {"u000007": before.filter(key="u000007")["id"].item()}, lambda: None)
    manifest = read_manifest(str(folder))
    after = pl.read_parquet(folder / manifest.vocab["user"].path)
    assert after.rows() == before.filter(pl.col("key") != "u000007").rows()
    train(words(folder, tmp_path / "run", *MINET, "recipe=joint", "trainer.max_steps=2"))


def test_an_exported_run_names_the_values_of_its_users(tmp_path):
    export_job([f"run={trained_run()}", f"out={tmp_path / 'out'}", "workers=0"])
    about = json.loads((tmp_path / "out/export.json").read_text())
    assert about["features"]["user_region"]["values"] == "sum"
    rows = pl.read_parquet(tmp_path / "out/tables/user_region/part-00000.parquet")
    names = dict(rows.select("id", "key").iter_rows())
    said = pl.read_parquet(tmp_path / "out/vocab/user.parquet").filter(key="u000007")["region"].item()
    assert [names[value] for value in said] == ["region 3"]
