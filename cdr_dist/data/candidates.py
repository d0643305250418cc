"""The candidates of a softmax over a domain's items: all of them, or a sample that every row of a global batch shares.

A sample is a function of (seed, domain, epoch, step) alone, so all workers draw the same one, and each row of it comes
once from where it lives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.hashing import key, mix, uniform
from cdr_dist.data.options import SoftmaxOptions


@dataclass(frozen=True)
class Candidates:
    """item: ids [S], int64; log_expected: float32 [S], the logarithm of how often a draw is expected to hold each."""

    item: Tensor
    log_expected: Tensor

    def to(self, device: torch.device) -> Candidates:
        return Candidates(self.item.to(device), self.log_expected.to(device))


class CandidateSampler:
    """Of one domain. counts: how often each item id occurs in training [rows], of the reserved ids 0.

    uniform: every item alike. popularity: by count^power (an item that never occurs counts as once). log_uniform: by
    rank r = 0, 1, … of popularity, log((r + 2) / (r + 1)) / log(items + 1), as Zipf's law has it. With replacement.
    """

    def __init__(self, options: SoftmaxOptions, seed: int, domain: str, counts: NDArray[np.int64]) -> None:
        self._key, self._size = key("softmax", seed, domain), options.negatives
        self._items = len(counts) - FIRST_ID
        self._all = Candidates(torch.arange(FIRST_ID, len(counts)), torch.zeros(self._items))
        if self._size:
            own = np.maximum(counts[FIRST_ID:], 1)
            order = np.argsort(-own, kind="stable")
            if options.sampler == "popularity":
                weight = own[order].astype(np.float64) ** options.power
            elif options.sampler == "log_uniform":
                weight = np.log1p(1.0 / np.arange(1, self._items + 1))
            else:
                weight = np.ones(self._items)
            self._by_rank = order + FIRST_ID
            self._up_to = np.cumsum(weight)
            self._log_expected = np.log(weight * (self._size / self._up_to[-1]))

    def of(self, epoch: int, step: int) -> Candidates:
        """The candidates of one global batch."""
        if not self._size:
            return self._all
        drawn = uniform(mix(self._key, epoch, step, np.arange(self._size))) * self._up_to[-1]
        rank = np.minimum(np.searchsorted(self._up_to, drawn, side="right"), self._items - 1)
        expected = torch.from_numpy(self._log_expected[rank].astype(np.float32))
        return Candidates(torch.from_numpy(self._by_rank[rank]), expected)
