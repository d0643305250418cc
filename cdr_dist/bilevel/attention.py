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

from cdr_dist.bilevel.attention_loops import looped_attention, loops_fit


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
        self.kept: tuple[list[tuple[int, int, int]], tuple[list[Tensor], Tensor]] | None = None

    def forward(self, rows: Tensor, position: Tensor, lengths: Tensor, source: Tensor) -> Tensor:
        """rows [U, width] of the unique items; position [sum(lengths)] -> row; lengths [H] of the histories.

        source [B, width]: a multiple of H, B / H source behaviours after one another share a history.
        """
        return pooled_attention([self], [(rows, position, lengths)], source)


def pooled_attention(
    attentions: Sequence[PooledAttention], histories: Sequence[tuple[Tensor, Tensor, Tensor]], source: Tensor
) -> Tensor:
    """Each attention over its own histories (rows, position, lengths: see `PooledAttention.forward`), all at once.

    They have the same heads, widths, padding and number of histories -> [B, attentions * heads * d], side by side.
    """
    first = attentions[0]
    heads, width, padding = first.heads, first.head_width, first.padding
    shape = (len(histories[0][2]), len(source) // max(len(histories[0][2]), 1), len(attentions), heads, width)
    of_items, of_source = _joined_weights(attentions)
    of_source = source @ of_source
    each = [lengths for _, _, lengths in histories]
    if padding is None and loops_fit(of_source, *(rows for rows, _, _ in histories), *of_items):
        return _in_loops(of_items, histories, of_source, heads)
    items, positions, offset = [], [], 0
    for weight, (rows, position, _) in zip(of_items, histories, strict=True):
        items.append(rows @ weight)
        positions.append(position + offset if offset else position)
        offset += len(rows)
    if padding is not None:  # one row of zeros that fills all histories up
        items.append(items[0].new_zeros(1, items[0].shape[1]))
    from_source, added = of_source.chunk(2, dim=1)
    # A history after its owner's other one: [H x attentions, heads, copies, d].
    queries = from_source.reshape(shape).permute(0, 2, 3, 1, 4).flatten(0, 1)
    of_domain = torch.stack(each)
    starts = (of_domain.flatten().cumsum(0).view_as(of_domain) - of_domain).T.flatten()
    lengths = of_domain.T.flatten()
    unique, position = torch.cat(items), torch.cat(positions)
    out = torch.zeros_like(queries)
    if len(position) or padding is not None:
        buckets = _buckets(lengths, padding, 2.0 * heads * (width + 3 * shape[1]))
        found = [_bucket(unique, position, starts[m], lengths[m], queries[m], size, padding) for m, size in buckets]
        members = [m for m, _ in buckets if isinstance(m, Tensor)]
        if members:
            out = out.index_copy(0, torch.cat(members), torch.cat(found))
        elif found:
            (out,) = found
    # With padding, the zeroed outputs of padded positions still count in the mean.
    taken = (lengths > 0).to(source.dtype) if padding is None else lengths.to(source.dtype) / padding
    out = out.view(shape[0], shape[2], heads, shape[1], width).permute(0, 3, 1, 2, 4)
    whole = out + added.view(shape) * taken.view(shape[0], 1, shape[2], 1, 1)
    return whole.reshape(len(source), -1)


def _in_loops(
    of_items: Sequence[Tensor], histories: Sequence[tuple[Tensor, Tensor, Tensor]], of_source: Tensor, heads: int
) -> Tensor:
    edges = [0, *itertools.accumulate(len(rows) for rows, _, _ in histories)]
    items = of_source.new_empty(edges[-1], of_items[0].shape[1])
    for a, (rows, _, _) in enumerate(histories):
        torch.mm(rows, of_items[a], out=items[edges[a] : edges[a + 1]])
    positions, lengths = ([history[i] for history in histories] for i in (1, 2))
    return looped_attention(items, edges[:-1], positions, lengths, of_source, heads)


def _joined_weights(attentions: Sequence[PooledAttention]) -> tuple[list[Tensor], Tensor]:
    """Of the items, [width, 3 * heads * d] of each attention: query, key / sqrt(d), value. Of the source, all
    attentions' queries, then their values.

    Where nobody differentiates they are kept until a parameter changes: between two upper steps it does not.
    """
    parameters = [p for a in attentions for p in (a.query.weight, a.key.weight, a.value.weight)]
    state = [(id(p), p.data_ptr(), p._version) for p in parameters]
    kept, constant = attentions[0].kept, not torch.is_grad_enabled()
    if constant and kept is not None and kept[0] == state:
        return kept[1]
    items = []
    for a in attentions:
        half = a.key.in_features
        key = a.key.weight / math.sqrt(a.head_width)
        items.append(torch.cat([a.query.weight[:, :half], key, a.value.weight[:, :half]]).T)
    sides = [a.query.weight[:, a.key.in_features :] for a in attentions]
    sides += [a.value.weight[:, a.key.in_features :] for a in attentions]
    found = items, torch.cat(sides).T
    if constant:
        attentions[0].kept = state, found
    return found


def _bucket(
    unique: Tensor,
    position: Tensor,
    starts: Tensor,
    lengths: Tensor,
    queries: Tensor,
    size: int,
    padding: int | None,
) -> Tensor:
    """Some histories side by side, each filled up to `size`; queries [m, heads, copies, d] -> the same shape."""
    heads, copies, width = queries.shape[1:]
    column = torch.arange(size, device=lengths.device)
    real = column < lengths.unsqueeze(1)  # [m, n]
    place = starts.unsqueeze(1) + column
    if padding is None:  # what stands there instead is masked
        row = position[place.clamp_(max=len(position) - 1)]
    else:
        filled = torch.cat([position, position.new_full((1,), len(unique) - 1)])
        row = filled[torch.where(real, place, len(position))]
    split = unique.index_select(0, row.flatten()).view(*row.shape, 3, heads, width)
    q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)  # [m, heads, n, d]
    scores = torch.cat([q, queries], dim=2) @ k.transpose(2, 3)  # [m, heads, n + copies, n]
    over = lengths.unsqueeze(1).clamp(min=1) if padding is None else size
    counted = (real.to(scores.dtype) / over)[:, None, None, :]  # [m, 1, 1, n]: mean over queries
    return _shares(scores, copies, counted, None if padding is not None else real[:, None, None, :]) @ v


