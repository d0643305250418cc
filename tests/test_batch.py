"""Batches: negatives, pairs and dev rows are functions of (seed, epoch, example, j), whoever builds them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cdr_dist.bilevel.perceptron import HISTORIES
from cdr_dist.data.batch import BatchBuilder
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.feature_names import DOMAINS, HISTORY_FEATURES, ROW_FEATURES
from cdr_dist.data.hold_out import HoldOut
from cdr_dist.data.options import BatchOptions
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.stream import Place
from tests import datasets


@pytest.fixture(params=["rated", "sampled"])
def data(request):
    return str(getattr(datasets, request.param)())


def builder(folder, seed=8, features=ROW_FEATURES[:5], **options):
    return BatchBuilder(
        folder, read_manifest(folder), BatchOptions(**options), seed, features=features, histories=DOMAINS
    )


def stored(folder, split="train"):
    return pq.read_table(f"{folder}/{split}")


def column(batch, name):
    return batch.train[name].values().numpy()


def lists(batch, domain, part="item"):
    """The histories of a batch, written out."""
    read = batch.histories[domain]
    return [of.tolist() for of in getattr(read, part)[read.position].split(read.lengths.tolist())]


def test_a_batch_is_the_same_in_parts_and_in_any_order(data):
    make, table = builder(data), stored(data)
    whole = make.train(StoredRows.of(table), Place(3), table.num_rows)
    order = np.random.default_rng(0).permutation(table.num_rows)
    shuffled = make.train(StoredRows.of(table.take(order)), Place(3), table.num_rows)
    k = make.expansion
    rows = (order[:, None] * k + np.arange(k)).ravel()
    for name in whole.train.keys():
        assert np.array_equal(column(whole, name)[rows], column(shuffled, name))
    for name in ("label", "source_label", "source_valid", "weight", "user", "example"):
        assert torch.equal(getattr(whole, name)[rows], getattr(shuffled, name))
    for domain in HISTORIES:
        a, b = lists(whole, domain), lists(shuffled, domain)
        assert [a[i] for i in order] == b


def test_epochs_and_seeds_draw_anew(data):
    table = stored(data)
    first = builder(data).train(StoredRows.of(table), Place(), 1)
    for other in (
        builder(data).train(StoredRows.of(table), Place(1), 1),
        builder(data, seed=9).train(StoredRows.of(table), Place(), 1),
    ):
        assert not np.array_equal(column(first, "source_item"), column(other, "source_item"))


def test_training_negatives_avoid_the_users_training_positives_and_nothing_else():
    folder = str(datasets.sampled())
    table, make = stored(folder), builder(folder, negatives=3)
    positives = {}
    for user, item in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True):
        positives.setdefault(user, set()).add(item)
    drawn, seen_of_tests = 0, 0
    tests = dict(
        zip(stored(folder, "test")["user"].to_pylist(), stored(folder, "test")["item"].to_pylist(), strict=True)
    )
    for epoch in range(10):
        batch = make.train(StoredRows.of(table), Place(epoch), 1)
        negative = batch.label.numpy() == 0
        assert negative.sum() == 3 * table.num_rows
        for user, item in zip(column(batch, "user")[negative], column(batch, "target_item")[negative], strict=True):
            assert item not in positives[user]
            assert item >= 2
            seen_of_tests += item == tests.get(user)
            drawn += 1
    items = read_manifest(folder).rows["target_item"] - 2
    expected = drawn / (items - 4)
    assert abs(seen_of_tests - expected) < 5 * expected**0.5  # a test positive is as likely a negative as any item


def test_source_draws_are_the_users_own_behaviours_or_negatives_in_the_right_share():
    folder = str(datasets.sampled())
    table, make = stored(folder), builder(folder)
    own = dict(zip(table["user"].to_pylist(), table["source_candidates_item"].to_pylist(), strict=True))
    labels = []
    for epoch in range(5):
        batch = make.train(StoredRows.of(table), Place(epoch), 1)
        for user, item, label in zip(
            column(batch, "user"), column(batch, "source_item"), batch.source_label.tolist(), strict=True
        ):
            assert (item in own[user]) == (label == 1)
            labels.append(label)
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / len(labels) ** 0.5


def test_evaluation_draws_do_not_change_and_negatives_are_the_stored_ones():
    folder = str(datasets.sampled())
    table, make = stored(folder, "test"), builder(folder)
    a, b = make.evaluate(StoredRows.of(table), table.num_rows), make.evaluate(StoredRows.of(table), table.num_rows)
    assert np.array_equal(column(a, "source_item"), column(b, "source_item"))
    rows = column(a, "target_item").reshape(table.num_rows, 6)
    assert rows[:, 0].tolist() == table["item"].to_pylist()
    assert rows[:, 1:].tolist() == table["negatives_item"].to_pylist()
    assert a.label.view(-1, 6).sum(1).eq(1).all()


def test_evaluation_asks_about_a_row_and_its_negatives_with_one_behaviour_of_the_user():
    """Whatever the number of negatives: without any, as a full ranking asks, it is the same one."""
    folder = str(datasets.sampled())
    table, make = stored(folder, "test"), builder(folder)
    found = column(make.evaluate(StoredRows.of(table), table.num_rows), "source_item").reshape(table.num_rows, 6)
    assert (found == found[:, :1]).all()
    assert all(a in own for a, own in zip(found[:, 0], table["source_candidates_item"].to_pylist(), strict=True))
    alone = make.evaluate(StoredRows.of(table), table.num_rows, negatives=False)
    assert column(alone, "source_item").tolist() == found[:, 0].tolist()


def test_histories_keep_the_most_recent(data):
    table = stored(data)
    batch = builder(data, history_length=3).train(StoredRows.of(table), Place(), 1)
    found = lists(batch, "source")  # negatives share the history of their row
    assert found == [whole[-3:] for whole in table["source_history_item"].to_pylist()]


def test_dev_behaviours_are_other_training_behaviours_of_the_same_users(data):
    table, make = stored(data), builder(data)
    k = make.expansion
    batch = make.dev_of_same_users(StoredRows.of(table), 0, table.num_rows)
    assert column(batch, "user")[::k].tolist() == table["user"].to_pylist()
    chosen, peers = column(batch, "target_item")[::k], table["target_candidates_item"].to_pylist()
    for item, others, position in zip(chosen, peers, table["position"].to_pylist(), strict=True):
        assert item in others[:position] + others[position + 1 :]
    assert batch.weight.eq(1).all()


@pytest.mark.parametrize("hold_out", [None, HoldOut(seed=8, share=0.6, epochs=1)], ids=["any", "held out"])
def test_a_model_that_reads_target_histories_is_never_shown_a_dev_item_in_them(data, hold_out):
    """Every dev behaviour comes later than the row whose history is read, and all that do come."""
    table, make = stored(data), builder(data, features=[*ROW_FEATURES[:5], "target_history_item"])
    k, each = make.expansion, 5
    peers, position = table["target_candidates_item"].to_pylist(), table["position"].to_pylist()
    for epoch in range(3):
        lower = make.train(StoredRows.of(table), Place(epoch), table.num_rows, hold_out)
        held = (lower.weight[::k] == 0).tolist() if hold_out else [True] * table.num_rows
        allowed = set(zip(table["user"].to_pylist(), position, held, strict=True))
        dev = make.dev_of_same_users(StoredRows.of(table), epoch, table.num_rows, hold_out, each)
        items = column(dev, "target_item")[::k].reshape(-1, each)
        counts = (dev.weight[::k] == 1).numpy().reshape(-1, each)
        for row, user in enumerate(table["user"].to_pylist()):
            later = [i for i in range(position[row] + 1, len(peers[row])) if (user, i, True) in allowed]
            assert sorted(items[row, counts[row]]) == sorted(peers[row][i] for i in later)
        assert 0.1 < counts.any(1).mean() < 0.9


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_held_out_behaviours_leave_the_lower_batches_and_make_the_dev_batches(data, share):
    table, make = stored(data), builder(data)
    k, periods = make.expansion, []
    peers = dict(zip(table["user"].to_pylist(), table["target_candidates_item"].to_pylist(), strict=True))
    number = {user: len(items) for user, items in peers.items()}
    for epoch in range(0, 12, 2):
        hold_out = HoldOut(seed=8, share=share, epochs=2)
        lower = make.train(StoredRows.of(table), Place(epoch), table.num_rows, hold_out)
        again = make.train(StoredRows.of(table), Place(epoch + 1), table.num_rows, hold_out)
        dev = make.dev_of_same_users(StoredRows.of(table), epoch, table.num_rows, hold_out)
        assert torch.equal(lower.weight, again.weight)  # the same for a period of two epochs
        left_out = lower.weight[::k].numpy() == 0
        held = set(zip(column(lower, "user")[::k][left_out], table["position"].to_numpy()[left_out], strict=True))
        of_user = Counter(user for user, _ in held)
        for user, behaviours in number.items():
            assert of_user[user] in (int(share * behaviours), int(share * behaviours) + 1)
            assert of_user[user] < behaviours
        assert abs(len(held) / table.num_rows - share) < 0.05
        in_dev = dev.weight[::k].numpy() == 1
        assert set(column(dev, "user")[::k][in_dev]) == set(of_user)
        found = zip(column(dev, "user")[::k][in_dev], column(dev, "target_item")[::k][in_dev], strict=True)
        assert set(found) <= {(user, peers[user][position]) for user, position in held}
        periods.append(held)
    assert len(set.union(*periods)) > 2 * len(periods[0])  # it rotates


def test_categories_are_those_that_the_dataset_stores_with_every_behaviour(data):
    """Also an unknown item's."""
    make, table = builder(data), stored(data)
    k = make.expansion
    batch = make.train(StoredRows.of(table), Place(), 1)
    assert column(batch, "target_category")[::k].tolist() == table["category"].to_pylist()
    for domain in ("target", "source"):
        found = lists(batch, domain, "category")
        assert found == table[f"{domain}_history_category"].to_pylist()
    of_item = dict(zip(table["item"].to_pylist(), table["category"].to_pylist(), strict=True))
    item, category = column(batch, "target_item"), column(batch, "target_category")
    assert all(of_item.get(i, c) == c for i, c in zip(item.tolist(), category.tolist(), strict=True))
    tests = stored(data, "test")
    ids = pa.array([1] * tests.num_rows, pa.int32())
    unknown = StoredRows.of(tests.set_column(tests.schema.get_field_index("item"), "item", ids))
    assert column(make.evaluate(unknown, 1), "target_category")[0] == 1


