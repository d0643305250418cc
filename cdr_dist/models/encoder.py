"""Sequences through a stack of blocks: the encoder as it is pre-trained, and what a way of transfer may make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cdr_dist.data.dataset import UNKNOWN
from cdr_dist.data.histories import History
from cdr_dist.models.causal import blocks_of


@dataclass(frozen=True)
class Sequences:
    """rows [n, length, width], zero behind a sequence's end; real [n, length]; lengths [n]; length is 1 at least."""

    rows: Tensor
    real: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, items: Tensor, history: History) -> Sequences:
        """items: rows of the distinct items [u, width]."""
        place, real = history.padded()
        if not place.shape[1]:
            place, real = place.new_zeros(len(history), 1), real.new_zeros(len(history), 1)
        if not len(items):
            return cls(items.new_zeros(*place.shape, items.shape[1]), real, history.lengths)
        rows = items.index_select(0, place.flatten()).view(*place.shape, -1)
        return cls(rows * real.unsqueeze(2), real, history.lengths)

    def last(self, hidden: Tensor, ends: Tensor) -> Tensor:
        """Of hidden vectors [n, length, width] those before positions `ends` [n, k] -> [n, k, width]; before 0: 0."""
        place = (ends - 1).clamp(min=0) + torch.arange(len(hidden), device=ends.device).unsqueeze(1) * hidden.shape[1]
        found = hidden.flatten(0, 1).index_select(0, place.flatten()).view(*ends.shape, -1)
        return found * (ends > 0).unsqueeze(2)

    def mean(self, hidden: Tensor) -> Tensor:
        """[n, length, width] -> [n, width]; of an empty sequence zeros."""
        return (hidden * self.real.unsqueeze(2)).sum(1) / self.lengths.clamp(min=1).unsqueeze(1)


@dataclass(frozen=True)
class NextItems:
    """place [p]: positions of the flattened sequences whose next item is known; distinct [p]: which of the history's
    distinct items that is; row [p]: whose sequence."""

    place: Tensor
    distinct: Tensor
    row: Tensor

    @classmethod
    def of(cls, history: History, length: int) -> NextItems:
        first = history.lengths.cumsum(0) - history.lengths
        row = torch.arange(len(history), device=first.device).repeat_interleave(history.lengths)
        within = torch.arange(len(history.position), device=first.device) - first[row]
        kept = (within > 0) & (history.item[history.position] > UNKNOWN)
        return cls((row * length + within - 1)[kept], history.position[kept], row[kept])


class Route(Protocol):
    """How each sequence of a batch goes through the encoder."""

    @property
    def tuned(self) -> Tensor:
        """How much of each block is its fine-tuned copy, [n, blocks]."""
        ...

    @property
    def learns(self) -> bool:
        """Whether `policy_loss` has something to say."""
        ...

    def baseline(self) -> Route:
        """The route that the chosen one is compared with."""
        ...

    def policy_loss(self, right: Tensor, baseline_right: Tensor) -> Tensor:
        """Per-sequence loss [n] of the choice, given where it and its baseline recommend rightly [n]."""
        ...


class Encoder(nn.Module):
    """A stack of residual blocks; all of it is trained, before and after.

    trains_items: whether fine-tuning trains the rows of the source items. draws: numbers that a route needs for every
    sequence; fixed_draws: the same ones for a user at every use; needs_truth: the user's planted kind in their place.
    """

    trains_items = True
    draws = 0
    fixed_draws = False
    needs_truth = False

    def __init__(self, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.blocks = blocks_of(width, dilations)

    def pretraining(self, x: Tensor) -> Tensor:
        """[n, length, width] -> the same (UAF, eq. 1)."""
        for block in self.blocks:
            x = block(x) + x
        return x

    def route(self, seen: Sequences, draws: Tensor) -> Route | None:
        return None

    def forward(self, seen: Sequences, route: Route | None) -> Tensor:
        return self.pretraining(seen.rows)

    def begin(self) -> None:
        """The pre-trained parameters are in place."""

    def pretrained(self) -> list[str]:
        """Names of the parameters that pre-training trains, and that a checkpoint of it has."""
        return [f"blocks.{name}" for name, _ in self.blocks.named_parameters()]

    def trained(self) -> list[str]:
        """Names of the parameters that fine-tuning trains."""
        return [name for name, _ in self.named_parameters()]
