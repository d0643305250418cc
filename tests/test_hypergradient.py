"""Laws 1 and 2 for the hypergradient: rows equal dense tables, and any number of workers equals one."""

from __future__ import annotations

import pytest
import torch

from cdr_dist.bilevel import perceptron as perceptron_module
from cdr_dist.bilevel.hypergradient import hypergradient
from cdr_dist.bilevel.lookup import ResidentRows, perceptron_input
from cdr_dist.bilevel.options import HypergradientOptions
from cdr_dist.bilevel.perceptron import normalised
from cdr_dist.embeddings.exchange import RowExchange
from cdr_dist.embeddings.workers import max_over_workers
from tests import reference
from tests.problem import make, modules, part_of, replaced, sharded
from tests.processes import on_workers

SHAPE = dict(rows=150, width=4, batch=60, towers=(8, 4), history=5, fillers=2)


def ours(rank, workers, shape, terms, mutation=None, extra_head=True, perceptron=None, **options):
    """The product's hypergradient and weights on this worker's part of the problem."""
    problem = make(**shape)
    tables = sharded(problem)
    model, phi, head = modules(problem, **(perceptron or {}))
    train, dev = (part_of(b, rank, workers) for b in problem.batches[:2])
    call = lambda: hypergradient(  # noqa: E731
        model,
        phi,
        head if extra_head else None,
        tables,
        train,
        dev,
        HypergradientOptions(**{"theta": ["dense", "tables"], "terms": terms, **options}),
    )
    result = MUTATIONS[mutation](call) if mutation else call()
    features = model.spec().features
    embedded = ResidentRows(train.train, features).read(tables, torch.float64).embedded()
    seen = perceptron_input(tables, features, train.histories, embedded, item_gradient=False)
    weights = normalised(phi(seen), train.source_valid, phi.gamma)
    return result.phi, result.norms, weights.detach()


def one(shape, terms, **options):
    return on_workers(1, ours_with, 1, shape, terms, options)[0]


def ours_with(rank, workers, shape, terms, options):
    return ours(rank, workers, shape, terms, **options)


def dense(shape, terms, extra_head=True, alpha=1.0, **options):
    problem = make(**shape)
    return reference.hypergradient(
        problem.tables, problem.dense, problem.phi, *problem.batches[:2], terms, alpha,
        dev_head=problem.dev_head if extra_head else None, heads=problem.heads, **options,
    )  # fmt: skip


def largest_difference(phi, expected):
    width = {n: p.shape[1] for n, p in phi.items() if ".key." in n}
    scale = max(float(v.abs().max()) for v in expected.values())
    differences = []
    for name, value in phi.items():
        wanted = expected[name][:, : width[name]] if name in width else expected[name]
        differences.append(float((value - wanted).abs().max()) / scale)
    return max(differences)


# ---- the mutations: each is one way to get it wrong, and must be seen ----------------------------------------------


def exchange_left_out(call):
    with replaced(RowExchange, "sum_copies", lambda self, values: dict(values)):
        return call()


def normaliser_detached(call):
    def detached(score, valid, gamma):
        shifted = torch.where(valid, score - max_over_workers(score.detach().max()), 0.0)
        mass = torch.where(valid, shifted.exp(), 0.0)
        from cdr_dist.embeddings.workers import sum_over_workers

        return gamma * mass / sum_over_workers(mass.sum()).detach()

    with replaced(perceptron_module, "normalised", detached):
        return call()


def dev_rows_not_aligned(call):
    def by_position(self, other, values):
        out = {}
        for table, ids in self.ids.items():
            rows = values[table]
            out[table] = rows.new_zeros(len(ids), rows.shape[1])
            n = min(len(ids), len(rows))
            out[table][:n] = rows[:n]
        return out

    with replaced(RowExchange, "pull", by_position):
        return call()


MUTATIONS = {f.__name__: f for f in (exchange_left_out, normaliser_detached, dev_rows_not_aligned)}


def by_the_chain_rule(rank, shape):
    """The hypergradient, and what the behaviours' own parts give: sum_j (d L_dev / d w_j) (d w_j / d phi)."""
    problem = make(**shape)
    tables = sharded(problem)
    model, perceptron, head = modules(problem)
    train, dev = (part_of(b, 0, 1) for b in problem.batches[:2])
    options = HypergradientOptions(theta=["dense", "tables"], terms=1)
    found = hypergradient(model, perceptron, head, tables, train, dev, options)
    features = model.spec().features
    embedded = ResidentRows(train.train, features).read(tables, torch.float64).embedded()
    seen = perceptron_input(tables, features, train.histories, embedded, item_gradient=False)
    weights = normalised(perceptron(seen), train.source_valid, perceptron.gamma)
    named = dict(perceptron.named_parameters())
    through = torch.autograd.grad((found.by_behaviour * weights).sum(), list(named.values()))
    return found.phi, dict(zip(named, through, strict=True))


