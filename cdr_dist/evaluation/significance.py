"""Is one method better than another: relative improvement, paired bootstrap, paired t-test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cdr_dist.evaluation.metrics import Floats, Ints, user_auc

CHUNK_CELLS = 2_000_000
"""Resamples x rows held at once: bounds the bootstrap's memory (a few times 16 MB)."""

Resampled = Callable[[Ints], Floats]
"""From how often each user was drawn [R, users] to the metric of each resample [R]; NaN where undefined."""

Metric = Callable[[Ints, NDArray, Floats], Resampled]
"""Prepares the rows' user indices (0..users-1), labels and scores, each [rows], for resampling."""


@dataclass(frozen=True)
class PairedDifference:
    """How much a exceeds b, with an interval (95% unless said) and a two-sided p; all but `difference` may be NaN."""

    difference: float
    low: float
    high: float
    p: float
    n: int  # pairs (seeds) of a t-test; resamples of a bootstrap in which both metrics are defined


def relative_improvement(auc: float, auc_single: float) -> float:
    """RelaImpr in percent: by how much the AUC beats chance, against the single-domain method (BIAO, Table 1).

    NaN where the single-domain method is no better than chance: the ratio has no meaning there.
    """
    if not auc_single > 0.5:
        return float("nan")
    return ((auc - 0.5) / (auc_single - 0.5) - 1) * 100


def resampled_auc(users: Ints, labels: NDArray, scores: Floats) -> Resampled:
    """The AUC over all rows, ties counted half, each row weighted by how often its user was drawn."""
    positive = labels > 0
    order = np.argsort(scores[~positive])
    negative_users, positive_users = users[~positive][order], users[positive]
    ladder = scores[~positive][order]
    below = np.searchsorted(ladder, scores[positive], side="left")
    not_above = np.searchsorted(ladder, scores[positive], side="right")

    def value(drawn: Ints) -> Floats:
        negatives = np.zeros((len(drawn), len(ladder) + 1), np.int64)  # [R, n]: among the n lowest
        np.cumsum(drawn[:, negative_users], axis=1, out=negatives[:, 1:])
        positives = drawn[:, positive_users]
        twice_wins = np.einsum("rp,rp->r", positives, negatives[:, below] + negatives[:, not_above])
        return _ratio(twice_wins, 2 * positives.sum(axis=1) * negatives[:, -1])

    return value


def resampled_gauc(users: Ints, labels: NDArray, scores: Floats) -> Resampled:
    """The mean of the users' AUCs, weighted by rows; users of one class are left out."""
    rows, values = user_auc(users, labels, scores)
    counted = ~np.isnan(values)
    rows, values = rows[counted].astype(np.float64), values[counted]
    return lambda drawn: _ratio(drawn[:, counted] @ (rows * values), drawn[:, counted] @ rows)


def paired_bootstrap(
    users: ArrayLike,
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    metric: Metric = resampled_auc,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Whether scorer a beats scorer b on the same rows, users drawn with replacement; arguments are [rows].

    Scores are [rows] or, of several training seeds, [seeds, rows]: then the metric is the mean over seeds, and seeds
    are drawn with replacement, too (the pigeonhole bootstrap, Owen, Annals of Applied Statistics 2007): the interval
    is about other users *and* other seeds, since trainings differ by as much as methods do. A user's rows are drawn
    together, as they are not independent, and all seeds see the same draw of users. The interval holds the
    share `level` in the middle of the differences; p is twice the smaller share of resamples on either side of 0, the
    observed data counted as one resample, so it is never below 2 / (resamples + 1). Resamples without both classes are
    left out. ValueError: columns of unequal length, or a score that is not finite.
    """
    label, a, b = np.asarray(labels), np.asarray(scores_a, np.float64), np.asarray(scores_b, np.float64)
    user = np.unique(np.asarray(users), return_inverse=True)[1]
    a, b = np.atleast_2d(a), np.atleast_2d(b)
    if not len(user) == len(label) == a.shape[1] == b.shape[1]:
        lengths = f"{len(user)}, {len(label)}, {a.shape[1]} and {b.shape[1]}"
        raise ValueError(f"users, labels and both scores must be of the same rows, but have {lengths}")
    if len(a) != len(b):
        raise ValueError(f"both scorers need the same seeds, not {len(a)} and {len(b)}")
    if bad := int(np.count_nonzero(~np.isfinite(a)) + np.count_nonzero(~np.isfinite(b))):
        raise ValueError(f"{bad} scores are not finite")
    nan = float("nan")
    if not len(user):
        return PairedDifference(nan, nan, nan, nan, 0)
    by_seed = [(metric(user, label, one), metric(user, label, other)) for one, other in zip(a, b, strict=True)]
    count, seeds = int(user.max()) + 1, len(by_seed)

    def difference(drawn: Ints, drawn_seeds: Ints) -> Floats:
        """Users drawn [R, users] and seeds drawn [R, seeds] -> [R]."""
        each = np.stack([of_a(drawn) - of_b(drawn) for of_a, of_b in by_seed], axis=1)
        return (each * drawn_seeds).sum(axis=1) / seeds

    observed = float(difference(np.ones((1, count), np.int64), np.ones((1, seeds), np.int64))[0])
    random, chance = np.random.default_rng(seed), np.full(count, 1 / count)
    drawn_seeds = np.random.default_rng([seed, 1]).multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    chunk = max(1, CHUNK_CELLS // len(user))
    parts = []
    for start in range(0, resamples, chunk):
        drawn = random.multinomial(count, chance, size=min(chunk, resamples - start))
        parts.append(difference(drawn, drawn_seeds[start : start + len(drawn)]))
    differences = np.concatenate([*parts, np.empty(0)])
    differences = differences[~np.isnan(differences)]
    if not len(differences) or np.isnan(observed):
        return PairedDifference(observed, nan, nan, nan, len(differences))
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    smaller = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    p = min(1.0, 2 * (smaller + 1) / (len(differences) + 1))
    return PairedDifference(observed, float(low), float(high), float(p), len(differences))


def paired_t(a: ArrayLike, b: ArrayLike) -> PairedDifference:
    """The paired t-test of a metric over the same seeds; a and b are [seeds], in the same order.

    Interval and p are NaN where the test says nothing: one seed, or differences that do not vary.
    ValueError: unequal lengths.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"a paired test needs one value of each method per seed, not {x.shape} and {y.shape}")
    nan, n = float("nan"), len(x)
    difference = float((x - y).mean()) if n else nan
    rounding = 8 * np.finfo(np.float64).eps * max(np.abs(x).max(initial=0), np.abs(y).max(initial=0))
    if n < 2 or np.ptp(x - y) <= rounding:
        return PairedDifference(difference, nan, nan, nan, n)
    from scipy.stats import ttest_rel  # takes two seconds to load, and few runs get here

    test = ttest_rel(x, y)
    interval = test.confidence_interval(0.95)
    return PairedDifference(difference, float(interval.low), float(interval.high), float(test.pvalue), n)


def _ratio(numerator: NDArray, denominator: NDArray) -> Floats:
    out = np.full(len(numerator), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)
