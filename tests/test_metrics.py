"""Metrics: against counting by hand, and the same bits however the rows are ordered or spread over workers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from cdr_dist.evaluation.metrics import Predictions, auc, gauc, logloss, ranking
from tests.processes import on_workers


def auc_by_counting(labels, scores):
    positives = [s for y, s in zip(labels, scores, strict=True) if y == 1]
    negatives = [s for y, s in zip(labels, scores, strict=True) if y == 0]
    if not positives or not negatives:
        return math.nan
    wins = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives)
    return wins / (len(positives) * len(negatives))


def gauc_by_counting(users, labels, scores):
    total, rows, counted = 0.0, 0, 0
    for user in set(users):
        of_user = [(y, s) for u, y, s in zip(users, labels, scores, strict=True) if u == user]
        value = auc_by_counting(*zip(*of_user, strict=True))
        if not math.isnan(value):
            total, rows, counted = total + len(of_user) * value, rows + len(of_user), counted + 1
    return (total / rows if rows else math.nan), counted


def ranking_by_enumeration(labels, scores, k):
    """hr, ndcg and mrr at k of one list, averaged over all orders that put no lower score first."""
    orders = [
        order
        for order in itertools.permutations(range(len(labels)))
        if all(scores[i] >= scores[j] for i, j in itertools.pairwise(order))
    ]
    ranks = [1 + next(r for r, i in enumerate(order) if labels[i] == 1) for order in orders]
    hits = [rank for rank in ranks if rank <= k]
    sums = len(hits), sum(1 / math.log2(1 + r) for r in hits), sum(1 / r for r in hits)
    return [value / len(orders) for value in sums]


# Few distinct scores, so that most examples have ties.
SCORES = st.one_of(st.sampled_from([-2.0, -0.5, 0.0, 0.5, 1.0]), st.floats(-30, 30))
ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 1), SCORES, st.integers(0, 6)), min_size=1, max_size=40)
LISTS = st.lists(st.lists(SCORES, min_size=1, max_size=6), min_size=1, max_size=4)


def columns(rows):
    return [np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)]


def predictions(rows, batch=1000):
    """Rows of (user, label, score, group[, weight]) as appended in batches."""
    collected = Predictions()
    for start in range(0, len(rows), batch):
        user, label, score, group, *weight = map(torch.tensor, columns(rows[start : start + batch]))
        weight = weight[0].float() if weight else torch.ones(len(user))
        collected.append(user.long(), label.float(), score, weight, group.long())
    return collected


def one_positive_each(lists):
    """Rows in which the first item of each list is its positive."""
    return [(g, int(i == 0), score, g) for g, scores in enumerate(lists) for i, score in enumerate(scores)]


def equal_bits(a, b):
    """Equal to the last bit, NaN being equal to NaN."""
    return a.keys() == b.keys() and all(np.float64(a[k]).tobytes() == np.float64(b[k]).tobytes() for k in a)


@given(ROWS)
def test_auc_and_gauc_equal_counted_pairs(rows):
    users, labels, scores, _ = columns(rows)
    assert auc(labels, scores) == pytest.approx(auc_by_counting(labels, scores), abs=1e-15, nan_ok=True)
    value, counted = gauc(users, labels, scores)
    expected, expected_users = gauc_by_counting(users, labels, scores)
    assert value == pytest.approx(expected, abs=1e-15, nan_ok=True)
    assert counted == expected_users


@settings(deadline=None)
@given(LISTS, st.integers(1, 7))
def test_ranking_metrics_equal_the_mean_over_all_orders_of_tied_items(lists, k):
    _, labels, scores, groups = columns(one_positive_each(lists)[::-1])  # the positive need not come first
    expected = np.mean([ranking_by_enumeration([1] + [0] * (len(x) - 1), x, k) for x in lists], axis=0)
    got = ranking(groups, labels, scores, [k])
    assert [got[f"hr@{k}"], got[f"ndcg@{k}"], got[f"mrr@{k}"]] == pytest.approx(list(expected), abs=1e-12)


@given(ROWS)
def test_logloss_equals_torch_in_float64(rows):
    _, labels, scores, _ = columns(rows)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(scores), torch.tensor(labels))
    assert logloss(labels, scores) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(("negatives", "k", "hr"), [(99, 10, 0.10), (200, 10, 10 / 201), (99, 5, 0.05)])
def test_constant_scorer_gets_the_random_value(negatives, k, hr):
    labels = np.eye(1, 1 + negatives)[0]  # the positive comes first, as stored
    got = ranking(np.zeros(1 + negatives), labels, np.zeros(1 + negatives), [k])
    ranks = np.arange(1, k + 1)
    assert got[f"hr@{k}"] == pytest.approx(hr)
    assert got[f"ndcg@{k}"] == pytest.approx(np.sum(1 / np.log2(1 + ranks)) / (1 + negatives))
    assert got[f"mrr@{k}"] == pytest.approx(np.sum(1 / ranks) / (1 + negatives))
    assert auc(labels, np.zeros(1 + negatives)) == 0.5


def test_auc_tells_large_logits_apart_where_a_float32_sigmoid_ties_them():
    from torchmetrics.functional.classification import binary_auroc  # slow to import, also in spawned workers

    labels, scores = [0, 1], [20.0, 21.0]
    assert auc(labels, scores) == 1.0
    assert binary_auroc(torch.tensor(scores), torch.tensor(labels)) == 0.5


@given(ROWS)
def test_monotone_transforms_of_the_scores_change_nothing_but_logloss(rows):
    _, distinct = np.unique([row[2] for row in rows], return_inverse=True)
    cubed = [(u, y, float(rank) ** 3 - 5, i) for i, ((u, y, _, _), rank) in enumerate(zip(rows, distinct, strict=True))]
    plain = [(u, y, s, i) for i, (u, y, s, _) in enumerate(rows)]
    before, after = (predictions(r).gather().compute() for r in (plain, cubed))
    before["logloss"] = after["logloss"] = 0.0
    assert equal_bits(before, after)


@given(LISTS, st.integers(1, 3))
def test_monotone_transforms_leave_ranking_metrics(lists, k):
    ranks = np.unique([s for scores in lists for s in scores], return_inverse=True)[1].astype(float)
    _, labels, scores, groups = columns(one_positive_each(lists))
    assert equal_bits(ranking(groups, labels, scores, [k]), ranking(groups, labels, np.exp(ranks / 9), [k]))


@given(LISTS, st.integers(1, 9), st.randoms(use_true_random=False))
def test_order_and_batch_size_do_not_change_a_bit(lists, batch, random):
    rows = one_positive_each(lists)
    shuffled = random.sample(rows, len(rows))
    before, after = predictions(rows).gather(), predictions(shuffled, batch).gather()
    assert equal_bits(before.compute([1, 2, 5]), after.compute([1, 2, 5]))


def test_filler_rows_do_not_count():
    rows = [(1, 1, 0.3, 7, 1.0), (1, 0, 0.1, 7, 1.0), (2, 0, 0.2, 8, 1.0), (2, 1, 0.9, 8, 1.0)]
    filler = [(1, 0, 9.0, 7, 0.0), (3, 1, -4.0, 9, 0.0), (3, 1, math.nan, 9, 0.0)]
    mixed = predictions(rows[:2] + filler + rows[2:]).gather()
    assert len(mixed) == 4
    assert equal_bits(mixed.compute([1]), predictions(rows).gather().compute([1]))


def test_gathered_rows_stand_by_list_positive_first_then_as_appended():
    rows = [(1, 0, 0.5, 9), (2, 0, 0.4, 3), (1, 1, 0.3, 9), (2, 0, 0.9, 3), (2, 1, 0.1, 3)]
    gathered = predictions(rows, batch=2).gather()
    assert gathered.group.tolist() == [3, 3, 3, 9, 9]
    assert gathered.score == pytest.approx([0.1, 0.4, 0.9, 0.3, 0.5])


def test_undefined_metrics_are_nan():
    one_class = predictions([(1, 1, 0.5, 1), (2, 1, 0.1, 2)]).gather().compute()
    assert math.isnan(one_class["auc"])
    assert math.isnan(one_class["gauc"])
    assert one_class["gauc_users"] == 0
    nothing = Predictions().gather().compute([5])
    assert nothing["rows"] == nothing["gauc_users"] == 0
    assert all(math.isnan(nothing[name]) for name in ("auc", "gauc", "logloss", "hr@5", "ndcg@5", "mrr@5"))


@pytest.mark.parametrize(
    ("rows", "ks", "message"),
    [
        ([(1, 1, math.nan, 1), (1, 0, math.inf, 1), (1, 0, 0.0, 1)], [], "2 of 3 scores are not finite"),
        ([(1, 1, 0.0, 1), (1, 0.5, 0.0, 1)], [], "1 of 2 labels are neither 0 nor 1"),
        ([(1, 1, 0.0, 1), (1, 1, 0.0, 1), (1, 0, 0.0, 2), (1, 1, 0.0, 3)], [1], "2 of 3 ranking lists"),
        ([(1, 1, 0.0, 1), (1, 0, 0.0, 1)], [5, 0], "k of 1 or more, not 0"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_with_their_number(rows, ks, message):
    with pytest.raises(ValueError, match=message):
        predictions(rows).gather().compute(ks)


def random_rows(lists=60):
    """Lists of one positive and 1 to 5 negatives; float32 scores of a coarse grid, so that some tie."""
    random = np.random.default_rng(8)
    sizes = random.integers(2, 7, lists)
    group = np.repeat(random.permutation(lists), sizes)
    label = np.concatenate([np.eye(1, size)[0] for size in sizes])
    score = np.round(random.normal(size=len(group)) + label, 1) / 3
    return list(zip((group % 11).tolist(), label.tolist(), score.tolist(), group.tolist(), strict=True))


def gather_on_a_worker(rank):
    """Share name -> (gathered rows, metrics), over all three workers and over the first two."""
    rows, results = random_rows(), {}
    for world in (2, 3):
        members = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        # Lists stay whole, rows are dealt out one by one, the last worker has everything.
        shares = {
            "lists": [row for row in rows if row[3] % world == rank],
            "rows": rows[rank::world],
            "one": rows if rank == world - 1 else [],
            "none": [],
        }
        for name, share in shares.items():
            gathered = predictions(share, batch=7).gather(members)
            results[world, name] = gathered, gathered.compute([1, 3])
    return results


def test_two_and_three_workers_get_the_bits_of_one():
    alone = predictions(random_rows()).gather()
    workers = on_workers(3, gather_on_a_worker)
    assert [len(results) for results in workers] == [8, 8, 4]
    for (_, share), (rows, metrics) in itertools.chain(*(results.items() for results in workers)):
        if share == "none":
            assert metrics["rows"] == 0
            continue
        assert equal_bits(metrics, alone.compute([1, 3])), share
        if share != "rows":  # where lists stay whole, even the rows stand in the same order
            for column in ("user", "label", "score", "group"):
                assert np.array_equal(getattr(rows, column), getattr(alone, column)), (share, column)
