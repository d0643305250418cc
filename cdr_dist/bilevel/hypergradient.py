"""The implicit gradient of the development loss with respect to the perceptron, exact over sharded tables.

BIAO eq. (14): -grad_theta L_dev . sum_n (I - H)^n . grad_phi grad_theta L_train, where theta is the dense parameters
and those table rows that the *train* batch uses: a row that only the dev batch uses never meets the mixed derivative,
and a row that neither uses has no gradient at all. So the result equals that of dense tables of any size.

Every worker holds its part of both batches. A vector over theta is a list of tensors whose row parts are copies: all
workers that use a row hold the same values. Products are computed from each worker's part of the loss and summed over
workers, densely for the dense part and by `RowExchange` for rows.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cdr_dist.bilevel.conjugate_gradient import conjugate_gradient
from cdr_dist.bilevel.identity import identity
from cdr_dist.bilevel.lookup import ResidentRows, perceptron_input
from cdr_dist.bilevel.neumann import neumann
from cdr_dist.bilevel.options import ALL_TABLES, DENSE, HypergradientOptions
from cdr_dist.bilevel.perceptron import BehaviouralPerceptron
from cdr_dist.data.batch import Batch
from cdr_dist.embeddings.exchange import RowExchange
from cdr_dist.embeddings.tables import ShardedTables
from cdr_dist.embeddings.workers import reduce_flat, sum_over_workers, world_size
from cdr_dist.errors import UserError
from cdr_dist.models.protocol import Backbone, Labels, Output, cross_entropy
from cdr_dist.profiling import span


@dataclass(frozen=True)
class Hypergradient:
    """phi: parameter name -> gradient, equal on all workers. norms: |v_n| of the series, n = 0 .. terms.

    by_behaviour [B] of this worker: d L_dev / d w_j after the lower level's reaction, negative where behaviour j helps;
    0 where there is none; None with `item_gradient`, where weights have no part of their own. passes: backward passes
    that were made: dev gradient, train gradient with graph, Hessian-vector products, and the mixed one counted once.
    """

    phi: dict[str, Tensor]
    norms: Tensor
    by_behaviour: Tensor | None
    passes: int


def hypergradient(
    model: Backbone,
    perceptron: BehaviouralPerceptron,
    dev_head: nn.Module | None,
    tables: ShardedTables,
    train: Batch,
    dev: Batch,
    options: HypergradientOptions,
) -> Hypergradient:
    """Eq. 14 for one train and one dev batch. `dev_head` None: the dev loss is that of the model's own target head."""
    assert isinstance(model, nn.Module)
    problem = _Problem(model, perceptron, tables, train, options)
    start = problem.dev_gradient(dev_head, dev)
    total, norms = _inverse(problem, start, options)
    phi, by_behaviour = problem.mixed(total)
    return Hypergradient(phi, torch.stack(norms), by_behaviour, problem.products + 3)


def _inverse(
    problem: _Problem, start: list[Tensor], options: HypergradientOptions
) -> tuple[list[Tensor], list[Tensor]]:
    """The inverse Hessian times the dev gradient, as the options approximate it, and norms on the way there."""
    diagonal = problem.scale() if options.precondition == "block" else None
    if options.inverse == "conjugate_gradient":
        scales: Sequence[Tensor | float] = diagonal or [1.0] * len(start)
        solve: Any = functools.partial(conjugate_gradient, tolerance=options.tolerance)
    else:
        if diagonal is not None:
            start = [s * v for s, v in zip(diagonal, start, strict=True)]
        scales = diagonal or [options.alpha] * len(start)
        solve = neumann if options.inverse == "neumann" else identity

    def scaled(vector: Sequence[Tensor]) -> list[Tensor]:
        return [s * v for s, v in zip(scales, vector, strict=True)]

    found: tuple[list[Tensor], list[Tensor]] = solve(start, problem.hessian_vector, scaled, options.terms, problem.dot)
    return found


