"""The factored attention over shared jagged histories, against PyTorch's own attention over [e_i ; E_s] written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cdr_dist.bilevel import attention as module
from cdr_dist.bilevel.attention import PooledAttention
from tests.problem import replaced

WIDTH, HEADS, HEAD = 6, 2, 3
LENGTHS = [4, 0, 1, 7, 3, 5]


def written_out(attention, rows, position, lengths, source):
    """Row by row, the history copied for every source behaviour that shares it."""
    copies = len(source) // len(lengths)
    key = torch.cat([attention.key.weight, torch.zeros_like(attention.key.weight)], dim=1)
    weights = (attention.query.weight, key, attention.value.weight)
    histories = position.split(lengths.tolist())
    out = []
    for b in range(len(source)):
        own = rows[histories[b // copies]]
        if not len(own):
            out.append(source.new_zeros(HEADS * HEAD))
            continue
        filler = own.new_zeros((attention.padding or len(own)) - len(own), WIDTH)
        x = torch.cat([own, filler])
        x = torch.cat([x, source[b].expand(len(x), -1)], dim=1)
        q, k, v = ((x @ w.T).view(-1, HEADS, HEAD).transpose(0, 1) for w in weights)
        found = scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(len(x), -1)
        real = torch.arange(len(x)) < len(own)
        out.append((found * real.unsqueeze(1)).mean(0))
    return torch.stack(out)


def problem(copies, padding, scale):
    random = torch.Generator().manual_seed(3)
    attention = PooledAttention(WIDTH, HEADS, HEAD, padding).double()
    for parameter in attention.parameters():
        parameter.data = torch.randn(parameter.shape, generator=random, dtype=torch.float64) * scale
    rows = torch.randn(9, WIDTH, generator=random, dtype=torch.float64)
    position = torch.randint(9, (sum(LENGTHS),), generator=random)
    source = torch.randn(copies * len(LENGTHS), WIDTH, generator=random, dtype=torch.float64)
    return attention, rows, position, torch.tensor(LENGTHS), source.requires_grad_()


def with_gradients(function, attention, *given):
    out = function(*given)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    return [out, *torch.autograd.grad((out * direction).sum(), [*attention.parameters(), given[-1]])]


def difference(copies, padding, scale):
    attention, *given = problem(copies, padding, scale)
    ours = with_gradients(attention, attention, *given)
    expected = with_gradients(lambda *g: written_out(attention, *g), attention, *given)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("scale", [0.3, 20.0])
@pytest.mark.parametrize("padding", [None, 8])
@pytest.mark.parametrize("copies", [1, 3])
def test_equals_the_attention_written_out(copies, padding, scale):
    assert difference(copies, padding, scale) < 1e-9


def test_few_buckets_where_there_is_little_to_compute(monkeypatch):
    """Every history once, in a bucket that holds it; all buckets give the same."""
    lengths = torch.randint(0, 60, (200,), generator=torch.Generator().manual_seed(1))
    found = {}
    for flops in (1e-3, 1e3, 1e9):
        buckets = module._buckets(lengths, None, flops)
        found[flops] = len(buckets)
        members = torch.cat([torch.arange(len(lengths))[rows] for rows, _ in buckets])
        assert set(lengths.nonzero().squeeze(1).tolist()) <= set(members.tolist())
        assert len(set(members.tolist())) == len(members)
        assert all(lengths[rows].max() <= size for rows, size in buckets)
    assert found[1e-3] == 1 < found[1e3] < found[1e9] == 12
    for limit in (0.0, 1e12):
        monkeypatch.setattr(module, "BUCKET_FLOPS", limit)
        assert difference(3, None, 0.3) < 1e-9


def test_scores_far_apart_need_the_unfactored_softmax():
    with replaced(module, "WIDE", float("inf")):
        assert difference(3, None, 0.3) < 1e-9
        assert not difference(3, None, 20.0) < 1e-9
