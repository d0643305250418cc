"""NextItNet and what may become of it: the limit cases of the papers, in float64, without a dataset."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cdr_dist.data.candidates import Candidates, CandidateSampler
from cdr_dist.data.options import SoftmaxOptions
from cdr_dist.errors import UserError
from cdr_dist.models import softmax
from cdr_dist.models.causal import DILATIONS, Block, receptive_field
from cdr_dist.models.encoder import Encoder, Sequences
from cdr_dist.models.nextitnet import NextItNet, _right
from cdr_dist.models.pairs import pair_scorer
from cdr_dist.models.softmax import softmax_losses, weighted_softmax_loss
from cdr_dist.transfer.decisions import Gates, Hard, Random, Reinforced, Soft
from cdr_dist.transfer.finetune import FineTune
from cdr_dist.transfer.peterrec import Adapter, PeterRec
from cdr_dist.transfer.uaf import POLICY_DILATIONS, UserAdaptive
from tests.sequences import Rows, history

WIDTH = 8
EVERY_TRANSFER = {
    "all": FineTune(),
    "cls": FineTune(0, items=False),
    "peterrec": PeterRec(),
    "peterrec parallel": PeterRec("parallel"),
    "hard": UserAdaptive(Hard()),
    "hard as released": UserAdaptive(Hard(logits="sigmoid")),
    "hard gru": UserAdaptive(Hard(), "gru"),
    "soft": UserAdaptive(Soft()),
    "soft gru": UserAdaptive(Soft(), "gru"),
    "rl": UserAdaptive(Reinforced()),
    "random": UserAdaptive(Random()),
}


def shaken(module: torch.nn.Module, seed: int = 0) -> None:
    """Every parameter a random number, norms and biases included."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) / math.sqrt(max(1, parameter.shape[-1])))


def sequences(*lengths: int, seed: int = 1) -> Sequences:
    torch.manual_seed(seed)
    items = torch.randn(sum(lengths), WIDTH, dtype=torch.double)
    first = [0, *itertools.accumulate(lengths)]
    return Sequences.of(items, history(*(list(range(a, b)) for a, b in itertools.pairwise(first))))