def test_a_worker_without_rows_gets_one_filler(data):
    batch = builder(data).train(StoredRows.of(stored(data).slice(0, 0)), Place(), 10)
    assert len(batch) == 1
    assert batch.weight.tolist() == [0]
    assert not batch.source_valid.any()


@pytest.mark.parametrize("length", [3, 20])
def test_a_source_behaviour_stands_in_its_history_behind_what_came_before_it(data, length):
    manifest, options = read_manifest(data), BatchOptions(history_length=length)
    make = BatchBuilder(data, manifest, options, 8, features=(*ROW_FEATURES, *HISTORY_FEATURES))
    table, found = stored(data), 0
    candidates = [of for of in table["source_candidates_item"].to_pylist() for _ in range(make.expansion)]
    for epoch in range(3):
        batch = make.train(StoredRows.of(table), Place(epoch), 1)
        histories = [of for of in lists(batch, "source") for _ in range(make.expansion)]
        drawn = zip(column(batch, "source_item"), batch.source_before, batch.source_label, strict=True)
        for history, own, (item, before, label) in zip(histories, candidates, drawn, strict=True):
            assert 0 <= before <= len(history)
            if label > 0 and item in history and own.count(item) == 1:
                assert history[before] == item
                found += before > 0
    assert found > 100
