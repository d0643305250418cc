"""Ways to an inverse Hessian times a vector: on matrices whose inverse is known, and over sharded tables."""

from __future__ import annotations

import functools

import pytest
import torch

from cdr_dist.bilevel.conjugate_gradient import conjugate_gradient
from cdr_dist.bilevel.hypergradient import hypergradient
from cdr_dist.bilevel.identity import identity
from cdr_dist.bilevel.neumann import neumann
from cdr_dist.bilevel.options import HypergradientOptions
from tests import reference
from tests.problem import make, modules, part_of, sharded
from tests.processes import on_workers
from tests.test_hypergradient import SHAPE, largest_difference, one, ours_with

SIZES = (3, 5)


def matrix(shift):
    torch.manual_seed(4)
    a = torch.randn(8, 8, dtype=torch.float64)
    return a @ a.T / 8 + shift * torch.eye(8, dtype=torch.float64)


def pieces(flat):
    return list(flat.split(SIZES))


def product(h):
    return lambda v: pieces(h @ torch.cat(list(v)))


def dot(a, b):
    return torch.cat(list(a)) @ torch.cat(list(b))


B = torch.arange(1.0, 9.0, dtype=torch.float64)


def unscaled(v):
    return list(v)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_conjugate_gradients_solve_in_as_many_products_as_there_are_dimensions(preconditioned):
    h = matrix(0.1)
    scale = (lambda v: pieces(torch.cat(list(v)) / h.diagonal())) if preconditioned else unscaled
    found, norms = conjugate_gradient(pieces(B), product(h), scale, 8, dot)
    torch.testing.assert_close(torch.cat(found), torch.linalg.solve(h, B))
    torch.testing.assert_close(norms[0], B.norm())
    assert norms[-1] < 1e-6 * norms[0]


def test_conjugate_gradients_stop_at_their_tolerance():
    h, calls = matrix(1.0), []
    _, norms = conjugate_gradient(
        pieces(B), lambda v: calls.append(1) or product(h)(v), unscaled, 100, dot, tolerance=1e-3
    )
    assert norms[-1] <= 1e-3 * norms[0] < norms[-2]
    assert len(calls) == len(norms) - 1 < 8


def test_conjugate_gradients_keep_to_directions_of_positive_curvature():
    h = torch.diag(torch.tensor([2.0, 1, 1, 1, 1, 1, 1, -3], dtype=torch.float64))
    found, _ = conjugate_gradient(pieces(B), product(h), unscaled, 50, dot)
    assert dot(found, pieces(B)) > 0
    # The first direction already curves downwards: the start itself.
    found, _ = conjugate_gradient(pieces(B), product(-h.abs()), unscaled, 50, dot)
    assert torch.equal(torch.cat(found), B)


def test_the_identity_is_the_series_without_a_term():
    for a, b in zip(identity(pieces(B), None, None, 3, dot), neumann(pieces(B), None, None, 0, dot), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@functools.cache
def converged(damping):
    """By matrices: -dev gradient (H + damping)^-1 mixed derivative, of the users' rows."""
    problem = make(**SHAPE)
    table, phi = problem.tables["user"], problem.phi

    def lower(t, f):
        tables = {**problem.tables, "user": t.view_as(table)}
        new = reference.unflatten(f, phi)
        return reference.biao_loss(tables, problem.dense, new, problem.batches[0], heads=problem.heads)

    def upper(t):
        tables = {**problem.tables, "user": t.view_as(table)}
        return reference.dev_loss(tables, problem.dense, problem.dev_head, problem.batches[1])

    t, f = table.detach().flatten().requires_grad_(), reference.flatten(phi)
    hessian = torch.autograd.functional.hessian(lambda t: lower(t, f), t)
    slope = lambda f: torch.autograd.grad(lower(t, f), t, create_graph=True)[0]  # noqa: E731
    mixed = torch.autograd.functional.jacobian(slope, f, vectorize=True)
    (g,) = torch.autograd.grad(upper(t), t)
    inverse = torch.linalg.inv(hessian + damping * torch.eye(len(g), dtype=g.dtype))
    return reference.unflatten(-g @ inverse @ mixed, phi)


CG = {"inverse": "conjugate_gradient", "theta": ["user"], "damping": 0.5, "tolerance": 1e-13}


@pytest.mark.parametrize("workers", [1, 2])
def test_conjugate_gradients_over_sharded_tables_are_the_inverse(workers):
    expected = converged(0.5)
    for phi, norms, _ in on_workers(workers, ours_with, workers, SHAPE, 200, CG):
        assert largest_difference(phi, expected) < 1e-9
        assert norms[-1] <= 1e-13 * norms[0]


def test_more_terms_of_the_series_come_closer_to_the_inverse():
    expected = converged(0.5)
    away = [largest_difference(one(SHAPE, k, theta=["user"], damping=0.5)[0], expected) for k in (0, 3, 30, 300)]
    assert away[0] > away[1] > away[2] > away[3]
    assert away[3] < 1e-6
    same, _, _ = one(SHAPE, 7, inverse="identity", theta=["user"])
    assert largest_difference(same, one(SHAPE, 0, theta=["user"])[0]) == 0


def passes(_rank, options):
    problem = make(**SHAPE)
    model, perceptron, head = modules(problem)
    train, dev = (part_of(b, 0, 1) for b in problem.batches[:2])
    given = HypergradientOptions(**{"theta": ["user"], **options})
    return hypergradient(model, perceptron, head, sharded(problem), train, dev, given).passes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"terms": 2}, 5),
        ({"terms": 2, "precondition": "block"}, 6),
        ({"terms": 2, "inverse": "identity"}, 3),
        ({"terms": 2, "inverse": "conjugate_gradient", "damping": 0.5}, 5),
        ({"terms": 99, "inverse": "conjugate_gradient", "damping": 0.5, "tolerance": 0.9}, 4),
    ],
    ids=str,
)
def test_passes_are_those_that_were_made(options, expected):
    assert on_workers(1, passes, options) == [expected]
