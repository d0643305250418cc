"""Exact metrics of scored rows, over all workers.

Every metric is a function of the set of rows alone: not of their order, nor of the worker that scored them.
So the same rows give the same bits on any number of workers. Scores are finite logits; only their order matters
to `auc`, `gauc` and the ranking metrics, and ties are never broken by position: a constant scorer gets the value
of a random one. Metrics that are undefined (AUC of one class, a mean over nothing) are NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

RANKING = ("hr", "ndcg", "mrr")
FULL = "full_"
"""What begins their names where a positive is ranked among all items."""


class Predictions:
    """The rows this worker has scored, batch by batch; nothing is copied off the device before `gather`."""

    def __init__(self) -> None:
        self._batches: list[Tensor] = []

    def append(self, user: Tensor, label: Tensor, score: Tensor, weight: Tensor, group: Tensor) -> None:
        """Adds a batch; every argument is [B].

        score: logits. weight: 0 marks a filler row, which counts nowhere. group: the ranking list of the row,
        such as the example id of the positive that its negatives were stored with.
        """
        columns = (user, group, weight != 0, _bits(label), _bits(score))
        assert all(column.shape == (len(user),) for column in columns), [c.shape for c in columns]
        self._batches.append(torch.stack([column.detach().long() for column in columns], dim=1))

    def gather(self, process_group: dist.ProcessGroup | None = None) -> ScoredRows:
        """The rows of all workers, on each worker, ordered by (group, positives first, as appended).

        Collective where torch.distributed is initialised, and workers may hold any number of rows. Two
        evaluations of the same split are aligned row by row as long as no list is split over workers.
        """
        rows = torch.cat(self._batches) if self._batches else torch.empty(0, 5, dtype=torch.int64)
        rows = rows[rows[:, 2] != 0]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(process_group) > 1:
            rows = all_gather_rows(rows, process_group)
        user, group, _, label, score = rows.cpu().numpy().T
        label, score = (
            np.ascontiguousarray(label).view(np.float64),
            np.ascontiguousarray(score).view(np.float64),
        )
        order = np.lexsort((-label, group))
        return ScoredRows(user[order], label[order], score[order], group[order])


@dataclass(frozen=True)
class ScoredRows:
    """Scored rows of all workers; every column is [rows]."""

    user: Ints
    label: Floats  # 0 or 1
    score: Floats  # logits
    group: Ints

    def __len__(self) -> int:
        return len(self.user)

    def compute(self, ks: Sequence[int] = ()) -> dict[str, float]:
        """`rows`, `auc`, `gauc`, `gauc_users`, `logloss`, and for each k `hr@k`, `ndcg@k` and `mrr@k`.

        ValueError: a score is not finite; a label is neither 0 nor 1; with `ks`, a k below 1 or a group
        without exactly one positive.
        """
        if bad := int(np.count_nonzero(~np.isfinite(self.score))):
            raise ValueError(f"{bad} of {len(self)} scores are not finite: the model has diverged")
        if bad := int(np.count_nonzero((self.label != 0) & (self.label != 1))):
            raise ValueError(f"{bad} of {len(self)} labels are neither 0 nor 1")
        by_user, users = gauc(self.user, self.label, self.score)
        return {
            "rows": len(self),
            "auc": auc(self.label, self.score),
            "gauc": by_user,
            "gauc_users": users,
            "logloss": logloss(self.label, self.score),
            **ranking(self.group, self.label, self.score, ks),
        }


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """The probability that a positive scores above a negative, ties counted half; NaN with one class.

    From ranks (Mann-Whitney), exact to the last rounding. Functions that apply a sigmoid in float32 first, as
    torchmetrics' `binary_auroc` does, tie all logits above about 17.
    """
    score, positive = np.asarray(scores, dtype=np.float64), np.asarray(labels) > 0
    own, every = np.sort(score[positive]), np.sort(score)
    positives = len(own)
    pairs = positives * (len(every) - positives)
    if not pairs:
        return float("nan")
    # Equal scores share the mean of their ranks; twice that is a whole number.
    twice_ranks = np.searchsorted(every, own) + np.searchsorted(every, own, side="right") + 1
    return (int(twice_ranks.sum()) / 2 - positives * (positives + 1) / 2) / pairs


def gauc(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> tuple[float, int]:
    """The mean of the users' AUCs, each weighted by the user's rows; and how many users it is taken over.

    Users with rows of one class only are left out. No user left: (NaN, 0).
    """
    rows, values = user_auc(users, labels, scores)
    counted = ~np.isnan(values)
    if not counted.any():
        return float("nan"), 0
    return float(np.average(values[counted], weights=rows[counted])), int(counted.sum())


def user_auc(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> tuple[Ints, Floats]:
    """Rows and AUC (NaN with one class) of each user, by ascending user id."""
    user, score = np.asarray(users), np.asarray(scores, dtype=np.float64)
    if not len(user):
        return np.empty(0, np.int64), np.empty(0)
    order = np.lexsort((score, user))
    user, score = user[order], score[order]
    positive = (np.asarray(labels)[order] > 0).astype(np.int64)
    first, rows = _runs(user[1:] != user[:-1])
    tie, tied = _runs((user[1:] != user[:-1]) | (score[1:] != score[:-1]))
    # Ranks run on from user to user; taken twice, the mean rank of tied rows is an integer.
    twice_rank = np.repeat(2 * tie + tied + 1, tied)
    positives = np.add.reduceat(positive, first)
    twice_rank_sum = np.add.reduceat(positive * twice_rank, first) - 2 * first * positives
    pairs = positives * (rows - positives)
    values = np.full(len(first), np.nan)
    np.divide(twice_rank_sum - positives * (positives + 1), 2 * pairs, out=values, where=pairs > 0)
    return rows, values


def logloss(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean binary cross-entropy of logits, in float64; NaN without rows."""
    label = np.asarray(labels, dtype=np.float64)
    if not len(label):
        return float("nan")
    # The loss grows with the wrong-way logit, so sorting that fixes the order of the sum.
    wrong = np.sort((1 - 2 * label) * np.asarray(scores, dtype=np.float64))
    return float(np.logaddexp(0, wrong).mean())


