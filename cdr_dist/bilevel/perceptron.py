"""The behavioural perceptron (BIAO, WWW 2023, eq. 3-8): an importance for every single source behaviour."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from cdr_dist.bilevel.attention import PooledAttention, pooled_attention
from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.embeddings.workers import max_over_workers, sum_over_workers, world_size

HISTORIES = ("source", "target")


class BehaviouralPerceptron(nn.Module):
    """Scores gamma_1 * gamma_2 of a batch of source behaviours; `normalised` makes weights of them."""

    def __init__(self, width: int, options: PerceptronOptions) -> None:
        super().__init__()
        self.options = options
        inner = options.heads * width
        if "global" in options.parts:
            self.global_mlp = _Mlp(2 * width, options.global_hidden)
        if "user" in options.parts:
            self.attention = nn.ModuleDict(
                {d: PooledAttention(2 * width, options.heads, width, options.padding) for d in HISTORIES}
            )
            self.local_mlp = _Mlp(2 * inner, options.local_hidden)
        self.gamma_raw = nn.Parameter(torch.empty(()))

    @property
    def gamma(self) -> Tensor:
        """The learnable scalar of eq. 8, the sum of a batch's weights."""
        return functional.softplus(self.gamma_raw) if self.options.gamma == "softplus" else self.gamma_raw.relu()

    def parts(self, seen: PerceptronInput) -> tuple[Tensor, Tensor]:
        """(gamma_1, gamma_2), each [B]: the global importance (eq. 3) and the user-specific one (eq. 4-7).

        A part that `options.parts` leaves out is 1.
        """
        one = seen.item.new_ones(len(seen.item))
        return self._of_item(seen) if "global" in self.options.parts else one, (
            self._of_user(seen) if "user" in self.options.parts else one
        )

    def _of_item(self, seen: PerceptronInput) -> Tensor:
        found: Tensor = self.global_mlp(seen.item)
        return found

    def _of_user(self, seen: PerceptronInput) -> Tensor:
        attentions = [cast(PooledAttention, self.attention[d]) for d in HISTORIES]
        histories = [(seen.history[d], seen.position[d], seen.lengths[d]) for d in HISTORIES]
        found: Tensor = self.local_mlp(pooled_attention(attentions, histories, seen.item.detach()))
        return found

    def forward(self, seen: PerceptronInput) -> Tensor:
        """Scores [B]."""
        global_part, local_part = self.parts(seen)
        return global_part * local_part

    def weights(self, score: Tensor, valid: Tensor, global_rows: int) -> Tensor:
        """Scores [B] of this worker's behaviours -> their weights in the source loss; 0 where not valid (bool).

        global_rows: rows of the global batch.
        """
        if self.options.normalisation == "softmax":
            return normalised(score, valid, self.gamma)
        if self.options.normalisation == "sigmoid":
            return valid * score.sigmoid() * (2 * self.gamma / global_rows)
        mass = functional.softplus(score) * valid
        return mass * (self.gamma / sum_over_workers(mass.sum()).clamp(min=torch.finfo(mass.dtype).tiny))

    def initial_values(self) -> dict[str, Tensor]:
        """gamma_1 = 0 and gamma_2 near 1: all weights start equal, as in joint training, and gamma_1 can move.

        With random signs of gamma_2 the product would pull gamma_1 up for one user and down for the next. One
        part alone starts at 0. `start=random`: gamma alone, the layers stay as they are drawn.
        """
        start = torch.tensor(1.0 if self.options.gamma_initial is None else self.options.gamma_initial)
        named = dict(self.named_parameters())
        found = {"gamma_raw": start.expm1().log() if self.options.gamma == "softplus" else start}
        if self.options.start == "random":
            return found
        if "global" in self.options.parts:
            first = f"global_mlp.{len(self.global_mlp) - 1}"
            found[f"{first}.weight"] = torch.zeros_like(named[f"{first}.weight"])
        if "user" in self.options.parts:
            last = f"local_mlp.{len(self.local_mlp) - 1}"
            found[f"{last}.weight"] = torch.zeros_like(named[f"{last}.weight"])
            found[f"{last}.bias"] = torch.full_like(named[f"{last}.bias"], float("global" in self.options.parts))
        return found


@dataclass(frozen=True)
class PerceptronInput:
    """What the perceptron reads, detached from the tables unless `item_gradient` is set.

    item [B, 2d]; for each domain: history [U, 2d] unique items, position [total] -> row of history, lengths [H]:
    B / H items after one another share a history.
    """

    item: Tensor
    history: Mapping[str, Tensor]
    position: Mapping[str, Tensor]
    lengths: Mapping[str, Tensor]

    def parts(self, count: int) -> Iterator[PerceptronInput]:
        """`count` parts (or as many as there are histories) of consecutive items, each with only the rows it needs."""
        histories = len(self.lengths[HISTORIES[0]])
        size = -(-histories // max(1, min(count, histories)))
        if size >= histories:
            yield self
            return
        copies = len(self.item) // histories
        for start in range(0, histories, size):
            stop = min(start + size, histories)
            yield PerceptronInput(self.item[start * copies : stop * copies], *self._histories(start, stop))

    def _histories(self, start: int, stop: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        history, position, lengths = {}, {}, {}
        for d in HISTORIES:
            lengths[d] = self.lengths[d][start:stop]
            first = int(self.lengths[d][:start].sum())
            some = self.position[d][first : first + int(lengths[d].sum())]
            used, position[d] = torch.unique(some, return_inverse=True)
            history[d] = self.history[d].index_select(0, used)
        return history, position, lengths


def normalised(score: Tensor, valid: Tensor, gamma: Tensor) -> Tensor:
    """Eq. 8's sigma: gamma times the softmax over the valid rows of the *global* batch; 0 elsewhere.

    score, valid (bool): [B] of this worker. The maximum only shifts the softmax and is constant; the sum over
    workers is differentiated, because it couples all behaviours of the batch.
    """
    masked = torch.where(valid, score, -torch.inf)
    if world_size() == 1 and not torch.is_grad_enabled():  # a lower step's: in four operators in place of ten
        return torch.where(valid, masked.softmax(0), 0.0) * gamma
    highest = masked.detach().max() if len(score) else score.new_tensor(-torch.inf)
    highest = max_over_workers(highest).clamp(min=torch.finfo(score.dtype).min)
    mass = (masked - highest).exp()
    total = sum_over_workers(mass.sum())  # at least 1, the highest row's, or 0: no row is valid
    return mass * (gamma / total.clamp(min=1.0))


class _Mlp(nn.ModuleList):
    """Linear layers with ReLU between them, to one value a row: [B, width] -> [B]."""

    def __init__(self, width: int, hidden: Sequence[int]) -> None:
        super().__init__(nn.Linear(a, b) for a, b in itertools.pairwise([width, *hidden, 1]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self)[:-1]:
            x = layer(x).relu_()
        return self[-1](x).squeeze(1)