def naive_block(block: Block, x: Tensor) -> Tensor:
    """One position after the other, one tap after the other, [length, width]."""
    for convolution, norm in ((block.convolution1, block.norm1), (block.convolution2, block.norm2)):
        width, d = x.shape[1], convolution.dilation
        out = []
        for t in range(len(x)):
            y = convolution.bias.clone()
            for tap in range(3):
                at = t - (2 - tap) * d
                if at >= 0:
                    y = y + convolution.weight[:, tap * width : (tap + 1) * width] @ x[at]
            y = (y - y.mean()) / (y.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
            out.append(y.relu())
        x = torch.stack(out)
    return x


def test_what_is_right_of_one_that_stands_alone_and_of_one_before_its_negatives() -> None:
    alone = _right(torch.tensor([[-5.0], [5.0], [-5.0], [5.0]]), torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    assert alone.tolist() == [False, True, True, False]
    lines = torch.tensor([[1.0, 0.5, 0.9], [1.0, 0.5, 1.1], [1.0, 0.5, 1.0]])
    assert _right(lines, torch.tensor([[1.0, 0.0, 0.0]] * 3)).tolist() == [True, False, False]


def test_sizes_are_the_papers() -> None:
    assert sum(p.numel() for p in Block(128, 1).parameters()) == 99_072
    assert sum(p.numel() for p in Encoder(128, DILATIONS).parameters()) == 792_576
    assert sum(p.numel() for p in Adapter(128).parameters()) == 8_352
    assert (receptive_field(DILATIONS), receptive_field(POLICY_DILATIONS)) == (121, 31)


def test_a_block_is_two_dilated_convolutions_with_norms() -> None:
    block, seen = Block(WIDTH, 2).double(), sequences(9)
    shaken(block)
    assert torch.allclose(block(seen.rows)[0], naive_block(block, seen.rows[0]), atol=1e-12)


def test_an_output_sees_its_receptive_field_and_nothing_after_it() -> None:
    encoder = Encoder(WIDTH, DILATIONS).double()
    shaken(encoder)
    torch.manual_seed(2)
    x = torch.randn(1, 130, WIDTH, dtype=torch.double)
    before = encoder.pretraining(x)
    for changed, first, last in ((5, 5, 125), (100, 100, 129)):
        y = x.clone()
        y[0, changed] += 1
        moved = (encoder.pretraining(y) - before).abs().amax(2)[0].nonzero().squeeze(1)
        assert (int(moved.min()), int(moved.max())) == (first, last)


def test_what_stands_behind_a_sequence_is_never_seen() -> None:
    encoder = Encoder(WIDTH, (1, 4)).double()
    shaken(encoder)
    both = sequences(3, 7)
    hidden = encoder.pretraining(both.rows)
    assert torch.allclose(hidden[0, :3], encoder.pretraining(both.rows[:1, :3])[0], atol=1e-14)
    assert torch.allclose(both.mean(hidden)[0], hidden[0, :3].mean(0), atol=1e-14)
    assert torch.equal(both.last(hidden, both.lengths.unsqueeze(1))[0, 0], hidden[0, 2])


def test_an_empty_sequence_is_zero() -> None:
    seen = Sequences.of(torch.randn(2, WIDTH), history([], [3, 4]))
    hidden = torch.randn(2, 2, WIDTH)
    assert not seen.mean(hidden)[0].any()
    assert not seen.last(hidden, seen.lengths.unsqueeze(1))[0].any()
    nothing = Sequences.of(torch.zeros(0, WIDTH), history([]))
    assert nothing.rows.shape == (1, 1, WIDTH)


@pytest.mark.parametrize("name", EVERY_TRANSFER)
@pytest.mark.parametrize("training", [True, False])
def test_before_fine_tuning_every_way_of_transfer_is_the_pre_trained_network(name: str, training: bool) -> None:
    encoder = EVERY_TRANSFER[name].encoder(WIDTH, (1, 4, 2)).double().train(training)
    shaken(encoder)
    for adapter in (m for m in encoder.modules() if isinstance(m, Adapter)):
        torch.nn.init.zeros_(adapter.up.weight), torch.nn.init.zeros_(adapter.up.bias)
    encoder.begin()
    seen = sequences(5, 3, 9)
    draws = torch.rand(3, encoder.draws, dtype=torch.double)
    found = encoder(seen, encoder.route(seen, draws))
    assert torch.allclose(found, encoder.pretraining(seen.rows), atol=1e-12)


@pytest.mark.parametrize("insertion", ["serial", "parallel"])
def test_adapters_are_added_behind_or_beside_each_convolution(insertion: str) -> None:
    encoder = PeterRec(insertion).encoder(WIDTH, (2, 1)).double()
    shaken(encoder)
    of, seen = dict(encoder.named_parameters()), sequences(5, 3)
    x = seen.rows
    for i, block in enumerate(encoder.blocks):
        y = x
        for k in (1, 2):
            z, adapter = getattr(block, f"convolution{k}")(y), f"adapters{k}.{i}"
            low = (z if insertion == "serial" else y) @ of[f"{adapter}.down.weight"].T + of[f"{adapter}.down.bias"]
            low = low * (1 + torch.erf(low / math.sqrt(2))) / 2  # GELU
            added = low @ of[f"{adapter}.up.weight"].T + of[f"{adapter}.up.bias"]
            y = getattr(block, f"norm{k}")(z + added).relu()
        x = x + y
    assert torch.allclose(encoder(seen, None), x, atol=1e-12)


@pytest.mark.parametrize("policy", ["nextitnet", "gru"])
def test_a_policy_says_the_same_of_a_sequence_in_any_company(policy: str) -> None:
    encoder = UserAdaptive(Soft(), policy).encoder(WIDTH, (1, 4)).double()
    shaken(encoder)
    both, none = sequences(3, 9), torch.zeros(2, 0)
    alone = Sequences(both.rows[:1, :3], both.real[:1, :3], both.lengths[:1])
    found, wanted = (encoder.route(seen, none[: len(seen.rows)]).tuned for seen in (both, alone))  # type: ignore[union-attr]
    assert torch.allclose(found[0], wanted[0], atol=1e-14)
    assert not torch.allclose(found[0], found[1], atol=0.01)


def tuned_by(gate: float) -> tuple[Tensor, Tensor, Tensor]:
    """The output under one gate for all, that of the frozen blocks and that of the copies."""
    encoder = UserAdaptive(Soft()).encoder(WIDTH, (1, 4)).double()
    shaken(encoder)
    seen = sequences(6, 2)
    found = encoder(seen, Gates(torch.full((2, 2), gate, dtype=torch.double)))
    copies = Encoder(WIDTH, (1, 4)).double()
    copies.blocks.load_state_dict(encoder.copies.state_dict())  # type: ignore[union-attr]
    return found, encoder.pretraining(seen.rows), copies.pretraining(seen.rows)


def test_policy_0_is_the_frozen_network_and_policy_1_the_fine_tuned_one() -> None:
    for gate, which in ((0.0, 1), (1.0, 2)):
        found = tuned_by(gate)
        assert torch.equal(found[0], found[which])
    assert not torch.allclose(found[1], found[2])


def test_half_a_gate_is_the_mean_of_a_blocks_two_outputs() -> None:
    encoder = UserAdaptive(Soft()).encoder(WIDTH, (2,)).double()
    shaken(encoder)
    seen = sequences(4)
    outputs = [encoder(seen, Gates(torch.full((1, 1), gate, dtype=torch.double))) for gate in (0.0, 1.0, 0.5)]
    assert torch.allclose(outputs[2], (outputs[0] + outputs[1]) / 2, atol=1e-12)


def test_hard_gates_are_0_or_1_with_the_gradient_of_the_relaxed_choice() -> None:
    torch.manual_seed(3)
    say = torch.randn(50, 4, 2, dtype=torch.double, requires_grad=True)
    draws = torch.rand(50, 4, dtype=torch.double)
    tuned = Hard(temperature=2.0).gates(say, draws, True).tuned
    assert set(tuned.detach().round(decimals=12).flatten().tolist()) == {0.0, 1.0}
    # Two Gumbel draws whose difference is the logistic draw.
    gumbels = torch.stack([torch.zeros_like(draws), torch.logit(draws)], dim=2)
    logits = say.log_softmax(2) + gumbels
    assert torch.equal(tuned.detach().round() > 0, logits.argmax(2) > 0)
    relaxed = (logits / 2.0).softmax(2)
    assert torch.allclose(relaxed.sum(2), torch.ones_like(draws))
    factor = torch.randn_like(draws)
    ours, theirs = (
        torch.autograd.grad((factor * of).sum(), say, retain_graph=True)[0] for of in (tuned, relaxed[..., 1])
    )
    assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(("logits", "low", "high"), [("log_pi", 0.0, 1.0), ("sigmoid", 0.269, 0.731)])
def test_the_probability_of_fine_tuning_as_it_is_and_as_released(logits: str, low: float, high: float) -> None:
    draws = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    for say, wanted in (([100.0, -100.0], low), ([-100.0, 100.0], high)):
        gates = Hard(logits=logits).gates(torch.tensor(say).expand(20_000, 1, 2), draws, True).tuned
        assert float(gates.mean()) == pytest.approx(wanted, abs=0.01)


def test_reinforced_gates_have_the_gradient_of_the_expected_reward() -> None:
    """Summed over all choices of two blocks, probability by probability, the self-critical loss is REINFORCE."""
    torch.manual_seed(4)
    gap = torch.randn(1, 2, dtype=torch.double, requires_grad=True)
    decision = Reinforced(gamma=0.5, beta=1.5)

    def right(tuned: Tensor) -> Tensor:
        return tuned.sum(1) != 1

    say = torch.stack([torch.zeros_like(gap), gap], dim=2)
    probability = gap.sigmoid()
    expected = total = torch.zeros((), dtype=torch.double)
    for choice in itertools.product((0.0, 1.0), repeat=2):
        taken = torch.tensor([choice], dtype=torch.double)
        draws = torch.where(taken > 0, probability.detach() / 2, (1 + probability.detach()) / 2)
        gates = decision.gates(say, draws, True)
        assert torch.equal(gates.tuned, taken)
        chance = (taken * probability + (1 - taken) * (1 - probability)).prod()
        loss = gates.policy_loss(right(taken), right(gates.baseline().tuned))
        total = total + chance.detach() * loss.sum()
        share = taken.mean()
        reward = 1 - share**2 if bool(right(taken)) else torch.tensor(-0.5)
        expected = expected + chance * reward
    ours, theirs = (torch.autograd.grad(of, gap, retain_graph=True)[0] for of in (total, -1.5 * expected))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_a_sampled_baseline_is_a_draw_of_its_own_with_the_same_expected_gradient() -> None:
    torch.manual_seed(4)
    gap = torch.randn(1, 2, dtype=torch.double, requires_grad=True)
    decision, probability = Reinforced(gamma=0.5, beta=1.5, baseline="sample"), gap.sigmoid()
    say, p = torch.stack([torch.zeros_like(gap), gap], dim=2), gap.detach().sigmoid()
    assert (decision.draws, Reinforced().draws) == (2, 1)
    choices = [torch.tensor([of], dtype=torch.double) for of in itertools.product((0.0, 1.0), repeat=2)]
    chances = [(of * probability + (1 - of) * (1 - probability)).prod() for of in choices]
    draws = [torch.where(of > 0, p / 2, (1 + p) / 2) for of in choices]
    total = torch.zeros((), dtype=torch.double)
    for i, j in itertools.product(range(4), repeat=2):
        gates = decision.gates(say, torch.cat([draws[i], draws[j]], dim=1), True)
        assert torch.equal(gates.tuned, choices[i])
        assert torch.equal(gates.baseline().tuned, choices[j])
        right = [of.sum(1) != 1 for of in (gates.tuned, gates.baseline().tuned)]
        total = total + (chances[i] * chances[j]).detach() * gates.policy_loss(*right).sum()
    rewards = [1 - of.mean() ** 2 if of.sum() != 1 else -0.5 for of in choices]
    expected = sum(chance * reward for chance, reward in zip(chances, rewards, strict=True))
    ours, theirs = (torch.autograd.grad(of, gap, retain_graph=True)[0] for of in (total, -1.5 * expected))
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_rewards_favour_freezing_in_the_paper_and_fine_tuning_as_released() -> None:
    none, everything = torch.zeros(1, 4), torch.ones(1, 4)
    right, wrong = torch.tensor([True]), torch.tensor([False])
    paper, released = Reinforced(), Reinforced(reward="released")
    assert [float(paper.reward(g, right)) for g in (none, everything)] == [1.0, 0.0]
    assert [float(released.reward(g, right)) for g in (none, everything)] == [0.0, 1.0]
    assert {float(of.reward(g, wrong)) for of in (paper, released) for g in (none, everything)} == {-1.0}


def test_random_gates_are_fair_and_fixed() -> None:
    draws = torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0))
    gates = Random().gates(torch.zeros(10_000, 2, 2), draws, True).tuned
    assert torch.equal(gates, Random().gates(torch.zeros(10_000, 2, 2), draws, False).tuned)
    assert float(gates.mean()) == pytest.approx(0.5, abs=0.01)


