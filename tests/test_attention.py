"""The factored attention over shared jagged histories, against PyTorch's own attention over [e_i ; E_s] written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from cdr_dist.bilevel import attention as module
from cdr_dist.bilevel import attention_loops
from cdr_dist.bilevel.attention import PooledAttention, pooled_attention
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
            out.append(source.new_zeros(attention.heads * attention.head_width))
            continue
        filler = own.new_zeros((attention.padding or len(own)) - len(own), own.shape[1])
        x = torch.cat([own, filler])
        x = torch.cat([x, source[b].expand(len(x), -1)], dim=1)
        q, k, v = ((x @ w.T).view(-1, attention.heads, attention.head_width).transpose(0, 1) for w in weights)
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


def with_gradients(function, attention, *inputs):
    out = function(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad((out * direction).sum(), [*attention.parameters(), inputs[-1]])]


def difference(copies, padding, scale):
    attention, *inputs = problem(copies, padding, scale)
    ours = with_gradients(attention, attention, *inputs)
    expected = with_gradients(lambda *g: written_out(attention, *g), attention, *inputs)
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


def two_domains(seed, lengths, copies, heads, head_width, scale):
    """Attentions, their histories and source behaviours in float32; lengths: a pair (source, target) a history."""
    random = torch.Generator().manual_seed(seed)
    attentions, histories = [], []
    for of in zip(*lengths, strict=True):
        attention = PooledAttention(WIDTH, heads, head_width)
        for parameter in attention.parameters():
            parameter.data = torch.randn(parameter.shape, generator=random) * scale
        rows = torch.randn(11, WIDTH, generator=random)
        attentions.append(attention)
        histories.append((rows, torch.randint(11, (sum(of),), generator=random), torch.tensor(of)))
    return attentions, histories, torch.randn(copies * len(lengths), WIDTH, generator=random)


def in_operators(attentions, histories, source):
    with replaced(module, "loops_fit", lambda *_: False):
        return pooled_attention(attentions, histories, source)


def in_loops(attentions, histories, source):
    """The loops, or a failure."""
    with replaced(module, "_buckets", None), torch.no_grad():
        return pooled_attention(attentions, histories, source)


def in_float64(attentions, histories, source):
    """Written out."""
    parts = [
        written_out(attention.double(), rows.double(), *ids, source.double())
        for attention, (rows, *ids) in zip(attentions, histories, strict=True)
    ]
    return torch.cat(parts, dim=1)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm().clamp(min=0.1))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), min_size=1, max_size=6),
    copies=st.integers(1, 10),
    heads=st.integers(1, 3),
    head_width=st.integers(1, 9),
)
def test_loops_equal_operators_and_the_attention_written_out(seed, lengths, copies, heads, head_width):
    attentions, histories, source = two_domains(seed, lengths, copies, heads, head_width, 0.4)
    found = in_loops(attentions, histories, source)
    assert distance(found, in_operators(attentions, histories, source)) < 1e-5
    assert distance(found, in_float64(attentions, histories, source)) < 1e-5


def test_loops_with_scores_hundreds_apart():
    """Projections of integers are exact, so that float32 has the scores that float64 has."""
    attentions, histories, source = two_domains(0, [(4, 9), (0, 1), (17, 8)], 3, 2, 4, 6.0)
    attentions = [attention.requires_grad_(False) for attention in attentions]
    for tensor in [*(p for a in attentions for p in a.parameters()), *(rows for rows, *_ in histories), source]:
        tensor.round_()
    found = in_loops(attentions, histories, source)
    for attention, (rows, *_) in zip(attentions, histories, strict=True):
        query, key = attention.query.weight[:4, :WIDTH], attention.key.weight[:4]
        scores = (rows @ query.T) @ (rows @ key.T).T / 2  # of the first head
        assert scores.max() - scores.min() > 500
    assert distance(found, in_float64(attentions, histories, source)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_its_own_behaviours_only(bad):
    lengths = [(5, 3), (0, 2), (9, 8), (1, 0), (4, 4)]
    attentions, histories, source = two_domains(1, lengths, 2, 2, 4, 0.4)
    rows, position, _ = histories[0]
    position.clamp_(max=9)[6] = 10  # the last row is in the third history only
    clean = in_loops(attentions, histories, source)
    rows[10] = bad
    source[9] = bad  # the second behaviour of the last history
    found = in_loops(attentions, histories, source)
    expected = torch.zeros_like(found, dtype=torch.bool)
    expected[4:6, :8] = True
    expected[9] = True
    assert torch.equal(found.isnan(), expected)
    assert torch.equal(found[~expected], clean[~expected])


def test_loops_only_where_they_fit_and_nobody_differentiates(monkeypatch):
    attentions, histories, source = two_domains(2, [(3, 2), (1, 4)], 1, 2, 4, 0.4)
    looped = []
    real = module.looped_attention
    monkeypatch.setattr(module, "looped_attention", lambda *x: looped.append(1) or real(*x))

    def loops(source=source):
        looped.clear()
        out = pooled_attention(attentions, histories, source)
        return bool(looped), out.requires_grad

    assert loops() == (False, True)
    with torch.no_grad():
        assert loops() == (True, False)
    for attention in attentions:
        attention.requires_grad_(False)
    assert loops() == (True, False)
    assert loops(source.clone().requires_grad_()) == (False, True)
    for attention in attentions:
        attention.padding = 5
    assert loops() == (False, False)


def test_exponentials_are_those_of_numpy():
    x = np.concatenate([-np.geomspace(1e-8, 87, 4001), [0.0, -200.0, np.nan]]).astype(np.float32)
    found = x.copy()
    attention_loops._exponentials(found, np.empty(len(x), np.int32))
    wanted = np.exp(x.astype(np.float64))
    assert np.all(np.abs(found[:-2] / wanted[:-2] - 1) < 2e-7)
    assert found[-2] < 1e-37
    assert np.isnan(found[-1])


@pytest.mark.parametrize("change", ["step", "data", "double", "load"])
def test_weights_that_are_kept_between_steps_follow_every_change(change):
    """Without gradient the joined weights are kept; a step, a load or another type makes them anew."""
    attention, *inputs = problem(2, None, 0.3)

    def ours():
        with torch.no_grad():
            return attention(*inputs)

    before, again = ours(), ours()
    assert torch.equal(before, again)
    assert attention.kept is not None
    if change == "step":
        with torch.no_grad():
            attention.key.weight.add_(0.1)
    elif change == "data":
        attention.key.weight.data = attention.key.weight.data + 0.1
    elif change == "double":
        inputs = [x.float() if x.is_floating_point() else x for x in inputs]
        attention.float()
    else:
        attention.load_state_dict({n: v + 0.1 for n, v in attention.state_dict().items()})
    after = ours()
    assert change == "double" or not torch.equal(after, before)
    torch.testing.assert_close(after, written_out(attention, *inputs))


@pytest.mark.parametrize("apart", [5.0, 18.0, 22.0, 29.0, 60.0])
def test_float32_gradients_stay_finite_and_right_however_far_scores_are_apart(apart):
    """One history's scores are all so far below another's: masses are exp(-2 apart), squared in the gradient."""
    random = torch.Generator().manual_seed(5)
    scores = torch.rand(2, 1, 3 + 2, 3, generator=random, dtype=torch.float64)  # between 3 positions, 2 behaviours
    scores[1] -= apart - 1
    counted = torch.full((2, 1, 1, 3), 1 / 3, dtype=torch.float64)
    direction = torch.rand(2, 1, 2, 3, generator=random, dtype=torch.float64)

    def gradient(dtype):
        given = scores.to(dtype).requires_grad_()
        (module._shares(given, 2, counted.to(dtype), None) * direction.to(dtype)).sum().backward()
        return given.grad.double()

    torch.testing.assert_close(gradient(torch.float32), gradient(torch.float64), rtol=1e-3, atol=1e-6)
