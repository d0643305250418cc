"""The histories of a batch in one domain, by their distinct items: each is looked up, and projected, once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class History:
    """item, category: of the distinct items [u]; position [total]: which of them stands where, history after history;
    lengths [n]. All int64."""

    item: Tensor
    category: Tensor
    position: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, items: Tensor, lengths: Tensor, categories: NDArray) -> History:
        """items [total], lengths [n], int64; categories: of every item of the vocabulary."""
        distinct, position = torch.unique(items, return_inverse=True)
        return cls(distinct, torch.from_numpy(categories[distinct.numpy()]).long(), position, lengths)

    def to(self, device: torch.device) -> History:
        return History(*(of.to(device) for of in vars(self).values()))