def test_what_each_way_of_transfer_trains() -> None:
    def kinds(transfer: object) -> tuple[set[str], bool]:
        encoder = transfer.encoder(WIDTH, (1, 4, 1))  # type: ignore[attr-defined]
        return {".".join(n.split(".")[:2]) for n in encoder.trained()}, encoder.trains_items

    blocks = {f"blocks.{i}" for i in range(3)}
    assert kinds(FineTune()) == (blocks, True)
    assert kinds(FineTune(0, items=False)) == (set(), False)
    assert kinds(FineTune(2, items=False)) == ({"blocks.1", "blocks.2"}, False)
    trained = PeterRec().encoder(WIDTH, (1, 4, 1)).trained()
    assert {n.split(".")[2] for n in trained if n.startswith("blocks")} == {"norm2"}
    assert {n.split(".")[0] for n in trained} == {"blocks", "adapters1", "adapters2"}
    assert {n.split(".")[0] for n in UserAdaptive(Hard()).encoder(WIDTH, (1, 4)).trained()} == {"copies", "policy"}
    assert {n.split(".")[0] for n in UserAdaptive(Random()).encoder(WIDTH, (1, 4)).trained()} == {"copies"}
    with pytest.raises(UserError, match="has 2 blocks"):
        FineTune(3).encoder(WIDTH, (1, 4))


