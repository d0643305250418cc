"""Stored negatives: their distribution against enumeration, what is never drawn, and what a random scorer then gets."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from cdr_dist.data import stored_negatives as module
from cdr_dist.data.behaviours import Behaviours
from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.stored_negatives import Catalogue, Rows, stored_negatives
from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import ranking
from tests.prepare_oracle import expected_examples
from tests.problem import replaced
from tests.test_prepare import digests, keys_of, rows_of, run

POPULAR = np.array([8.0, 4.0, 2.0, 1.0, 0.0, 1.0])
N = 4000


def behaviours(users, pairs):
    pairs = sorted(pairs)
    user, item = (np.array([p[i] for p in pairs], dtype=np.int64) for i in (0, 1))
    return Behaviours(users, user, item + FIRST_ID, np.zeros_like(user), np.ones(len(user), dtype=np.float32))


def drawn(catalogue, taken=((0, 0),), own=5, rows=N, seed=8):
    """Of rows of one user whose own item is number `own`: item numbers, from 0."""
    ids = np.arange(rows)
    some = Rows(np.zeros(rows, dtype=np.int64), ids, np.full(rows, own + FIRST_ID))
    return stored_negatives(seed, some, behaviours(1, taken), catalogue) - FIRST_ID


def law(weight, out, replacement):
    """Ordered pair -> probability: one draw after the other by weight, among what is left."""
    left = [0.0 if i in out else float(w) for i, w in enumerate(weight)]
    found = {}
    for a, b in itertools.product(range(len(left)), repeat=2):
        rest = [0.0 if i == a and not replacement else w for i, w in enumerate(left)]
        found[a, b] = left[a] / sum(left) * rest[b] / sum(rest)
    return {pair: p for pair, p in found.items() if p > 0}


@pytest.mark.parametrize("repeated", [True, False])  # draws until they fit, or all items looked at
@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("weight", [None, POPULAR, POPULAR**0.5])
def test_pairs_are_drawn_as_often_as_one_after_the_other(weight, replacement, repeated):
    with replaced(module, "SPARE", (0.0, 0.0) if repeated else (2.0, 2.0)):
        found = Counter(map(tuple, drawn(Catalogue(6, 2, weight, replacement)).tolist()))
    expected = law(np.ones(6) if weight is None else weight, {0, 5}, replacement)
    assert found.keys() <= expected.keys()
    chi = sum((found[pair] - N * p) ** 2 / (N * p) for pair, p in expected.items())
    freedom = len(expected) - 1
    assert chi < freedom + 4 * (2 * freedom) ** 0.5  # mean and four standard deviations


def test_a_draw_is_a_function_of_seed_and_example():
    catalogue = Catalogue(6, 2, POPULAR)
    whole = drawn(catalogue)
    some = Rows(np.zeros(3, dtype=np.int64), np.array([7, 3, 99]), np.full(3, 5 + FIRST_ID))
    alone = stored_negatives(8, some, behaviours(1, [(0, 0)]), catalogue) - FIRST_ID
    assert alone.tolist() == whole[[7, 3, 99]].tolist()
    assert (drawn(catalogue, seed=9) != whole).any()


@pytest.mark.parametrize(
    ("catalogue", "taken", "error"),
    [
        (Catalogue(6, 5), [(0, 0)], "eval_negatives=5: the catalogue has 6 target items, of which one user leaves 4"),
        (Catalogue(6, 4, POPULAR), [(0, 0)], "has 5 target items that training has, of which one user leaves 3"),
        (Catalogue(6, 9, POPULAR, True), [(0, i) for i in (0, 1, 2, 3)], "of which one user leaves 0"),
    ],
)
def test_too_few_items_are_named(catalogue, taken, error):
    with pytest.raises(UserError, match=error):
        drawn(catalogue, taken)


def test_one_item_is_enough_with_replacement():
    assert set(drawn(Catalogue(6, 9, POPULAR, True), [(0, i) for i in (0, 1, 2)]).ravel().tolist()) == {3}


def log(items, users=60):
    """Three to eight behaviours a user; low numbers are popular, and the last item is in no training row."""
    generator = np.random.default_rng(4)
    rows = [
        (f"u{u}", f"i{i:02d}")
        for u in range(users)
        for i in np.sort(generator.integers(0, items, 2 + u % 6)) ** 2 // items
    ]
    rows += [("u0", f"i{items:02d}")]
    return [(user, item, n, 5.0) for n, (user, item) in enumerate(rows)]


@pytest.mark.parametrize("sampling", ["uniform", "popularity"])
@pytest.mark.parametrize("exclude", ["positives", "train", "item"])
def test_what_is_excluded_is_never_drawn_and_the_rest_is(tmp_path, exclude, sampling):
    rows = log(20)
    given = {"labels": "sampled", "eval_negatives": 4, "eval_exclude": exclude, "eval_sampling": sampling}
    options, manifest = run(tmp_path / "one", rows, rows, **given)
    examples, item = expected_examples(rows, rows, options), keys_of(options.out, "target_item")
    user = keys_of(options.out, "user")
    trained = Counter(e["item"] for e in examples.values() if e["split"] == "train")
    seen = Counter()
    for split in ("valid", "test"):
        for row in rows_of(options.out, split):
            name, own = user[row["user"]], item[row["item"]]
            of_user = [e for (u, _), e in examples.items() if u == name]
            positives, trains = (
                {e["item"] for e in of_user if every or e["split"] == "train"} for every in (True, False)
            )
            out = {"positives": positives, "train": trains | {own}, "item": {own}}[exclude]
            negatives = [item[i] for i in row["negatives_item"]]
            assert len(set(negatives)) == 4
            assert not out & set(negatives)
            assert sampling == "uniform" or all(trained[i] for i in negatives)
            seen["trains"] += len(set(negatives) & trains)
            seen["others"] += len(set(negatives) & (positives - trains))
    assert (seen["trains"] > 0, seen["others"] > 0) == (exclude == "item", exclude != "positives")
    _, again = run(tmp_path / "two", rows, rows, partitions=3, **given)
    assert digests(again) == digests(manifest)


def test_popular_items_are_drawn_as_often_as_training_has_them(tmp_path):
    rows = log(6, 400)
    given = {"labels": "sampled", "eval_negatives": 50, "eval_exclude": "item", "eval_replacement": True}
    options, _ = run(tmp_path, rows, rows, eval_sampling="popularity", eval_power=2.0, **given)
    examples, item = expected_examples(rows, rows, options), keys_of(options.out, "target_item")
    weight = Counter(e["item"] for e in examples.values() if e["split"] == "train")
    found, expected = Counter(), Counter()
    for row in rows_of(options.out, "test"):
        found.update(item[i] for i in row["negatives_item"])
        left = {i: n**2 for i, n in weight.items() if i != item[row["item"]]}
        expected.update({i: 50 * w / sum(left.values()) for i, w in left.items()})
    assert found.keys() == expected.keys()
    assert all(abs(found[i] - e) < 4 * e**0.5 for i, e in expected.items()), (found, expected)


def test_a_constant_scorer_gets_what_a_random_one_does():
    """Of 1 positive and 99 negatives, as released code ranks them."""
    group = np.repeat(np.arange(20), 100)
    found = ranking(group, np.arange(2000) % 100 == 0, np.zeros(2000), [5])
    assert found["hr@5"] == pytest.approx(0.05)
    assert found["mrr@5"] == pytest.approx(0.02283, abs=5e-6)