def test_the_behaviours_own_parts_make_up_the_hypergradient():
    (given,) = on_workers(1, by_the_chain_rule, SHAPE)
    assert largest_difference(*given) < 1e-12


@pytest.mark.parametrize("terms", [0, 1, 3, 10])
def test_rows_equal_dense_tables(terms):
    phi, norms, _ = one(SHAPE, terms, alpha=0.5)
    expected, expected_norms = dense(SHAPE, terms, alpha=0.5)
    assert largest_difference(phi, expected) < 1e-12
    # Rows of the dev batch alone count in the dense norm and are dropped from ours, so only an upper bound holds.
    assert all(a <= b * (1 + 1e-12) for a, b in zip(norms.tolist(), expected_norms, strict=True))


@pytest.mark.parametrize(
    ("ours_option", "reference_option"),
    [
        ({"extra_head": False}, {"extra_head": False}),
        ({"perceptron": {"padding": 5}}, {"padding": 5}),
        ({"perceptron": {"gamma": "relu"}}, {"gamma": "relu"}),
        ({"perceptron": {"item_gradient": True}}, {"item_gradient": True}),
    ],
    ids=["own head", "padding as released", "relu gamma", "item gradient as released"],
)
def test_options_equal_dense_tables(ours_option, reference_option):
    phi, _, _ = one(SHAPE, 3, alpha=0.5, **ours_option)
    expected, _ = dense(SHAPE, 3, alpha=0.5, **reference_option)
    assert largest_difference(phi, expected) < 1e-12


def test_theta_of_user_rows_alone_equals_dense_tables():
    phi, _, _ = one(SHAPE, 2, theta=["user"])
    expected, _ = dense(SHAPE, 2, theta=["user"])
    assert largest_difference(phi, expected) < 1e-12


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("options", [{}, {"perceptron": {"item_gradient": True}}], ids=["default", "item gradient"])
def test_upper_step_on_workers_equals_one(workers, options):
    phi_one, norms_one, weights_one = one(SHAPE, 3, alpha=0.5, **options)
    results = on_workers(workers, ours_with, workers, SHAPE, 3, {"alpha": 0.5, **options})
    for phi, norms, _ in results:
        assert largest_difference(phi, phi_one) < 1e-12
        assert torch.allclose(norms, norms_one, rtol=1e-12, atol=0)
    assert torch.allclose(torch.cat([w for _, _, w in results]), weights_one, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", [{"precondition": "block"}, {"precondition": "block", "theta": ["user"]}])
def test_preconditioned_series_on_two_workers_equals_one(options):
    phi_one, _, _ = one(SHAPE, 3, **options)
    for phi, _, _ in on_workers(2, ours_with, 2, SHAPE, 3, options):
        assert largest_difference(phi, phi_one) < 1e-11


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutation_is_seen_on_two_workers(mutation):
    phi_one, _, _ = one(SHAPE, 3, alpha=0.5)
    (phi, _, _), _ = on_workers(2, ours_with, 2, SHAPE, 3, {"alpha": 0.5, "mutation": mutation})
    assert largest_difference(phi, phi_one) > 1e-6


def test_local_mode_is_a_different_approximation_that_agrees_on_one_worker():
    exact, _, _ = one(SHAPE, 3, alpha=0.5)
    local, _, _ = one(SHAPE, 3, alpha=0.5, mode="local")
    assert largest_difference(local, exact) < 1e-13
    (on_two, _, _), (other, _, _) = on_workers(2, ours_with, 2, SHAPE, 3, {"alpha": 0.5, "mode": "local"})
    assert largest_difference(on_two, exact) > 1e-6
    assert largest_difference(on_two, other) == 0


def test_weights_equal_the_padded_reference_and_sum_to_gamma():
    problem = make(**SHAPE)
    _, _, weights = one(SHAPE, 0)
    expected = reference.biao_weights(problem.tables, problem.phi, problem.batches[0], heads=problem.heads)
    assert torch.allclose(weights, expected.detach(), rtol=1e-12, atol=1e-15)
    assert weights.sum().item() == pytest.approx(perceptron_module.functional.softplus(problem.phi["gamma_raw"]).item())