# ---- the softmax -----------------------------------------------------------------------------------------------


def softmax_case() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(5)
    query = torch.randn(9, WIDTH, dtype=torch.double, requires_grad=True)
    table = torch.randn(30, WIDTH, dtype=torch.double, requires_grad=True)
    return query, table, torch.randint(2, 30, (9,)), torch.rand(9, dtype=torch.double)


def test_among_all_items_it_is_the_cross_entropy() -> None:
    query, table, item, _ = softmax_case()
    everything = Candidates(torch.arange(2, 30), torch.zeros(28))
    found = softmax_losses(query, table[item], item, table[2:], everything)
    assert torch.allclose(found, functional.cross_entropy(query @ table[2:].T, item - 2, reduction="none"), atol=1e-12)


@pytest.mark.parametrize("logits", [20, 1 << 21])
def test_the_fused_loss_and_its_gradients_are_those_of_the_plain_one(
    logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax, "LOGITS", logits)
    query, table, item, weight = softmax_case()
    drawn = torch.tensor([5, 9, 5, 20, int(item[0])])
    candidates = Candidates(drawn, torch.tensor([0.1, 0.2, 0.1, -0.3, 0.7]))
    plain = (weight * softmax_losses(query, table[item], item, table[drawn], candidates)).sum()
    fused = weighted_softmax_loss(query, table[item], item, weight, table[drawn], candidates)
    assert float(fused) == pytest.approx(float(plain), abs=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(3 * of, [query, table]) for of in (fused, plain)), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_an_items_own_draws_are_left_out() -> None:
    query, table, item, _ = softmax_case()
    drawn = torch.cat([item[:1], item[:1], torch.tensor([3, 4])])
    with_it = softmax_losses(query, table[item], item, table[drawn], Candidates(drawn, torch.zeros(4)))[0]
    own = query[0] @ table[item[0]]
    others = [query[0] @ table[i] for i in (3, 4) if i != item[0]]
    assert float(with_it.exp()) == pytest.approx(float(sum((o - own).exp() for o in others) + 1))


