"""The upper step: the hypergradient over a batch's rows against dense tables, and what a whole step costs."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cdr_dist.bilevel.hypergradient import hypergradient
from cdr_dist.bilevel.lookup import ResidentRows, perceptron_input
from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import PerceptronInput, normalised
from cdr_dist.data.batch import Batch
from tests import reference
from tools.bench_case import Build, Case
from tools.bench_data import Shape, written
from tools.bench_flops import counted_flops
from tools.bench_training import Training

TERMS = 3
WORDS = ["recipe=biao", "upper.dev=reordered", f"hypergradient.terms={TERMS}", "hypergradient.theta=[dense,tables]"]


def cases(quick: bool, data: str) -> dict[str, Build]:
    sizes = [(300, 150.0)] if quick else [(10_000, 1 / 1.15), (100_000, 1.0), (2_000_000, 150.0)]
    series: dict[str, Build] = {f"series, {rows} rows": partial(series_case, quick, rows, t) for rows, t in sizes}
    return series | {f"whole step, {draws} draws": partial(whole_case, quick, draws) for draws in (1, 8)}


def series_case(quick: bool, rows: int, target: float, held: ExitStack) -> Case:
    """The series and its exchange alone: weights are a softmax of free scores. `rows`: of all tables together."""
    training = _training(quick, rows, 0.0, 1, held)
    s = training.session
    train, dev = s.lower.next().batch, s.dev.next().batch
    given = GivenWeights(len(train))
    tables = {name: shard for name, (_, shard) in s.tables.shards().items()}
    dense = {name: p.detach() for name, p in s.model.named_parameters()}
    head = {name: p.detach() for name, p in s.dev_head.named_parameters()}
    ours = partial(hypergradient, s.model, given, s.dev_head, s.tables, train, dev, s.config.hypergradient)
    baseline = partial(
        reference.hypergradient,
        tables,
        dense,
        {"score": given.score},
        as_reference(train),
        as_reference(dev),
        TERMS,
        s.config.hypergradient.alpha,
        head,
        loss=loss_of_scores,
    )
    rounds = 15 if rows < 1_000_000 else 3
    return Case(target, ours, baseline, unit="series", flops=counted_flops(ours), rounds=rounds)


class GivenWeights(nn.Module):
    """Stands for the perceptron: one free score for each behaviour of one batch."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.options, self.gamma = PerceptronOptions(), torch.ones(())
        self.score = nn.Parameter(torch.linspace(-1.0, 1.0, rows))

    def forward(self, seen: PerceptronInput) -> Tensor:
        return self.score

    def weights(self, score: Tensor, valid: Tensor, _global_rows: int) -> Tensor:
        return normalised(score, valid, self.gamma)


def loss_of_scores(tables: Any, dense: Any, phi: Any, batch: dict[str, Tensor]) -> Tensor:
    target, source, _ = reference.conet(tables, dense, batch)
    return reference.train_loss(target, source, batch, phi["score"].softmax(0))


def as_reference(batch: Batch) -> dict[str, Tensor]:
    ids = {name.removeprefix("target_"): batch.train[name].values() for name in batch.train.keys()}
    return ids | {"label": batch.label, "source_label": batch.source_label, "weight": batch.weight}


def whole_case(quick: bool, draws: int, held: ExitStack) -> Case:
    """An upper update against K + 3 times one forward and backward pass of L_train on rows that are there."""
    training = _training(quick, 200 if quick else 100_000, 8.0, draws, held)
    s = training.session
    upper = training.update[False]
    train = upper._train_batch()
    rows = ResidentRows(train.train, s.features).read(s.tables, torch.float32)
    with torch.no_grad():
        seen = perceptron_input(s.tables, s.features, train.histories, rows.embedded(), item_gradient=False)
    parameters = [*rows.rows.values(), *s.model.parameters(), *s.perceptron.parameters()]

    def forward_backward() -> None:
        output = s.model(rows.embedded(), train)
        target, source = s.model.losses(output, train)
        weights = s.perceptron.weights(s.perceptron(seen), train.source_valid, train.global_rows)
        torch.autograd.grad(target.mean() + (weights * source).sum(), parameters)

    ours, units = partial(upper.run, False), (1.0, 1.0 / (TERMS + 3))
    return Case(1 / 1.3, ours, forward_backward, unit="step", units=units, flops=counted_flops(ours), rounds=9)


def _training(quick: bool, rows: int, history: float, draws: int, held: ExitStack) -> Training:
    batch, width = (16, 4) if quick else (1024, 64)
    categories = min(300, rows // 20)
    users = items = (rows - 2 * categories) * 2 // 5
    shape = Shape(2 * batch, users, items, items // 2, history=history, categories=categories)
    words = [*WORDS, f"batch.size={batch}", f"tables.width={width}", f"upper.source_draws={draws}"]
    return Training(held, written(held, shape), words, resident=2)
