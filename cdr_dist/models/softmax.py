"""Cross-entropy of an item among candidates that all rows share: all items, or a sample with its logQ correction.

The loss of a query q with item i is log(e^(q.i) + sum_j e^(q.c_j) / E_j) - q.i, over the candidates j that are not i,
where E_j is how often a draw is expected to hold c_j. So the sum is an unbiased estimate of the softmax's normaliser,
and with every item once and E = 1 it is the softmax itself (Bengio & Senecal 2008; "logQ": Yi et al., RecSys 2019).
The item itself always counts once and is not corrected; candidates that happen to be it are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cdr_dist.data.candidates import Candidates

LOGITS = 1 << 21
"""Logits that are held at a time: 8 MiB stay in the cache."""


def softmax_losses(query: Tensor, item: Tensor, item_id: Tensor, rows: Tensor, candidates: Candidates) -> Tensor:
    """Losses [P] of queries and their items' rows [P, width], ids [P], and the candidates' rows [S, width].

    Differentiable any number of times, and holds all P x S logits: `weighted_softmax_loss` does not.
    """
    own = (query * item).sum(1)
    logits = query @ rows.T - candidates.log_expected.to(query.dtype)
    place = _hits(item_id, candidates.item)
    logits = logits.index_put(place, logits.new_tensor(-torch.inf))
    return torch.logaddexp(own, logits.logsumexp(1)) - own


def weighted_softmax_loss(
    query: Tensor, item: Tensor, item_id: Tensor, weight: Tensor, rows: Tensor, candidates: Candidates
) -> Tensor:
    """The sum of `weight` [P], constants, times `softmax_losses`; a block of logits at a time.

    The gradient is found along with the value, while a block's logits are at hand. Differentiable once.
    """
    loss: Tensor = _Weighted.apply(query, item, rows, item_id, weight, candidates)
    return loss


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, item: Tensor, rows: Tensor, item_id: Tensor, weight: Tensor, candidates: Candidates
    ) -> Tensor:
        correction = -candidates.log_expected.to(query.dtype)
        row, column = _hits(item_id, candidates.item)
        total = query.new_zeros(())
        of_query, of_item, of_rows = torch.empty_like(query), torch.empty_like(item), torch.zeros_like(rows)
        size = max(1, LOGITS // max(1, len(rows)))
        for first in range(0, len(query), size):
            some = slice(first, first + size)
            q, i, w = query[some], item[some], weight[some]
            a, b = torch.searchsorted(row, torch.tensor([first, first + size], device=row.device)).tolist()
            logits = torch.addmm(correction, q, rows.T)
            logits[row[a:b] - first, column[a:b]] = -torch.inf
            own = (q * i).sum(1)
            highest = torch.maximum(logits.amax(1), own)
            share = logits.sub_(highest.unsqueeze(1)).exp_()
            of_own = (own - highest).exp()
            sums = share.sum(1) + of_own
            total += (w * (sums.log() + highest - own)).sum()
            share.mul_((w / sums).unsqueeze(1))
            pull = (w * (of_own / sums - 1)).unsqueeze(1)
            of_query[some] = torch.addcmul(share @ rows, pull, i)
            of_item[some] = pull * q
            of_rows.addmm_(share.T, q)
        ctx.save_for_backward(of_query, of_item, of_rows)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return (*(factor * gradient for gradient in ctx.saved_tensors), None, None, None)


def _hits(item_id: Tensor, candidate_id: Tensor) -> tuple[Tensor, Tensor]:
    """Where a row's item [P] is one of the candidates [S]: rows, ascending, and columns."""
    ascending, order = candidate_id.sort(stable=True)
    first, last = (torch.searchsorted(ascending, item_id, right=right) for right in (False, True))
    count = last - first
    row = torch.arange(len(item_id), device=item_id.device).repeat_interleave(count)
    before = count.cumsum(0) - count
    place = torch.arange(len(row), device=row.device) - before[row] + first[row]
    return row, order[place]