@pytest.mark.parametrize("sampler", ["uniform", "log_uniform", "popularity"])
def test_a_sample_is_drawn_as_often_as_it_says_and_estimates_the_normaliser(sampler: str) -> None:
    counts = np.array([0, 0, 1, 50, 7, 0, 300, 7])
    sampler_of = CandidateSampler(SoftmaxOptions(200, sampler, 0.75), 8, "source", counts)
    steps = [sampler_of.of(2, step) for step in range(300)]
    times = np.bincount(torch.cat([of.item for of in steps]).numpy(), minlength=8) / 300
    expected = np.full(8, np.nan)
    for of in steps:
        expected[of.item.numpy()] = of.log_expected.exp().numpy()
    assert np.isnan(expected[:2]).all()
    assert np.nansum(expected) == pytest.approx(200, rel=1e-5)
    assert np.allclose(times[2:], expected[2:], atol=6 * np.sqrt(np.nanmax(expected) / 300))
    by_popularity = expected[[6, 3, 4, 7, 2, 5]]
    if sampler == "log_uniform":
        ranks = np.arange(6)
        assert np.allclose(by_popularity, 200 * np.log((ranks + 2) / (ranks + 1)) / np.log(7), rtol=1e-5)
    elif sampler == "popularity":
        weight = np.array([300, 50, 7, 7, 1, 1]) ** 0.75
        assert np.allclose(by_popularity, 200 * weight / weight.sum(), rtol=1e-5)
    score = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    estimates = [float((score[of.item] - of.log_expected).exp().sum()) for of in steps]
    assert np.mean(estimates) == pytest.approx(float(score[2:].exp().sum()), rel=0.02)


def test_uniform_logits_cost_the_logarithm_of_the_items() -> None:
    sampler = CandidateSampler(SoftmaxOptions(10, "uniform"), 8, "source", np.zeros(3_000_002, dtype=np.int64))
    drawn, item = sampler.of(0, 0), torch.tensor([2])
    zeros = torch.zeros(1, WIDTH)
    found = softmax_losses(zeros, zeros, item, torch.zeros(10, WIDTH), drawn)
    assert float(found) == pytest.approx(math.log(3_000_001), rel=1e-4)


# ---- the whole model ---------------------------------------------------------------------------------------------