class _Problem:
    """L_train of one batch around the current theta, with its gradient's graph kept for the products."""

    def __init__(
        self,
        model: nn.Module,
        perceptron: BehaviouralPerceptron,
        tables: ShardedTables,
        train: Batch,
        options: HypergradientOptions,
    ) -> None:
        self._model, self._perceptron, self._tables, self._options = model, perceptron, tables, options
        self._dtype = next(model.parameters()).dtype
        self.products = 0
        self._features = model.spec().features  # type: ignore[operator]
        self._exact = options.mode == "exact"
        self._rows = ResidentRows(train.train, self._features).read(tables, self._dtype)
        self._exchange = self._exchange_of(self._rows)
        heads = model.heads()  # type: ignore[operator]
        self._dense = {
            name: p.detach().requires_grad_(DENSE in options.theta and not name.startswith(heads))
            for name, p in model.named_parameters()
        }
        self._dense_names = [name for name, p in self._dense.items() if p.requires_grad]
        self._row_names = _tables_of(options.theta, list(self._rows.unique))
        self._theta = [self._dense[n] for n in self._dense_names] + [self._rows.rows[t] for t in self._row_names]
        self._train = train
        copies = self._exchange.copies() if self._exact else {t: None for t in self._row_names}
        self._copies = [copies[t] for t in self._row_names]

        embedded = self._rows.embedded()
        item_gradient = perceptron.options.item_gradient
        seen = perceptron_input(tables, self._features, train.histories, embedded, item_gradient)
        with span("upper weights"):
            self._weights = perceptron.weights(perceptron(seen), train.source_valid, train.global_rows)
        # Weights do not depend on theta, so the second-order graph needs them as a leaf only: the perceptron is
        # differentiated once, at the end. As released (item_gradient) they do, and stay in the graph.
        self._leaf = self._weights if item_gradient else self._weights.detach().requires_grad_()
        with span("train forward"):
            output = self._call(embedded, train)
            target, source = model.losses(output, train)  # type: ignore[operator]
            assert source is not None, "the upper step needs a source loss"
            loss = (train.weight * target).sum() / train.global_rows + (self._leaf * source).sum()
        with span("train gradient with graph"):
            found = torch.autograd.grad(
                loss * self._local_factor, self._theta, create_graph=True, materialize_grads=True
            )
            # A worker without an example of the batch may not read a table: the gradient is 0, and needs a graph.
            nothing = 0.0 * self._leaf.sum()
            self._gradient = [g if g.requires_grad else g + nothing for g in found]

    @property
    def _local_factor(self) -> int:
        """In `local` mode each worker's part stands for the whole."""
        return 1 if self._exact else world_size()

    def dev_gradient(self, dev_head: nn.Module | None, dev: Batch) -> list[Tensor]:
        """grad_theta L_dev: dense part summed over workers, rows aligned by id with the train batch's rows."""
        rows = ResidentRows(dev.train, self._features).read(self._tables, self._dtype)
        with span("dev forward"):
            output = self._call(rows.embedded(), dev)
            logit = output.target_logit if dev_head is None else dev_head(output.target_features).squeeze(1)
            loss = (dev.weight * cross_entropy(logit, dev.label)).sum() / dev.global_rows * self._local_factor
        dense = [self._dense[n] for n in self._dense_names]
        named = [t for t in self._row_names if t in rows.rows]
        inputs = [*dense, *(rows.rows[t] for t in named)]
        with span("dev gradient"):
            found = list(torch.autograd.grad(loss, inputs, materialize_grads=True))
        by_table = {t: torch.zeros_like(r) for t, r in rows.rows.items()}
        by_table |= dict(zip(named, found[len(dense) :], strict=True))
        pulled = self._exchange.pull(self._exchange_of(rows), by_table)
        summed = reduce_flat(found[: len(dense)]) if self._exact else found[: len(dense)]
        return [*summed, *(pulled[t] for t in self._row_names)]

    def hessian_vector(self, vector: Sequence[Tensor]) -> list[Tensor]:
        """H v summed over workers, from the kept graph."""
        self.products += 1
        with span("Hessian-vector product"):
            product = torch.autograd.grad(
                self._gradient, self._theta, grad_outputs=list(vector), retain_graph=True, materialize_grads=True
            )
        summed = self._summed(product)
        if self._options.damping:
            summed = [h + self._options.damping * v for h, v in zip(summed, vector, strict=True)]
        return summed

    def mixed(self, vector: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """-grad_phi (vector . grad_theta L_train), equal on all workers; and the same by the weights [B]."""
        names, phi = zip(*self._perceptron.named_parameters(), strict=True)
        slope = None
        if self._perceptron.options.item_gradient:
            along = torch.stack([(g * v).sum() for g, v in zip(self._gradient, vector, strict=True)]).sum()
        else:
            # d/dw_j of (vector . gradient) is how much behaviour j's loss changes along the vector.
            with span("mixed: by weight"):
                (slope,) = torch.autograd.grad(self._gradient, [self._leaf], grad_outputs=list(vector))
            along = (self._weights * slope).sum()
        with span("mixed: perceptron"):
            by_phi = torch.autograd.grad(along, phi, materialize_grads=True)
        summed = reduce_flat(list(by_phi))
        by_behaviour = -slope.detach() / self._local_factor if slope is not None else None
        return {n: -g / self._local_factor for n, g in zip(names, summed, strict=True)}, by_behaviour

    def dot(self, one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
        """The inner product over the global theta: a row that several workers hold counts once."""
        products = [a.detach() * b.detach() for a, b in zip(one, other, strict=True)]
        dense, rows = products[: len(self._dense_names)], products[len(self._dense_names) :]
        whole = sum((p.sum() for p in dense), one[0].new_zeros(()))
        shared = one[0].new_zeros(())
        for p, copies in zip(rows, self._copies, strict=True):
            shared = shared + (p / copies if copies is not None else p).sum()
        return whole + (sum_over_workers(shared) if self._exact else shared)

    def scale(self) -> list[Tensor]:
        """The diagonal preconditioner P of `precondition=block`, one tensor a block (a dense layer, a table's rows).

        A row's curvature in a batch mean is its share of the batch times that of one example: rows are scaled by
        S = 1 / share first, dense layers by S = 1. Then P = S / c with the block's own curvature
        c = |sqrt(S) H sqrt(S) u| / |u|, along the train gradient u with every block at unit length, so that the
        coupling between blocks counts in c. One more Hessian-vector product.
        """
        weight = self._train.weight * (self._local_factor / self._train.global_rows)
        shares = self._rows.counts(weight, self._train.histories)
        if self._exact:
            summed = self._exchange.sum_copies({t: s.unsqueeze(1) for t, s in shares.items()})
            shares = {t: s.squeeze(1) for t, s in summed.items()}
        roots = [torch.ones_like(x) for x in self._theta[: len(self._dense_names)]]
        floor = 1.0 / self._train.global_rows
        roots += [shares[t].clamp(min=floor).rsqrt().unsqueeze(1).to(self._dtype) for t in self._row_names]
        gradient = self._summed([g.detach() for g in self._gradient])
        unit = [g / self._block_norm(i, g) for i, g in enumerate(gradient)]
        product = self.hessian_vector([r * u for r, u in zip(roots, unit, strict=True)])
        return [r * r / self._block_norm(i, r * h) for i, (r, h) in enumerate(zip(roots, product, strict=True))]

    def _block_norm(self, index: int, block: Tensor) -> Tensor:
        """The norm of one block over the global theta, at least 1e-12."""
        square = block.detach().square()
        if index >= len(self._dense_names):
            copies = self._copies[index - len(self._dense_names)]
            square = (square if copies is None else square / copies).sum()
            square = sum_over_workers(square) if self._exact else square
        return square.sum().sqrt().clamp(min=1e-12)

    def _summed(self, vector: Sequence[Tensor]) -> list[Tensor]:
        if not self._exact:
            return list(vector)
        split = len(self._dense_names)
        rows = {t: torch.zeros_like(r) for t, r in self._rows.rows.items()}
        rows |= dict(zip(self._row_names, vector[split:], strict=True))
        exchanged = self._exchange.sum_copies(rows)
        return [*reduce_flat(list(vector[:split])), *(exchanged[t] for t in self._row_names)]

    def _call(self, embedded: Mapping[str, Tensor], batch: Labels) -> Output:
        return functional_call(self._model, self._dense, (embedded, batch))

    def _exchange_of(self, rows: ResidentRows) -> RowExchange:
        return RowExchange(
            rows.unique, {t: self._tables.rows_per_worker(t) for t in rows.unique}, alone=not self._exact
        )


def _tables_of(theta: Sequence[str], known: list[str]) -> list[str]:
    for name in theta:
        if name not in (DENSE, ALL_TABLES, *known):
            raise UserError(f"hypergradient.theta: '{name}' is neither dense, tables nor one of {', '.join(known)}")
    return known if ALL_TABLES in theta else [t for t in known if t in theta]