WIDE = 20.0
"""Scores further apart than this would leave float32 in the factored softmax: a mass may be as small as exp(-2 WIDE),
and its gradient has the square below the line."""


def _shares(scores: Tensor, copies: int, counted: Tensor, real: Tensor | None) -> Tensor:
    """sum_i counted_i softmax_j(between_ij + added_cj), [m, heads, copies, n]; j: the real positions (None: all).

    scores: between and below it added.
    """
    size = scores.shape[3]
    if not scores.numel():
        return scores[:, :, size:]
    low, high = torch.stack(torch.aminmax(scores.detach())).tolist()
    if high - low <= WIDE:  # and not NaN
        a, b = _exp(scores, high).split([size, copies], dim=2)
        b = b if real is None else b * real
        # A history without a real position has no mass; elsewhere the smallest number of a float changes no bit.
        mass = torch.baddbmm(_TINY.to(b), b.flatten(0, 1), a.flatten(0, 1).transpose(1, 2)).view_as(b)
        return b * ((counted / mass) @ a)
    between, added = scores.split([size, copies], dim=2)
    whole = between.unsqueeze(2) + added.unsqueeze(3)
    if real is not None:
        whole = whole.masked_fill(~real.unsqueeze(2), torch.finfo(whole.dtype).min)
    return (whole.softmax(-1) * counted.unsqueeze(-1)).sum(3)


_TINY = torch.tensor(1e-36)


def _exp(scores: Tensor, high: float) -> Tensor:
    """In place where nobody differentiates."""
    return (scores - high).exp() if scores.requires_grad else scores.sub_(high).exp_()


BUCKET_FLOPS = 5e5
"""About what a machine computes in the time that one more bucket takes to set up."""


def _buckets(lengths: Tensor, padding: int | None, pair_flops: float) -> list[tuple[Tensor | slice, int]]:
    """(rows, size) groups of similar length, so that little is filled up; few where there is little to compute.

    A single one holds all rows, else empty histories are in none.

    Sizes are among 1, 2, 3, 4, 6, 8, 12, 16, …; pair_flops: of one pair of positions.
    """
    if padding is not None:
        return [(slice(None), padding)]
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
    if len(bounds) == 1:
        return [(slice(None), longest)]
    bounds.append(0)
    out: list[tuple[Tensor | slice, int]] = []
    for size, low in itertools.pairwise(bounds):
        members = ((lengths > low) & (lengths <= size)).nonzero().squeeze(1)
        if len(members):
            out.append((members, size))
    return out
