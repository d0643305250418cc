"""Attention over jagged histories, pooled by the mean, without materialising [e_i ; E_s].

BIAO eq. (4)-(6): positions x_i = [e_i ; E_s] attend to one another and the outputs are averaged. Written out with
W = [W_h | W_s] (history half, source half), five things fall out of the loop over pairs of positions:

- the key's source half adds q_i . W_s E_s to all scores of row i, which the softmax over j ignores: it has no effect;
- the value's source half adds the same vector to every output: it is added once, after pooling;
- mean and weighted sum commute: m = sum_j (mean_i alpha_ij) v_j, one weighted sum instead of one a position;
- projections of e_i depend on the item only: they are made once for each unique item of the batch;
- the query's source half adds s_j = k_j . W_s E_s to every row of scores, so with A = exp(q_i . k_j) and b = exp(s),
  mean_i alpha_ij = b_j sum_i A_ij / (n (A b)_i): source behaviours that share a history share A.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


class PooledAttention(nn.Module):
    """Multi-head self-attention over one history, mean over positions. No biases, no output projection.

    width: of e_i and of E_s (2d: item and category); head_width d; the result is [B, heads * d]. An empty history
    gives zeros. `padding=N` reproduces the released code: histories are filled up to N with zero rows that take
    their share of attention, and the mean runs over N.
    """

    def __init__(self, width: int, heads: int, head_width: int, padding: int | None = None) -> None:
        super().__init__()
        self.heads, self.head_width, self.padding = heads, head_width, padding
        inner = heads * head_width
        self.query = nn.Linear(2 * width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)  # the source half would have no effect
        self.value = nn.Linear(2 * width, inner, bias=False)

    def forward(self, rows: Tensor, position: Tensor, lengths: Tensor, source: Tensor) -> Tensor:
        """rows [U, width] of the unique items; position [sum(lengths)] -> row; lengths [H] of the histories.

        source [B, width]: a multiple of H, B / H source behaviours after one another share a history.
        """
        half, copies = rows.shape[1], len(source) // max(len(lengths), 1)
        query, value = self.query.weight, self.value.weight
        history_side = torch.cat([query[:, :half], self.key.weight, value[:, :half]])
        unique = (rows @ history_side.T).view(len(rows), 3, self.heads, self.head_width)
        if self.padding is not None:
            unique = torch.cat([unique, unique.new_zeros(1, *unique.shape[1:])])
        from_source = (source @ query[:, half:].T).view(-1, copies, self.heads, self.head_width)
        pooled = torch.zeros_like(from_source)
        starts = lengths.cumsum(0) - lengths
        pair_flops = 2.0 * self.heads * (self.head_width + 3 * copies)
        for members, size in _buckets(lengths, self.padding, pair_flops):
            pooled = pooled.index_copy(
                0, members, self._bucket(unique, position, starts, lengths, from_source, members, size)
            )
        added = source @ value[:, half:].T
        # With padding, the zeroed outputs of padded positions still count in the mean.
        taken = (lengths > 0).to(added.dtype) if self.padding is None else lengths.to(added.dtype) / self.padding
        return pooled.view(added.shape) + added * taken.repeat_interleave(copies).unsqueeze(1)

    def _bucket(
        self,
        unique: Tensor,
        position: Tensor,
        starts: Tensor,
        lengths: Tensor,
        from_source: Tensor,
        members: Tensor,
        size: int,
    ) -> Tensor:
        """The members' histories side by side, each filled up to `size` -> [members, copies, heads, head_width]."""
        length = lengths[members]
        column = torch.arange(size, device=length.device)
        real = column < length.unsqueeze(1)  # [m, n]
        place = (starts[members].unsqueeze(1) + column).clamp(max=max(len(position) - 1, 0))
        filler = 0 if self.padding is None else len(unique) - 1
        row = torch.where(real, position[place], filler) if len(position) else torch.full_like(place, filler)
        q, k, v = unique.index_select(0, row.flatten()).view(*row.shape, *unique.shape[1:]).transpose(1, 3).unbind(2)
        keys = k.transpose(2, 3) / math.sqrt(self.head_width)  # [m, heads, d, n]
        between = q @ keys  # [m, heads, n, n]
        added = from_source[members].transpose(1, 2) @ keys  # [m, heads, copies, n]
        if self.padding is None:
            between = between.masked_fill(~real[:, None, None, :], -torch.inf)
            added = added.masked_fill(~real[:, None, None, :], -torch.inf)
        over = length.to(added.dtype) if self.padding is None else torch.full_like(length, size, dtype=added.dtype)
        counted = real[:, None, None, :] / over[:, None, None, None]  # [m, 1, 1, n]: mean over queries
        return (_shares(between, added, counted) @ v).transpose(1, 2)


WIDE = 40.0
"""Scores of one source behaviour further apart than this would lose digits in the factored softmax."""


def _shares(between: Tensor, added: Tensor, counted: Tensor) -> Tensor:
    """sum_i counted_i softmax_j(between_ij + added_cj), [m, heads, copies, n]; -inf where there is no position j."""
    top = added.detach().amax(-1, keepdim=True)
    spread = torch.where(added.detach().isfinite(), top - added.detach(), 0.0)
    if spread.numel() and float(spread.max()) > WIDE:
        whole = (between.unsqueeze(2) + added.unsqueeze(3)).softmax(-1)
        return (whole * counted.unsqueeze(-1)).sum(3)
    a = (between - between.detach().amax(-1, keepdim=True)).exp()
    b = (added - top).exp()
    return b * ((counted / (b @ a.transpose(2, 3))) @ a)


BUCKET_FLOPS = 5e5
"""About what a machine computes in the time that one more bucket takes to set up."""


def _buckets(lengths: Tensor, padding: int | None, pair_flops: float) -> list[tuple[Tensor, int]]:
    """(rows, size) groups of similar length, so that little is filled up; few where there is little to compute.

    Sizes are among 1, 2, 3, 4, 6, 8, 12, 16, …; pair_flops: of one pair of positions.
    """
    if padding is not None:
        return [(torch.arange(len(lengths), device=lengths.device), padding)]
    longest = int(lengths.max()) if len(lengths) else 0
    sizes, size = [0], 1
    while sizes[-1] < longest:
        sizes.append(min(size, longest))
        size = size + 1 if size < 4 else (size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3)
    steps = torch.tensor(sizes, device=lengths.device)
    of_size = torch.bincount(torch.bucketize(lengths, steps), minlength=len(sizes)).tolist()  # one wait for a device
    bounds, top = [longest], longest
    for i in range(len(sizes) - 2, 0, -1):
        if of_size[i] * (top**2 - sizes[i] ** 2) * pair_flops > BUCKET_FLOPS:
            bounds.append(sizes[i])
            top = sizes[i]
    bounds.append(0)
    out = []
    for size, low in itertools.pairwise(bounds):
        members = ((lengths > low) & (lengths <= size)).nonzero().squeeze(1)
        if len(members):
            out.append((members, size))
    return out
