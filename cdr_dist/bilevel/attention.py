"""Attention over jagged histories, pooled by the mean, without materialising [e_i ; E_s].

BIAO eq. (4)-(6): positions x_i = [e_i ; E_s] attend to one another and the outputs are averaged. Written out with
W = [W_h | W_s] (history half, source half), five things fall out of the loop over pairs of positions:

- the key's source half adds q_i . W_s E_s to all scores of row i, which the softmax over j ignores: it has no effect;
- the value's source half adds the same vector to every output: it is added once, after pooling;
- mean and weighted sum commute: m = sum_j (mean_i alpha_ij) v_j, one weighted sum instead of one a position;
- projections of e_i depend on the item only: they are made once for each unique item of the batch;
- the query's source half adds s_j = k_j . W_s E_s to every row of scores, so with A = exp(q_i . k_j) and b = exp(s),
  mean_i alpha_ij = b_j sum_i A_ij / (n (A b)_i): source behaviours that share a history share A.

After the projections nothing depends on the domain any more: the histories of both are one batch of histories.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

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
        return pooled_attention([self], [(rows, position, lengths)], source)[0]


def pooled_attention(
    attentions: Sequence[PooledAttention], histories: Sequence[tuple[Tensor, Tensor, Tensor]], source: Tensor
) -> list[Tensor]:
    """Each attention over its own histories (rows, position, lengths: see `PooledAttention.forward`), all at once.

    They have the same heads, widths, padding and number of histories -> [B, heads * d] each.
    """
    first = attentions[0]
    heads, width, padding = first.heads, first.head_width, first.padding
    copies = len(source) // max(len(histories[0][2]), 1)
    items, from_source, added, positions, offset = [], [], [], [], 0
    for attention, (rows, position, _) in zip(attentions, histories, strict=True):
        half = rows.shape[1]
        query, value = attention.query.weight, attention.value.weight
        items.append(rows @ torch.cat([query[:, :half], attention.key.weight, value[:, :half]]).T)
        query_side, value_side = (source @ torch.cat([query[:, half:], value[:, half:]]).T).chunk(2, dim=1)
        from_source.append(query_side)
        added.append(value_side)
        positions.append(position + offset if offset else position)
        offset += len(rows)
    if padding is not None:  # one row of zeros that fills all histories up
        items.append(items[0].new_zeros(1, items[0].shape[1]))
    unique = torch.cat(items).view(-1, 3, heads, width)
    queries = torch.cat(from_source).view(-1, copies, heads, width)
    position, lengths = torch.cat(positions), torch.cat([of for _, _, of in histories])
    starts = lengths.cumsum(0) - lengths
    buckets = _buckets(lengths, padding, 2.0 * heads * (width + 3 * copies))
    found = [_bucket(unique, position, starts, lengths, queries, *bucket, padding) for bucket in buckets]
    members = [rows for rows, _ in buckets]
    out = torch.zeros_like(queries)
    if found:
        out = out.index_copy(0, torch.cat(members), torch.cat(found))
    # With padding, the zeroed outputs of padded positions still count in the mean.
    taken = (lengths > 0).to(source.dtype) if padding is None else lengths.to(source.dtype) / padding
    taken = taken.repeat_interleave(copies).unsqueeze(1) if copies != 1 else taken.unsqueeze(1)
    whole = out.view(len(taken), heads * width) + torch.cat(added) * taken
    return list(whole.chunk(len(attentions)))


def _bucket(
    unique: Tensor,
    position: Tensor,
    starts: Tensor,
    lengths: Tensor,
    queries: Tensor,
    members: Tensor,
    size: int,
    padding: int | None,
) -> Tensor:
    """The members' histories side by side, each filled up to `size` -> [members, copies, heads, head_width]."""
    length = lengths[members].unsqueeze(1)
    column = torch.arange(size, device=length.device)
    real = column < length  # [m, n]
    place = (starts[members].unsqueeze(1) + column).clamp(max=max(len(position) - 1, 0))
    filler = 0 if padding is None else len(unique) - 1
    row = torch.where(real, position[place], filler) if len(position) else torch.full_like(place, filler)
    q, k, v = unique.index_select(0, row.flatten()).view(*row.shape, *unique.shape[1:]).transpose(1, 3).unbind(2)
    keys = k.transpose(2, 3) / math.sqrt(unique.shape[3])  # [m, heads, d, n]
    between = q @ keys  # [m, heads, n, n]
    from_source = queries[members].transpose(1, 2) @ keys  # [m, heads, copies, n]
    over = length if padding is None else size
    counted = (real.to(between.dtype) / over)[:, None, None, :]  # [m, 1, 1, n]: mean over queries
    shares = _shares(between, from_source, counted, None if padding is not None else real[:, None, None, :])
    return (shares @ v).transpose(1, 2)


WIDE = 30.0
"""Scores further apart than this would lose digits in the factored softmax."""


def _shares(between: Tensor, added: Tensor, counted: Tensor, real: Tensor | None) -> Tensor:
    """sum_i counted_i softmax_j(between_ij + added_cj), [m, heads, copies, n]; j: the real positions (None: all)."""
    if not added.numel():
        return added
    extremes = torch.stack([*torch.aminmax(between.detach()), *torch.aminmax(added.detach())])
    low, high, low_added, high_added = extremes.tolist()
    if high - low <= WIDE and high_added - low_added <= WIDE:  # and not NaN
        a, b = (between - high).exp(), (added - high_added).exp()
        b = b if real is None else b * real
        return b * ((counted / (b @ a.transpose(2, 3))) @ a)
    whole = between.unsqueeze(2) + added.unsqueeze(3)
    if real is not None:
        whole = whole.masked_fill(~real.unsqueeze(2), -torch.inf)
    return (whole.softmax(-1) * counted.unsqueeze(-1)).sum(3)


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
