"""The best N items of every user, where items come a block at a time and a category may have a cap.

Exact: under caps the choice is greedy by score, and the greedy choice of a union is that of the parts' greedy choices
(a truncated partition matroid). So what was not chosen so far never has to be looked at again.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Top:
    """The best items of n users, by score and then by the smaller id. Scores are float32.

    per_category: most items of one category (0: any number); category [items]: of every item id.
    """

    def __init__(self, n: int, top: int, per_category: int = 0, category: NDArray[np.int32] | None = None) -> None:
        self.n, self._top, self._most, self._category = n, top, per_category, category
        self.user, self.item = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.score = np.zeros(0, dtype=np.float32)
        self._least = torch.full((n,), -torch.inf)
        """What an item must exceed or equal to be chosen: the last score of a user who has N, else -inf."""

    def offer(self, rows: Tensor, item: NDArray[np.int64], scores: Tensor) -> None:
        """Scores [r, m] of users `rows` [r] with items [m], or with items of their own [r, m]; -inf: not this one.

        An item is offered to a user once.
        """
        scores = scores.cpu()
        least = self._least[rows, None]
        if not self._most and scores.shape[1] > self._top:
            least = torch.maximum(least, scores.topk(self._top, dim=1).values[:, -1:])
        row, column = ((scores >= least) & (scores > -torch.inf)).nonzero(as_tuple=True)
        chosen = item[column.numpy()] if item.ndim == 1 else item[row.numpy(), column.numpy()]
        self._add(rows[row].numpy(), chosen, scores[row, column].numpy())

    def full(self, rows: Tensor) -> bool:
        """Whether each of these users has N items."""
        return bool((self._least[rows] > -torch.inf).all())

    def of_users(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Bounds [n + 1] of each user's items, best first, and the items and scores."""
        return np.searchsorted(self.user, np.arange(self.n + 1)), self.item, self.score

    def _add(self, user: NDArray, item: NDArray, score: NDArray) -> None:
        if not len(user):
            return
        user, item = np.concatenate([self.user, user]), np.concatenate([self.item, item])
        score = np.concatenate([self.score, score])
        order = np.lexsort((item, -score, user))
        if self._most and self._category is not None:
            kind = self._category[item[order]]
            by_kind = order[np.lexsort((np.arange(len(order)), kind, user[order]))]
            kinds = np.stack([user[by_kind], self._category[item[by_kind]]])
            kept = np.zeros(len(user), dtype=bool)
            kept[by_kind] = _place(np.any(kinds[:, 1:] != kinds[:, :-1], axis=0)) < self._most
            order = order[kept[order]]
        order = order[_place(user[order][1:] != user[order][:-1]) < self._top]
        self.user, self.item, self.score = user[order], item[order], score[order]
        ends = np.searchsorted(self.user, np.arange(self.n), side="right")
        full = np.diff(np.searchsorted(self.user, np.arange(self.n + 1))) == self._top
        self._least[torch.from_numpy(full)] = torch.from_numpy(self.score[ends[full] - 1])


def _place(begins: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Place of each row within its group, from 0; begins [rows - 1]: does a row differ from the one before."""
    starts = np.concatenate([[0], np.flatnonzero(begins) + 1])
    lengths = np.diff([*starts, len(begins) + 1])
    return np.arange(len(begins) + 1) - np.repeat(starts, lengths)
