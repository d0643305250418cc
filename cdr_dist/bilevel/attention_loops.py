"""The attention of `attention.py` in one compiled loop over histories, forward only: no operators, no buckets.

Source behaviours that share a history share its q_i . k_j. Each has a softmax of its own, shifted by every query's
maximum: scores may be as far apart as they like. A score that is NaN or infinite makes its behaviour NaN; no
behaviour's result depends on another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdr_dist.compiled import compiled

# Sums in any order and fused products, so that they run in vectors; NaN and infinity keep their meaning.
_fast = compiled(fastmath={"reassoc", "contract"}, error_model="numpy")

LANES = 8
"""A history's queries are filled up to a multiple of it, so that vectors leave no remainder."""


def loops_fit(*given: Tensor) -> bool:
    """Whether the loops can compute it: float32 on CPU, and nobody differentiates."""
    return all(x.device.type == "cpu" and x.dtype == torch.float32 for x in given) and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in given)
    )


def looped_attention(
    items: Tensor,
    firsts: Sequence[int],
    positions: Sequence[Tensor],
    lengths: Sequence[Tensor],
    source: Tensor,
    heads: int,
) -> Tensor:
    """Float32 projections on CPU -> [B, attentions * heads * d].

    items [U, 3 * heads * d]: the unique items' queries, keys / sqrt(d) and values of one attention after the other,
    which begin at rows `firsts`. For each attention: positions [sum(lengths)] -> its items; lengths [H]. source
    [B, 2 * attentions * heads * d]: the query halves of all attentions, then the value halves; B is a multiple of H.
    """
    out = np.zeros((len(source), source.shape[1] // 2), np.float32)
    edges = (*firsts, len(items))
    longest = max(int(of.max()) if len(of) else 0 for of in lengths)
    for a, (position, own) in enumerate(zip(positions, lengths, strict=True)):
        if len(position):
            given = (items[edges[a] : edges[a + 1]], position, own, source.contiguous())
            within = _attend(*(x.numpy() for x in given), a * items.shape[1] // 3, longest, heads, out)
            assert within, "a history's positions reach beyond its items"
    return torch.from_numpy(out)


@_fast
def _filled(n: Any) -> Any:
    return (n + LANES - 1) // LANES * LANES


@_fast
def _attend(
    items: Any, position: Any, lengths: Any, source: Any, column: Any, longest: Any, heads: Any, out: Any
) -> bool:
    """One attention's histories, one after the other; column: where its part of the source and of `out` begins."""
    histories, inner = len(lengths), items.shape[1] // 3
    copies = len(source) // histories
    width, every, most = inner // heads, source.shape[1] // 2, _filled(longest + copies)
    room = np.empty(inner * most, np.float32)
    shared, asked = np.empty((longest, most), np.float32), np.empty((copies, longest), np.float32)
    buffer, exponents = np.empty(longest * most, np.float32), np.empty(longest * most, np.int32)
    highest, over = np.empty(most, np.float32), np.empty(most, np.float32)
    for i in range(len(position)):
        if position[i] < 0 or position[i] >= len(items):
            return False
    if lengths.sum() != len(position):
        return False
    start = 0
    for h in range(histories):
        n = lengths[h]
        if n == 0:
            continue
        rows = position[start : start + n]
        start += n
        m, lanes = _filled(n), _filled(n + copies)
        queries = room[: inner * lanes].reshape(inner, lanes)  # of the items, then of the source behaviours
        queries[:] = 0
        for i in range(n):
            item = items[rows[i]]
            for t in range(inner):
                queries[t, i] = item[t]
        for c in range(copies):
            behaviour = source[h * copies + c]
            for t in range(inner):
                queries[t, n + c] = behaviour[column + t]
        mass = buffer[: n * m].reshape(n, m)
        for first in range(0, inner, width):
            _products(items, rows, queries, inner, first, width, shared)
            for j in range(n):
                for c in range(copies):
                    asked[c, j] = shared[j, n + c]
                    shared[j, n + c] = 0
            for c in range(copies):
                b = h * copies + c
                _shift(shared, asked[c], highest, mass)
                _exponentials(buffer[: n * m], exponents)
                to, added = out[b, column + first :], source[b, every + column + first :]
                for t in range(width):
                    to[t] = added[t]
                _pool(items, rows, mass, 2 * inner + first, over, to, width)
    return True


@_fast
def _products(items: Any, rows: Any, queries: Any, inner: Any, first: Any, width: Any, shared: Any) -> None:
    """shared[j, i]: key j by query i, of the items and of the source behaviours."""
    lanes, query = queries.shape[1], queries[first : first + width]
    for j in range(len(rows)):
        key, score = items[rows[j], inner + first : inner + first + width], shared[j]
        for i in range(lanes):
            score[i] = 0
        for f in range(width // 4):  # four at a time: the scores are read and written less often
            t = 4 * f
            k0, k1, k2, k3 = key[t], key[t + 1], key[t + 2], key[t + 3]
            q0, q1, q2, q3 = query[t], query[t + 1], query[t + 2], query[t + 3]
            for i in range(lanes):
                score[i] += k0 * q0[i] + k1 * q1[i] + k2 * q2[i] + k3 * q3[i]
        for t in range(width // 4 * 4, width):
            for i in range(lanes):
                score[i] += key[t] * query[t, i]


@_fast
def _shift(shared: Any, more: Any, highest: Any, block: Any) -> None:
    """One behaviour's scores [n keys, queries], less each query's maximum."""
    n, m = block.shape
    for i in range(m):
        highest[i] = -np.inf
    for j in range(n):
        score, own, asked = block[j], shared[j], more[j]
        for i in range(m):
            score[i] = own[i] + asked
            highest[i] = score[i] if score[i] > highest[i] else highest[i]
    for j in range(n):
        for i in range(m):
            block[j, i] -= highest[i]


LOWEST = np.float32(-87.0)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
HALF, ONE, BIAS = np.float32(0.5), np.float32(1.0), np.int32(127)
P5, P4, P3, P2, P1, P0 = (
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)


@compiled(fastmath={"contract"}, error_model="numpy")
def _exponentials(x: Any, exponents: Any) -> None:
    """exp(x) in place for x <= 0, to the last bit but one; a library's function would be called for each number.

    exp(x) = 2^k e^r with |r| <= ln 2 / 2, e^r by the polynomial of Cephes' expf (Moshier). NaN stays.
    """
    for i in range(len(x)):
        v = LOWEST if x[i] < LOWEST else x[i]
        k = np.floor(v * LOG2_E + HALF)
        r = v - k * LN2_HIGH - k * LN2_LOW
        p = ((((P5 * r + P4) * r + P3) * r + P2) * r + P1) * r + P0
        x[i] = p * r * r + r + ONE
        exponents[i] = (np.int32(k) + BIAS) << np.int32(23)
    powers = exponents.view(np.float32)
    for i in range(len(x)):
        x[i] *= powers[i]


@_fast
def _pool(items: Any, rows: Any, mass: Any, first: Any, over: Any, out: Any, width: Any) -> None:
    """Adds up the values by the mean over queries of their shares; mass: the scores' exponentials."""
    n, m = mass.shape
    for i in range(m):
        over[i] = 0
    for j in range(n):
        for i in range(m):
            over[i] += mass[j, i]
    for i in range(m):
        over[i] = np.float32(1) / (over[i] * np.float32(n)) if i < n else np.float32(0)
    for j in range(n):
        weight, row = np.float32(0), mass[j]
        for i in range(m):
            weight += row[i] * over[i]
        value = items[rows[j], first : first + width]
        for t in range(width):
            out[t] += weight * value[t]
