"""The attention of `attention.py` in compiled loops, forward only: no operators, no buckets, no factored softmax.

Source behaviours that share a history share its q_i . k_j. Each has a softmax of its own, shifted by every query's
maximum: scores may be as far apart as they like. A score that is NaN or infinite makes its behaviour NaN; no
behaviour's result depends on another's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cdr_dist.compiled import compiled

# Sums in any order and fused products, so that they run in vectors; NaN and infinity keep their meaning.
_fast = compiled(fastmath={"reassoc", "contract"}, error_model="numpy")

LANES = 8
"""A history's queries are filled up to a multiple of it, so that vectors leave no remainder."""

LOOPED_SCORES = 1 << 22
"""All scores of one attention lie in memory at once, 4 bytes each: up to so many."""


def loops_fit(projections: Sequence[Tensor], lengths: Sequence[Tensor], times: int) -> bool:
    """Whether the loops can compute it: float32 on CPU, nobody differentiates, few enough scores.

    times: scores of a pair of positions, heads * B / H.
    """
    if any(x.requires_grad or x.dtype != torch.float32 or x.device.type != "cpu" for x in projections):
        return False
    return all(_score_count(_integers(of), times) <= LOOPED_SCORES for of in lengths)


def looped_attention(
    items: Sequence[Tensor], positions: Sequence[Tensor], lengths: Sequence[Tensor], source: Tensor, heads: int
) -> Tensor:
    """Float32 projections on CPU -> [B, attentions * heads * d].

    For each attention: items [U, 3 * heads * d], the unique items' queries, keys / sqrt(d) and values; positions
    [sum(lengths)] -> row; lengths [H]. source [B, 2 * attentions * heads * d]: the query halves of all attentions, then
    the value halves; B is a multiple of H.
    """
    halves = source.contiguous().numpy()
    out = np.zeros((len(halves), halves.shape[1] // 2), np.float32)
    column = 0
    for projected, place, of in zip(items, positions, lengths, strict=True):
        rows, position, each = projected.contiguous().numpy(), _integers(place), _integers(of)
        assert each.sum() == len(position), "the loops do not look at bounds"
        if len(position):
            assert position.max() < len(rows), "the loops do not look at bounds"
            scores = np.empty(_score_count(each, heads * len(halves) // len(each)), np.float32)
            _write_scores(rows, position, each, halves, column, heads, scores)
            np.exp(scores, out=scores)  # of numpy, because it computes many at once
            _pool(rows, position, each, halves, column, heads, scores, out)
        column += rows.shape[1] // 3
    return torch.from_numpy(out)


def _integers(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.numpy(), np.int64)


def _score_count(lengths: np.ndarray, times: int) -> int:
    return times * int(np.dot(lengths, -(-lengths // LANES) * LANES))


@_fast
def _filled(n):  # type: ignore[no-untyped-def]
    return (n + LANES - 1) // LANES * LANES


@_fast
def _write_scores(items, position, lengths, source, column, heads, scores):  # type: ignore[no-untyped-def]
    """Writes, for each history, head and source behaviour, [n keys, queries] less each query's maximum."""
    inner, copies, longest = items.shape[1] // 3, len(source) // len(lengths), lengths.max()
    width, most = inner // heads, _filled(longest + copies)
    buffer, shared = np.empty(inner * most, np.float32), np.empty((longest, most), np.float32)
    asked, highest = np.empty((copies, longest), np.float32), np.empty(most, np.float32)
    start = at = 0
    for h in range(len(lengths)):
        n = lengths[h]
        if n == 0:
            continue
        m, lanes = _filled(n), _filled(n + copies)
        rows = position[start : start + n]
        start += n
        queries = buffer[: inner * lanes].reshape(inner, lanes)  # of the items, then of the source behaviours
        queries[:] = 0
        for i in range(n):
            item = items[rows[i]]
            for t in range(inner):
                queries[t, i] = item[t]
        for c in range(copies):
            behaviour = source[h * copies + c]
            for t in range(inner):
                queries[t, n + c] = behaviour[column + t]
        for first in range(0, inner, width):
            query = queries[first : first + width]
            for j in range(n):
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
                for c in range(copies):
                    asked[c, j] = score[n + c]
                    score[n + c] = 0
            for c in range(copies):
                block = scores[at : at + n * m].reshape(n, m)
                at += n * m
                for i in range(m):
                    highest[i] = -np.inf
                for j in range(n):
                    score, own, more = block[j], shared[j], asked[c, j]
                    for i in range(m):
                        score[i] = own[i] + more
                        highest[i] = score[i] if score[i] > highest[i] else highest[i]
                for j in range(n):
                    for i in range(m):
                        block[j, i] -= highest[i]


@_fast
def _pool(items, position, lengths, source, column, heads, masses, out):  # type: ignore[no-untyped-def]
    """Adds up the values by the mean over queries of their shares; masses: the scores' exponentials."""
    inner, copies, every = items.shape[1] // 3, len(source) // len(lengths), source.shape[1] // 2
    width = inner // heads
    over = np.empty(_filled(lengths.max()), np.float32)
    start = at = 0
    for h in range(len(lengths)):
        n = lengths[h]
        if n == 0:
            continue
        m = _filled(n)
        rows = position[start : start + n]
        start += n
        for first in range(0, inner, width):
            for b in range(h * copies, (h + 1) * copies):
                mass = masses[at : at + n * m].reshape(n, m)
                at += n * m
                for i in range(m):
                    over[i] = 0
                for j in range(n):
                    for i in range(m):
                        over[i] += mass[j, i]
                for i in range(m):
                    over[i] = np.float32(1) / (over[i] * np.float32(n))
                for i in range(n, m):
                    over[i] = 0
                to, added = out[b, column + first :], source[b, every + column + first :]
                for t in range(width):
                    to[t] = added[t]
                for j in range(n):
                    weight = np.float32(0)
                    for i in range(m):
                        weight += mass[j, i] * over[i]
                    value = items[rows[j], 2 * inner + first :]
                    for t in range(width):
                        to[t] += weight * value[t]
