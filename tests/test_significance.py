"""Relative improvement, bootstrap over users, paired t-test."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr_dist.evaluation.metrics import auc, gauc
from cdr_dist.evaluation.significance import (
    paired_bootstrap,
    paired_t,
    relative_improvement,
    resampled_auc,
    resampled_gauc,
)

# BIAO (WWW 2023), Table 1: Books-Movies, Books-CDs, Books-Elec, Books-Toys, CDs-Cloth, CDs-Kitchen, Elec-Cloth.
# For each backbone the AUCs of -S, then AUCs and RelaImpr (percent) of -0, the base model and BIAO.
TABLE_1 = {
    "MiNet": (
        [0.7557, 0.7019, 0.6585, 0.6706, 0.5913, 0.6161, 0.6001],
        [0.7508, 0.6995, 0.6523, 0.6658, 0.5950, 0.6094, 0.5885],
        [-1.92, -1.19, -3.91, -2.81, 4.05, -5.77, -11.59],
        [0.7616, 0.7080, 0.6540, 0.6711, 0.5876, 0.6079, 0.5966],
        [2.31, 3.02, -2.84, 0.29, -4.05, -7.06, -3.50],
        [0.7639, 0.7145, 0.6678, 0.6883, 0.6020, 0.6212, 0.6099],
        [3.21, 6.24, 5.87, 10.38, 11.72, 4.39, 9.79],
    ),
    "CoNet": (
        [0.7633, 0.7165, 0.6758, 0.6918, 0.5999, 0.6465, 0.6152],
        [0.7643, 0.7196, 0.6808, 0.6927, 0.6134, 0.6471, 0.6206],
        [0.38, 1.43, 2.84, 0.47, 13.51, 0.41, 4.69],
        [0.7693, 0.7239, 0.6764, 0.6989, 0.6110, 0.6471, 0.6238],
        [2.28, 3.42, 0.34, 3.70, 11.11, 0.41, 7.47],
        [0.7721, 0.7274, 0.6864, 0.7048, 0.6176, 0.6558, 0.6308],
        [3.34, 5.03, 6.03, 6.78, 17.72, 6.35, 13.54],
    ),
}


def test_relative_improvement_reproduces_table_1_of_biao():
    cells = [
        (value, single, printed)
        for singles, *methods in TABLE_1.values()
        for values, improvements in zip(methods[::2], methods[1::2], strict=True)
        for value, single, printed in zip(values, singles, improvements, strict=True)
    ]
    assert len(cells) == 42
    for value, single, printed in cells:
        assert relative_improvement(value, single) == pytest.approx(printed, abs=0.005 + 1e-9)
        assert relative_improvement(single, single) == 0


@pytest.mark.parametrize("single", [0.5, 0.49, math.nan])
def test_relative_improvement_on_a_baseline_of_chance_is_nan(single):
    assert math.isnan(relative_improvement(0.6, single))


ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.sampled_from([-1.0, 0.0, 0.5, 2.0])),
    min_size=1,
    max_size=20,
)


@given(ROWS, st.lists(st.integers(0, 3), min_size=4, max_size=4))
def test_a_resample_is_the_metric_of_the_rows_written_out_as_often_as_drawn(rows, times):
    users, labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    users = np.unique(users, return_inverse=True)[1]
    drawn = np.array(times)[: users.max() + 1]
    copies = [(u, copy, y, s) for u, y, s in zip(users, labels, scores, strict=True) for copy in range(drawn[u])]
    as_user = [4 * u + copy for u, copy, _, _ in copies]  # a user drawn twice is two users
    y, s = [c[2] for c in copies], [c[3] for c in copies]
    got = resampled_auc(users, labels, scores)(drawn[None])
    assert got == pytest.approx(auc(y, s), abs=1e-12, nan_ok=True)
    got = resampled_gauc(users, labels, scores)(drawn[None])
    assert got == pytest.approx(gauc(as_user, y, s)[0], abs=1e-12, nan_ok=True)


def two_scorers(seed, users=150, rows_each=2, gain=0.0):
    """Rows of users, and two equally noisy views of the truth, the first with `gain` more of it."""
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rows_each)
    label = random.integers(0, 2, len(user))
    shared = random.normal(size=len(user))
    a, b = (shared + random.normal(size=len(user)) + strength * label for strength in (1 + gain, 1))
    return user, label, a, b


def test_bootstrap_rejects_a_true_null_about_as_often_as_it_says():
    results = [paired_bootstrap(*two_scorers(seed), resamples=199, seed=seed) for seed in range(300)]
    assert 0.02 <= np.mean([result.p < 0.05 for result in results]) <= 0.09
    assert 0.91 <= np.mean([result.low <= 0 <= result.high for result in results]) <= 0.98


def test_bootstrap_draws_a_users_rows_together():
    """Each row 16 times over, under the same user, adds no evidence; under users of their own it would."""
    user, label, a, b = two_scorers(3, gain=0.1)
    once = paired_bootstrap(user, label, a, b)
    many = [np.repeat(column, 16) for column in (user, label, a, b)]
    together = paired_bootstrap(*many)
    apart = paired_bootstrap(np.arange(len(many[0])), *many[1:])
    assert vars(together) == pytest.approx(vars(once), rel=1e-9)
    assert apart.high - apart.low < 0.5 * (once.high - once.low)


def test_bootstrap_finds_a_real_difference_and_its_sign():
    user, label, a, b = two_scorers(1, users=800, gain=0.5)
    better, worse = paired_bootstrap(user, label, a, b), paired_bootstrap(user, label, b, a)
    assert better.difference == pytest.approx(auc(label, a) - auc(label, b))
    assert 0 < better.low < better.difference < better.high
    assert better.p == pytest.approx(2 / 1001)
    assert (worse.difference, worse.low, worse.high) == pytest.approx((-better.difference, -better.high, -better.low))
    assert worse.p == better.p


def test_bootstrap_does_not_depend_on_row_order_or_on_user_names():
    user, label, a, b = two_scorers(5, gain=0.2)
    order = np.random.default_rng(0).permutation(len(user))
    before = paired_bootstrap(user, label, a, b, resampled_gauc, seed=4)
    after = paired_bootstrap(10 * user[order] + 3, label[order], a[order], b[order], resampled_gauc, seed=4)
    assert vars(after) == pytest.approx(vars(before), rel=1e-9)


def test_bootstrap_in_chunks_equals_bootstrap_at_once(monkeypatch):
    rows = two_scorers(6)
    at_once = paired_bootstrap(*rows, resamples=100)
    monkeypatch.setattr("cdr_dist.evaluation.significance.CHUNK_CELLS", 3 * len(rows[0]))
    assert paired_bootstrap(*rows, resamples=100) == at_once


def two_methods(number, seeds=5, users=150, between_seeds=1.0):
    """Rows of users, and [seeds, rows] of two equally good methods whose trainings differ from seed to seed."""
    random = np.random.default_rng(number)
    user = np.arange(2 * users) // 2
    label = random.integers(0, 2, len(user))
    strength = 1 + between_seeds * random.uniform(-1, 1, size=(2, seeds, 1))
    shared = random.normal(size=len(user))
    a, b = strength * label + 0.5 * random.normal(size=(2, seeds, len(user))) + shared
    return user, label, a, b


def test_bootstrap_over_users_and_seeds_seldom_takes_seeds_for_a_gain():
    """With the seeds taken as given, most of these intervals would leave 0 out."""
    results = [paired_bootstrap(*two_methods(number), resamples=199, seed=number) for number in range(150)]
    assert np.mean([result.low <= 0 <= result.high for result in results]) >= 0.85
    widths = [result.high - result.low for result in results]
    calm = [paired_bootstrap(*two_methods(n, between_seeds=0.0), resamples=199, seed=n) for n in range(20)]
    assert np.mean([result.high - result.low for result in calm]) < 0.5 * np.mean(widths)


def test_bootstrap_of_several_seeds_in_chunks_and_unequal_seeds(monkeypatch):
    user, label, a, b = two_methods(7)
    at_once = paired_bootstrap(user, label, a, b, resamples=100)
    assert at_once.difference == pytest.approx(
        np.mean([auc(label, x) - auc(label, y) for x, y in zip(a, b, strict=True)])
    )
    monkeypatch.setattr("cdr_dist.evaluation.significance.CHUNK_CELLS", 3 * len(user))
    assert paired_bootstrap(user, label, a, b, resamples=100) == at_once
    with pytest.raises(ValueError, match="same seeds, not 5 and 4"):
        paired_bootstrap(user, label, a, b[:4])


def test_bootstrap_of_equal_scorers_is_no_difference():
    user, label, a, _ = two_scorers(2)
    result = paired_bootstrap(user, label, a, a, resamples=50)
    assert (result.difference, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_bootstrap_of_one_class_is_nan_and_bad_input_is_refused():
    one_class = paired_bootstrap([1, 2], [1, 1], [0.1, 0.2], [0.3, 0.4])
    assert all(math.isnan(x) for x in (one_class.difference, one_class.low, one_class.high, one_class.p))
    assert one_class.n == 0
    with pytest.raises(ValueError, match="same rows"):
        paired_bootstrap([1, 2], [1, 0], [0.1, 0.2], [0.3])
    with pytest.raises(ValueError, match="1 scores are not finite"):
        paired_bootstrap([1, 2], [1, 0], [0.1, 0.2], [0.3, math.nan])


def test_resamples_without_both_classes_are_left_out():
    result = paired_bootstrap([1, 2], [1, 0], [1.0, 0.0], [0.0, 1.0], resamples=400)
    assert 150 < result.n < 250  # half of the draws of two users take one of them twice
    assert (result.difference, result.low, result.high) == (1, 1, 1)


def test_paired_t_equals_the_textbook():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 3.4641, p = .0742, t(.975, 2) = 4.3027."""
    result = paired_t([2, 4, 6], [1, 2, 3])
    half = 4.30265273 / math.sqrt(3)
    assert result.p == pytest.approx(0.07417990)
    assert (result.difference, result.low, result.high) == pytest.approx((2, 2 - half, 2 + half))
    assert result.n == 3


@pytest.mark.parametrize(
    ("a", "b"),
    [([0.7], [0.6]), ([], []), ([0.7, 0.7], [0.7, 0.7]), ([0.62, 0.65, 0.69], [0.61, 0.64, 0.68])],
)
def test_paired_t_says_nothing_of_one_seed_or_of_constant_differences(a, b):
    result = paired_t(a, b)
    assert all(math.isnan(x) for x in (result.p, result.low, result.high))
    assert result.n == len(a)


def test_paired_t_refuses_unequal_seeds():
    with pytest.raises(ValueError, match="per seed"):
        paired_t([0.7, 0.8], [0.7])
