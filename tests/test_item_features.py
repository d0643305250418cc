"""Declared columns of item files, from the file to the model: brand, title words and whatever else."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.prepare import check, prepare
from cdr_dist.data.prepare_options import options_from_words
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.training.checks import check_before_start
from cdr_dist.training.full_ranking import full_ranking
from cdr_dist.training.launch import alone
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests.datasets import described, rated
from tests.runs import distances, summary, train, words

MINET = ["model=minet", "model.hidden=[16,8]", "model.attention=8", "model.features=[brand,title]"]


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
    """Item key -> the keys of its values."""
    key = {1: "?"} | dict(pl.read_parquet(folder / f"vocab/{role}_{column}.parquet").select("id", "key").iter_rows())
    items = pl.read_parquet(folder / f"vocab/{role}_item.parquet")
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
    config = from_words(words(rated(), tmp_path, *MINET, "recipe=joint"))
    with pytest.raises(UserError) as error:
        check_before_start(config, str(rated()))
    assert "MiNet reads the feature target_brand, which" in str(error.value)
    assert "item_columns.features=brand" in str(error.value)


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