def ranking(groups: ArrayLike, labels: ArrayLike, scores: ArrayLike, ks: Sequence[int]) -> dict[str, float]:
    """For each k, `hr@k`, `ndcg@k` and `mrr@k`: means over groups of one positive and its negatives.

    Each is the expected value over random orders of the items that tie with the positive. NaN without groups.
    ValueError: a k below 1, or a group without exactly one positive.
    """
    if not ks:
        return {}
    if min(ks) < 1:
        raise ValueError(f"ranking metrics need k of 1 or more, not {min(ks)}")
    group, score = np.asarray(groups), np.asarray(scores, dtype=np.float64)
    if not len(group):
        return gains_at_ranks(np.zeros(0, np.int64), np.zeros(0, np.int64), ks)
    positive = np.asarray(labels) > 0
    ordered = (group[1:] > group[:-1]) | ((group[1:] == group[:-1]) & ~positive[1:])
    if not ordered.all():  # as `Predictions.gather` has them
        order = np.lexsort((~positive, group))
        group, score, positive = group[order], score[order], positive[order]
    first, size = _runs(group[1:] != group[:-1])
    wrong = int(np.count_nonzero(np.add.reduceat(positive.astype(np.int64), first) != 1))
    if wrong:
        raise ValueError(
            f"{wrong} of {len(first)} ranking lists do not hold exactly one positive; "
            "hit rate, NDCG and MRR need lists of one positive and its negatives"
        )
    own = np.repeat(score[first], size)
    above = np.add.reduceat((score > own).astype(np.int64), first)
    tied = np.add.reduceat((score == own).astype(np.int64), first)  # the positive is one of them
    return gains_at_ranks(above, tied, ks)


def gains_at_ranks(above: Ints, tied: Ints, ks: Sequence[int]) -> dict[str, float]:
    """hr@k, ndcg@k and mrr@k of positives [n] with so many items above them, and tied with them, themselves included.

    Each is the expected value over random orders of the items that tie. NaN without positives.
    """
    if not len(above):
        return {f"{name}@{k}": float("nan") for k in ks for name in RANKING}
    rank = np.arange(1, max(ks) + 1)
    gains = {"hr": np.ones(len(rank)), "ndcg": 1 / np.log2(rank + 1), "mrr": 1 / rank}
    result = {}
    for k in ks:
        for name in RANKING:
            gained = np.concatenate([[0.0], np.cumsum(gains[name])])  # by the first r ranks
            value = (gained[np.minimum(above + tied, k)] - gained[np.minimum(above, k)]) / tied
            result[f"{name}@{k}"] = float(value.mean())
    return result


def _runs(change: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """First row and length of each run, given where a row ([rows - 1]) differs from the one before it."""
    first = np.concatenate([[0], np.flatnonzero(change) + 1])
    return first, np.diff(first, append=len(change) + 1)


def _bits(values: Tensor) -> Tensor:
    return values.detach().double().view(torch.int64)


def all_gather_rows(rows: Tensor, process_group: dist.ProcessGroup | None = None) -> Tensor:
    """All workers' rows [sum of n, columns] (int64), in rank order, from each worker's [n, columns]."""
    device = torch.device("cpu" if "cpu" in dist.get_backend_config(process_group) else "cuda")
    world = dist.get_world_size(process_group)
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(rows)], device=device), group=process_group)
    longest = int(max(sizes))
    padded = torch.zeros(longest, rows.shape[1], dtype=torch.int64, device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded, group=process_group)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])
