"""Sequences for tests of what reads them: as a backbone gets them, without a dataset."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cdr_dist.data.candidates import Candidates
from cdr_dist.data.histories import History


def history(*items: list[int]) -> History:
    """Of given item ids, sequence by sequence."""
    flat = [i for of in items for i in of]
    distinct = sorted(set(flat))
    position = torch.tensor([distinct.index(i) for i in flat], dtype=torch.int64)
    item = torch.tensor(distinct, dtype=torch.int64)
    return History(item, item, position, torch.tensor([len(of) for of in items]))


@dataclass
class Rows:
    """Rows of sequences, `copies` of each: a positive and its negatives."""

    histories: dict[str, History]
    copies: int
    draws: torch.Tensor
    source_before: torch.Tensor | None = None
    source_item: torch.Tensor | None = None
    candidates: dict[str, Candidates] | None = None

    @property
    def label(self) -> torch.Tensor:
        n = len(self.histories["source"])
        return torch.tensor(([1.0] + [0.0] * (self.copies - 1)) * n, dtype=torch.double)

    source_label = label
