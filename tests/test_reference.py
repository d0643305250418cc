"""The reference implementation's own checks: known limits, closed forms and matrices."""

from math import log

import pytest
import torch
import torch.nn.functional as F

from tests import reference

OPTIONS = [
    {},
    {"gamma": "relu"},
    {"padding": 4},
    {"item_gradient": True},
    {"padding": 5, "gamma": "relu", "item_gradient": True},
]


@pytest.fixture
def problem():
    return reference.random_problem(seed=1)


@pytest.fixture
def tiny():
    sizes = {"rows": 5, "width": 2, "batch": 6, "towers": (4, 3), "local_hidden": (3,), "history": 3}
    return reference.random_problem(**sizes, scale=0.7)


def without(parameters, prefix):
    """The same parameters, zero where the name starts with `prefix`."""
    return {n: torch.zeros_like(x) if n.startswith(prefix) else x for n, x in parameters.items()}


def assert_equal_up_to_rounding(result, expected):
    for name, value in expected.items():
        assert (result[name] - value).abs().max() <= 1e-12 * value.abs().max(), name


def select(batch, rows):
    return {n: x[rows] if torch.is_tensor(x) else [x[row] for row in rows] for n, x in batch.items()}


def swap_domains(mapping):
    """Names of one domain's tables, parameters or batch entries become the other's."""
    bare = ("item", "category", "label")  # a batch names the target's entries without a prefix

    def other(name):
        if name in bare:
            return f"source_{name}"
        if name.removeprefix("source_") in bare and "label" in mapping:
            return name.removeprefix("source_")
        if name.startswith("target_"):
            return name.replace("target_", "source_", 1)
        return name.replace("source_", "target_", 1) if name != "source_valid" else name

    return {other(name): value for name, value in mapping.items()}


def test_one_conet_layer_equals_the_formula_written_out():
    problem = reference.random_problem(towers=(3,))
    tables, dense, batch = problem.tables, problem.dense, problem.batches[0]
    batch = {**batch, "category": 0 * batch["category"], "source_category": 0 * batch["source_category"]}
    target, source, features = reference.conet(tables, dense, batch)
    row = 2
    user = tables["user"][batch["user"][row]]
    x = torch.cat([user, tables["target_item"][batch["item"][row]], 0 * user])
    y = torch.cat([user, tables["source_item"][batch["source_item"][row]], 0 * user])
    cross = dense["cross.0.weight"]
    a = torch.relu(dense["target_tower.0.weight"] @ x + dense["target_tower.0.bias"] + cross @ y)
    b = torch.relu(dense["source_tower.0.weight"] @ y + dense["source_tower.0.bias"] + cross @ x)
    assert a.any()
    assert b.any()
    torch.testing.assert_close(features[row], a)
    torch.testing.assert_close(target[row], dense["target_head.weight"][0] @ a + dense["target_head.bias"][0])
    torch.testing.assert_close(source[row], dense["source_head.weight"][0] @ b + dense["source_head.bias"][0])


def test_zero_cross_units_make_the_towers_independent(problem):
    dense = without(problem.dense, "cross")
    batch = problem.batches[0]
    target, source, _ = reference.conet(problem.tables, dense, batch)
    alone, none, _ = reference.conet(problem.tables, dense, batch, source=False)
    assert none is None
    torch.testing.assert_close(target, alone, rtol=0, atol=0)
    changed = {**batch, "source_item": batch["source_item"].flip(0)}
    torch.testing.assert_close(reference.conet(problem.tables, dense, changed)[0], target, rtol=0, atol=0)
    changed = {**batch, "item": batch["item"].flip(0)}
    torch.testing.assert_close(reference.conet(problem.tables, dense, changed)[1], source, rtol=0, atol=0)
    crossed = reference.conet(problem.tables, problem.dense, batch)[0]
    assert not torch.allclose(crossed, target)


def test_swapping_the_domains_swaps_the_outputs(problem):
    batch = problem.batches[0]
    target, source, _ = reference.conet(problem.tables, problem.dense, batch)
    swapped = reference.conet(*(swap_domains(x) for x in (problem.tables, problem.dense, batch)))
    torch.testing.assert_close(swapped[0], source, rtol=0, atol=0)
    torch.testing.assert_close(swapped[1], target, rtol=0, atol=0)


def test_small_parameters_give_a_loss_of_ln_2_per_domain():
    problem = reference.random_problem(scale=0.01)
    batch = problem.batches[0]
    target, source, _ = reference.conet(problem.tables, problem.dense, batch)
    for loss in reference.losses(target, source, batch):
        torch.testing.assert_close(loss, torch.full_like(loss, log(2)), rtol=0, atol=0.02)


def test_id_zero_reads_zeros_and_gets_no_gradient(problem):
    tables, batch = problem.tables, problem.batches[0]
    assert (batch["source_category"] == 0).any()
    options = {"heads": problem.heads, "item_gradient": True}
    loss = reference.biao_loss(tables, problem.dense, problem.phi, batch, **options)
    for gradient in torch.autograd.grad(loss, list(tables.values())):
        assert (gradient[0] == 0).all()
        assert (gradient[1:] != 0).any()
    shifted = {name: table.detach().clone() for name, table in tables.items()}
    for table in shifted.values():
        table[0] += 1
    assert reference.biao_loss(shifted, problem.dense, problem.phi, batch, **options) == loss