def embedded(model: NextItNet, rows: Rows, table: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(6)
    n = len(rows.label)
    target = torch.randn(n, WIDTH, dtype=torch.double)
    return {"source_history_item": table[rows.histories["source"].item], "target_item": target}


def test_the_loss_of_bpr_and_bce_and_the_score_of_either_pooling() -> None:
    rows = Rows({"source": history([2, 3, 4], [5])}, 3, torch.zeros(2, 0))
    table = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for pooling, bias, loss in itertools.product(("last", "mean"), (True, False), ("bpr", "bce")):
        model = NextItNet(WIDTH, dilations=[1, 4], pooling=pooling, bias=bias, loss=loss).double()
        shaken(model)
        given = embedded(model, rows, table)
        output = model(given, rows)
        hidden = model.encoder.pretraining(table[torch.tensor([[2, 3, 4]])])[0]
        h = hidden[-1] if pooling == "last" else hidden.mean(0)
        for i in range(3):
            w = given["target_item"][i]
            score = h[1:] @ w[1:] + w[0] if bias else h @ w
            assert float(output.target_logit[i]) == pytest.approx(float(score), abs=1e-12)
        target, source = model.losses(output, rows)
        logit = output.target_logit
        if loss == "bce":
            wanted = functional.binary_cross_entropy_with_logits(logit, rows.label, reduction="none")
        else:
            gaps = torch.stack([logit[i] - logit[i // 3 * 3] for i in range(6)])
            wanted = torch.where(rows.label > 0, 0.0, torch.log1p(gaps.exp()))
        assert source is None
        assert torch.allclose(target, wanted, atol=1e-12)


@pytest.mark.parametrize("name", ["none", "peterrec", "hard"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("bias", [True, False])
def test_pair_scores_are_those_of_the_forward_pass(name: str, pooling: str, bias: bool) -> None:
    model = NextItNet(WIDTH, dilations=[1, 4], pooling=pooling, bias=bias)
    if name != "none":
        model.adapt(EVERY_TRANSFER[name])
    model = model.double().eval()
    shaken(model)
    rows = Rows({"source": history([2, 3, 4, 7, 8], [5], [], [6, 2])}, 2, torch.zeros(4, model.draws))
    given = embedded(model, rows, torch.randn(10, WIDTH, dtype=torch.double))
    scorer = pair_scorer(model)
    parts, items = scorer.row_part(given, rows), scorer.item_part(given)
    matrix = scorer.matrix(parts, items)  # type: ignore[attr-defined]
    assert torch.allclose(scorer.logits(parts[:, None], items), matrix, atol=1e-12)
    assert torch.allclose(scorer.logits(parts, items), matrix.diagonal(), atol=1e-12)
    for shift in range(8):
        target = given["target_item"].roll(-shift, 0)
        wanted = model(given | {"target_item": target}, rows).target_logit
        assert torch.allclose(matrix[torch.arange(8), (torch.arange(8) + shift) % 8], wanted, atol=1e-12)
    if name == "hard":
        gates = model.gates(given, rows)
        assert gates is not None
        assert 0 < gates.mean() < 1


@pytest.mark.parametrize("name", EVERY_TRANSFER)
def test_a_step_has_gradients_of_what_is_trained_and_of_nothing_else(name: str) -> None:
    model = NextItNet(WIDTH, dilations=[1, 4])
    model.adapt(EVERY_TRANSFER[name])
    model = model.double()
    shaken(model)
    rows = Rows({"source": history([2, 3, 4], [5, 6])}, 2, torch.rand(2, model.draws, dtype=torch.double))
    given = embedded(model, rows, torch.randn(10, WIDTH, dtype=torch.double))
    given["target_item"].requires_grad_()
    names, _ = model.trained(False)
    for each, parameter in model.named_parameters():
        parameter.requires_grad_(each in names)
    model.losses(model(given, rows), rows)[0].sum().backward()
    assert {each for each, parameter in model.named_parameters() if parameter.grad is not None} == set(names)


def test_pre_training_predicts_every_known_next_item_once() -> None:
    model = NextItNet(WIDTH, pretrain=True, target=False, dilations=[1, 4]).double()
    shaken(model)
    rows = Rows({"source": history([2, 1, 4, 5], [], [7], [5, 2])}, 1, torch.zeros(4, 0))
    rows.candidates = {"source": Candidates(torch.arange(2, 10), torch.zeros(8))}
    generator = torch.Generator().manual_seed(0)
    table, out = (torch.randn(10, WIDTH, generator=generator, dtype=torch.double) for _ in range(2))
    item = rows.histories["source"].item
    given = {"source_history_item": table[item], "source_history_next": out[item], "source_softmax": out[2:]}
    loss, positions = model.next_item(given, rows)
    wanted = torch.zeros((), dtype=torch.double)
    for items in ([2, 1, 4, 5], [5, 2]):
        hidden = model.encoder.pretraining(table[torch.tensor([items])])[0]
        for t, coming in enumerate(items[1:]):
            if coming > 1:  # 1 is unknown: nothing to predict, but something to predict from
                query = torch.cat([torch.ones(1, dtype=torch.double), hidden[t, 1:]])
                wanted = wanted + functional.cross_entropy(out[2:] @ query, torch.tensor(coming - 2))
    assert int(positions) == 3
    assert float(loss) == pytest.approx(float(wanted), abs=1e-11)


def test_a_source_behaviour_is_judged_by_what_came_before_it() -> None:
    rows = Rows({"source": history([2, 3, 4], [5, 6])}, 2, torch.zeros(2, 0))
    rows.source_before, rows.source_item = torch.tensor([2, 0, 1, 2]), torch.tensor([4, 2, 6, 9])
    rows.candidates = {"source": Candidates(torch.arange(2, 10), torch.zeros(8))}
    generator = torch.Generator().manual_seed(0)
    table, out = (torch.randn(10, WIDTH, generator=generator, dtype=torch.double) for _ in range(2))
    model = NextItNet(WIDTH, source=True, dilations=[1, 4]).double()
    shaken(model)
    given = embedded(model, rows, table)
    given |= {"source_item": table[rows.source_item], "source_next": out[rows.source_item], "source_softmax": out[2:]}
    _, source = model.losses(model(given, rows), rows)
    for i, items in enumerate(([2, 3], [], [5], [5, 6])):
        query = torch.zeros(WIDTH, dtype=torch.double)
        if items:
            query = model.encoder.pretraining(table[torch.tensor([items])])[0, -1].clone()
        query[0] = 1
        wanted = functional.cross_entropy(out[2:] @ query, rows.source_item[i] - 2)
        assert float(source[i]) == pytest.approx(float(wanted), abs=1e-11)  # type: ignore[index]


def test_class_labels_are_a_softmax_over_all_targets() -> None:
    rows = Rows({"source": history([2, 3], [4])}, 1, torch.zeros(2, 0))
    table = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    model = NextItNet(WIDTH, dilations=[1], loss="softmax").double()
    shaken(model)
    classes = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    given = {"source_history_item": table[rows.histories["source"].item], "target_item": classes[[2, 0]]}
    output = model(given | {"target_softmax": classes}, rows)
    hidden = [model.encoder.pretraining(table[torch.tensor([items])])[0, -1] for items in ([2, 3], [4])]
    logits = torch.stack([classes[:, 1:] @ h[1:] + classes[:, 0] for h in hidden])
    wanted = functional.cross_entropy(logits, torch.tensor([2, 0]), reduction="none")
    assert torch.allclose(model.losses(output, rows)[0], wanted, atol=1e-12)


def test_a_policy_that_learns_by_reinforcement_adds_its_loss_to_the_positives() -> None:
    rows = Rows({"source": history([2, 3, 4], [5])}, 2, torch.tensor([[0.1, 0.9], [0.8, 0.2]]))
    table = torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    model = NextItNet(WIDTH, dilations=[1, 4])
    model.adapt(UserAdaptive(Reinforced()))
    model = model.double()
    shaken(model)
    given = embedded(model, rows, table)
    with_policy = model.losses(model(given, rows), rows)[0]
    route = model.encoder.route(Sequences.of(given["source_history_item"], rows.histories["source"]), rows.draws)
    assert isinstance(route, Gates)
    logits = {}
    for name, gates in (("taken", route), ("against", route.baseline())):
        seen = Sequences.of(given["source_history_item"], rows.histories["source"])
        hidden = seen.last(model.encoder(seen, gates), seen.lengths.unsqueeze(1)).squeeze(1)
        query = torch.cat([torch.ones(2, 1, dtype=torch.double), hidden[:, 1:]], 1).repeat_interleave(2, 0)
        logits[name] = (query * given["target_item"]).sum(1)
    right = [logits[name][0::2] > logits[name][1::2] for name in ("taken", "against")]
    added = route.policy_loss(*right)
    gap = logits["taken"][1::2] - logits["taken"][0::2]
    wanted = torch.stack([added, torch.log1p(gap.exp())], dim=1).flatten()
    assert torch.allclose(with_policy, wanted, atol=1e-12)
    assert added.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "bpt"}, "model.loss=bpt: choose bpr, bce or softmax"),
        ({"pooling": "max"}, "model.pooling=max: choose last or mean"),
        ({"dilations": []}, "at least one block"),
    ],
)
def test_a_mistake_in_the_models_options_is_one_line(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NextItNet(WIDTH, **options)  # type: ignore[arg-type]
