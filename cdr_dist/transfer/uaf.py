"""UAF: a policy decides for every user which blocks are the pre-trained ones and which their fine-tuned copies.

Chen et al., "User-specific adaptive fine-tuning for cross-domain recommendations", TKDE, eq. 6 and 9-15.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cdr_dist.errors import UserError
from cdr_dist.models.causal import blocks_of
from cdr_dist.models.encoder import Encoder, Route, Sequences
from cdr_dist.transfer.decisions import Gates

POLICIES = ("nextitnet", "gru")
POLICY_DILATIONS = (1, 4)
"""Two blocks of dilations {1, 2, 4, 8}: a receptive field of 31."""
STATE = 128
"""Of the GRU."""


class Decision(Protocol):
    """How a policy's say becomes gates. draws: numbers that it needs for every block of every sequence; needs_policy:
    whether there is one at all; needs_truth: draws are no chance but the user's planted kind, 0 contrary, 1 aligned."""

    draws: int
    fixed_draws: bool
    needs_policy: bool
    needs_truth: bool

    def gates(self, say: Tensor, draws: Tensor, training: bool) -> Gates:
        """say: what speaks for freezing and for fine-tuning each block [n, blocks, 2]; draws [n, blocks x draws]."""
        ...


class UserAdaptive:
    """x + I F^(x) + (1 - I) F(x) in place of x + F(x) (eq. 6), F frozen, F^ a copy of it that is trained.

    policy: nextitnet, two blocks of its own and the mean over the sequence, or gru, its last state; then a linear layer
    to two numbers a block. items: whether the source items' rows are trained, too (as released).
    """

    def __init__(self, decision: Decision, policy: str = "nextitnet", items: bool = True) -> None:
        if policy not in POLICIES:
            raise UserError(f"recipe.transfer.policy={policy}: choose {' or '.join(POLICIES)}")
        self._decision, self._policy, self._items = decision, policy, items

    def encoder(self, width: int, dilations: Sequence[int]) -> Encoder:
        policy: nn.Module | None = None
        if self._decision.needs_policy:
            policy = (_ByBlocks if self._policy == "nextitnet" else _ByGru)(width, len(dilations))
        return _Gated(width, dilations, self._decision, policy, self._items)


class _Gated(Encoder):
    def __init__(
        self, width: int, dilations: Sequence[int], decision: Decision, policy: nn.Module | None, items: bool
    ) -> None:
        super().__init__(width, dilations)
        self.copies, self.policy = blocks_of(width, dilations), policy
        self._decision, self.trains_items = decision, items
        self.draws, self.fixed_draws = len(dilations) * decision.draws, decision.fixed_draws
        self.needs_truth = decision.needs_truth

    def route(self, seen: Sequences, draws: Tensor) -> Gates:
        if self.policy is None:
            say = seen.rows.new_zeros(len(seen.rows), len(self.blocks), 2)
        else:
            say = self.policy(seen).view(len(seen.rows), len(self.blocks), 2)
        return self._decision.gates(say, draws.to(say.dtype), self.training)

    def forward(self, seen: Sequences, route: Route | None) -> Tensor:
        assert isinstance(route, Gates)
        x = seen.rows
        for block, copy, gate in zip(self.blocks, self.copies, route.tuned.unbind(1), strict=True):
            x = x + torch.lerp(block(x), copy(x), gate.view(-1, 1, 1))
        return x

    def begin(self) -> None:
        self.copies.load_state_dict(self.blocks.state_dict())

    def trained(self) -> list[str]:
        return [name for name in super().trained() if not name.startswith("blocks.")]


class _ByBlocks(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks, self.head = blocks_of(width, POLICY_DILATIONS), nn.Linear(width, 2 * blocks)

    def forward(self, seen: Sequences) -> Tensor:
        x = seen.rows
        for block in self.blocks:
            x = block(x) + x
        say: Tensor = self.head(seen.mean(x))
        return say

    def initial_values(self) -> dict[str, Tensor]:
        """Nothing speaks for either at first."""
        return {"head.weight": torch.zeros_like(self.head.weight)}


class _ByGru(nn.Module):
    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(width, STATE, batch_first=True), nn.Linear(STATE, 2 * blocks)

    def forward(self, seen: Sequences) -> Tensor:
        states = self.gru(seen.rows)[0]
        say: Tensor = self.head(seen.last(states, seen.lengths.unsqueeze(1)).squeeze(1))
        return say

    def initial_values(self) -> dict[str, Tensor]:
        return {"head.weight": torch.zeros_like(self.head.weight)}