def test_attention_equals_scaled_dot_product_attention(problem):
    heads, width = problem.heads, 4
    x = torch.randn(6, 4 * width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = (
        (x @ problem.phi[f"attention.source.{part}.weight"].T).reshape(6, heads, width).transpose(0, 1)
        for part in ("query", "key", "value")
    )
    expected = F.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(6, heads * width)
    torch.testing.assert_close(reference.attention(problem.phi, "source", x, heads), expected)


def test_padding_changes_nothing_for_full_histories_and_something_for_others(problem):
    tables, phi, heads = problem.tables, problem.phi, problem.heads
    candidate = tables["source_item"][1:3].reshape(-1)
    items, categories = [3, 4, 3], [1, 0, 2]
    plain = reference.interest(tables, phi, "target", items, categories, candidate, heads)
    full = reference.interest(tables, phi, "target", items, categories, candidate, heads, padding=3)
    padded = reference.interest(tables, phi, "target", items, categories, candidate, heads, padding=4)
    torch.testing.assert_close(full, plain, rtol=0, atol=0)
    assert not torch.allclose(padded, plain)
    assert not torch.allclose(padded * 4 / 3, plain)  # padding takes attention mass, too
    for padding in (None, 4):
        empty = reference.interest(tables, phi, "target", [], [], candidate, heads, padding)
        assert (empty == torch.zeros(heads * 4)).all()


def test_scores_depend_on_one_row_alone(problem):
    batch = problem.batches[0]
    rows = [4, 2, 0]
    for padding in (None, 6):
        scores = reference.perceptron_scores(problem.tables, problem.phi, batch, problem.heads, padding)
        some = select(batch, rows)
        part = reference.perceptron_scores(problem.tables, problem.phi, some, problem.heads, padding)
        torch.testing.assert_close(part, scores[rows])


@pytest.mark.parametrize("padding", [None, 7])
def test_candidate_half_of_the_key_projection_gets_no_gradient(problem, padding):
    """E_s adds the same number to the scores of all positions, padded ones included: softmax drops it."""
    keys = [problem.phi[f"attention.{domain}.key.weight"] for domain in ("source", "target")]
    batch = problem.batches[0]
    scores = reference.perceptron_scores(problem.tables, problem.phi, batch, problem.heads, padding)
    for gradient in torch.autograd.grad(scores.square().sum(), keys):
        history, candidate = gradient.abs().amax(0).chunk(2)
        assert history.max() > 1e-4
        assert candidate.max() < 1e-14 * history.max()


def test_tables_get_no_gradient_through_the_scores_but_the_candidate_on_request(problem):
    tables = list(problem.tables.values())
    scores = reference.perceptron_scores(problem.tables, problem.phi, problem.batches[0], problem.heads)
    gradients = torch.autograd.grad(scores.sum(), tables, allow_unused=True)
    assert gradients == (None,) * len(tables)
    scores = reference.perceptron_scores(
        problem.tables, problem.phi, problem.batches[0], problem.heads, item_gradient=True
    )
    gradients = torch.autograd.grad(scores.sum(), tables, allow_unused=True)
    assert {n for n, g in zip(problem.tables, gradients, strict=True) if g is not None} == {
        "source_item",
        "source_category",
    }


def test_weights_sum_to_gamma_over_the_valid_rows():
    scores = torch.tensor([1.0, -2.0, 50.0, 0.5], dtype=torch.float64)
    valid = torch.tensor([True, True, False, True])
    raw = torch.tensor(0.7, dtype=torch.float64)
    for kind, gamma in (("softplus", log(1 + torch.e**0.7)), ("relu", 0.7)):
        weights = reference.source_weights(scores, valid, raw, kind)
        assert weights.sum().item() == pytest.approx(gamma)
        assert weights[2] == 0
        assert (weights[0] / weights[3]).log().item() == pytest.approx(0.5)
    assert (reference.source_weights(scores, torch.zeros(4, dtype=torch.bool), raw) == 0).all()
    assert (reference.source_weights(scores, valid, -raw, "relu") == 0).all()


def test_uniform_weights_equal_the_joint_loss(problem):
    batch = problem.batches[0]
    phi = without(problem.phi, "global_mlp")
    target, source, _ = reference.conet(problem.tables, problem.dense, batch)
    loss = reference.biao_loss(problem.tables, problem.dense, phi, batch, heads=problem.heads)
    share = batch["source_valid"].sum() / batch["weight"].sum()
    gamma0 = F.softplus(phi["gamma_raw"]) / share
    torch.testing.assert_close(loss, reference.joint_loss(target, source, batch, gamma0))


def test_filler_rows_change_nothing(tiny):
    train, dev = tiny.batches
    real = torch.nonzero(train["weight"]).flatten().tolist()
    assert len(real) < len(train["weight"])
    full, full_norms = reference.hypergradient(*tiny[:3], train, dev, 2, 0.1, heads=tiny.heads)
    part, part_norms = reference.hypergradient(
        *tiny[:3], select(train, real), select(dev, real), 2, 0.1, heads=tiny.heads
    )
    torch.testing.assert_close(part, full)
    assert part_norms == pytest.approx(full_norms)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hypergradient_equals_the_explicit_hessian(tiny, options):
    train, dev = tiny.batches
    arguments = (*tiny[:3], train, dev, 3, 0.5, tiny.dev_head)
    result, norms = reference.hypergradient(*arguments, heads=tiny.heads, **options)
    expected = reference.explicit_hypergradient(*arguments, heads=tiny.heads, **options)
    assert len(norms) == 4
    assert list(result) == list(tiny.phi)
    assert all(value.abs().max() > 1e-5 for value in result.values())
    without_series, _ = reference.hypergradient(
        *tiny[:3], train, dev, 0, 0.5, tiny.dev_head, heads=tiny.heads, **options
    )
    assert (4 * without_series["gamma_raw"] / result["gamma_raw"] - 1).abs() > 0.01  # the Hessian counts
    assert_equal_up_to_rounding(result, expected)


def test_hypergradient_on_user_rows_alone_equals_the_explicit_hessian(tiny):
    train = tiny.batches[0]  # without common users the result is zero
    arguments = (*tiny[:3], train, train, 1, 1.0, None, ["user"])
    result, _ = reference.hypergradient(*arguments, heads=tiny.heads)
    expected = reference.explicit_hypergradient(*arguments, heads=tiny.heads)
    assert result["gamma_raw"] != 0
    assert_equal_up_to_rounding(result, expected)


def test_hypergradient_without_series_is_a_finite_difference_of_one_sgd_step(tiny):
    """K = 0 is the derivative of L_dev after theta - lr * grad L_train by phi, over lr, as lr goes to 0."""
    train, dev = tiny.batches
    names = [n for n in reference.shared_names(tiny.tables, tiny.dense) if n in tiny.dense] + ["user"]
    result, _ = reference.hypergradient(*tiny[:3], train, dev, 0, 1.0, tiny.dev_head, names, heads=tiny.heads)
    both = {**tiny.tables, **tiny.dense}

    def after_one_step(gamma_raw, lr=1e-4):
        phi = {**tiny.phi, "gamma_raw": gamma_raw}
        loss = reference.biao_loss(tiny.tables, tiny.dense, phi, train, heads=tiny.heads)
        gradients = torch.autograd.grad(loss, [both[name] for name in names])
        new = {n: (both[n] - lr * g).detach() for n, g in zip(names, gradients, strict=True)}
        tables, dense = reference.replace(tiny.tables, new), reference.replace(tiny.dense, new)
        return reference.dev_loss(tables, dense, tiny.dev_head, dev).item() / lr

    gamma_raw = tiny.phi["gamma_raw"].detach()
    slope = (after_one_step(gamma_raw + 0.01) - after_one_step(gamma_raw - 0.01)) / 0.02
    assert slope == pytest.approx(result["gamma_raw"].item(), rel=1e-2)


@pytest.mark.parametrize(("h", "expected"), [(0.5, 1.875), (0.1, 3.439)])
def test_series_on_a_diagonal_hessian(h, expected):
    p, norms = reference.neumann(lambda v: [h * v[0]], [torch.ones(1, dtype=torch.float64)], 3, 1.0)
    assert p[0].item() == pytest.approx(expected)
    assert norms == pytest.approx([(1 - h) ** n for n in range(4)])


def test_series_diverges_beyond_two():
    _, norms = reference.neumann(lambda v: [2.1 * v[0]], [torch.ones(1, dtype=torch.float64)], 5, 1.0)
    assert norms == sorted(norms)
    assert norms[-1] > 1.5


def test_row_wise_adagrad_keeps_one_state_a_row_and_leaves_other_rows():
    table = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    optimizer = reference.RowWiseAdagrad(table, lr=0.1)
    table.grad = torch.tensor([[0.0, 0.0], [3.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    optimizer.step()
    optimizer.step()
    assert optimizer.state.tolist() == [0, 10, 0]
    step = 0.1 * (1 / 5**0.5 + 1 / 10**0.5)
    torch.testing.assert_close(table.detach(), -step * table.grad)


def test_training_lowers_the_loss_and_zero_rates_leave_everything(problem):
    phi, heads = problem.phi, problem.heads
    ways = (
        lambda tables, batch: reference.joint_weights(batch, 0.5),
        lambda tables, batch: reference.biao_weights(tables, phi, batch, heads).detach(),
    )
    for weights in ways:
        fresh = reference.random_problem(seed=1)
        reference.train(fresh.tables, fresh.dense, fresh.batches[:1], 2, 0.0, 0.0, weights)
        torch.testing.assert_close([*fresh[:2]], [*problem[:2]], rtol=0, atol=0)
        history = reference.train(fresh.tables, fresh.dense, fresh.batches[:1], 8, 0.1, 0.01, weights)
        assert history[-1] < 0.8 * history[0]
