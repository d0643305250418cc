"""A lower step of CoNet: ours against nn.Embedding, with sparse gradients as a careful user would, and as released."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cdr_dist.data.batch import Batch
from cdr_dist.models.protocol import Output
from tools.bench_case import Build, Case
from tools.bench_data import Shape, written
from tools.bench_flops import lower_flops
from tools.bench_training import Training

BATCHES = 32
WANTED = {"sparse": 1.3, "sparse by hand": 1.0, "dense": 60.0}


def cases(quick: bool, data: str) -> dict[str, Build]:
    return {
        f"batch {batch} width {width}, against {baseline}": partial(case, quick, batch, width, baseline)
        for batch, width in ([(32, 8)] if quick else [(64, 12), (1024, 64)])
        for baseline in WANTED
    }


def case(quick: bool, batch: int, width: int, baseline: str, held: ExitStack) -> Case:
    training = lower_training(quick, batch, width, held)
    plain = Plain(training.session, baseline)
    return Case(
        target=WANTED[baseline],
        ours=partial(training.steps, 1),
        baseline=plain.step,
        unit="step",
        flops=lower_flops(training.session),
        rounds=5 if baseline == "dense" else 25,
    )


def lower_training(quick: bool, batch: int, width: int, held: ExitStack, *more: str) -> Training:
    """Joint training on resident batches; 1M source items, 333k target items, 100k users."""
    sizes = (100, 1000, 333) if quick else (100_000, 1_000_000, 333_000)
    shape = Shape(BATCHES * batch, *sizes, history=0)
    words = ["recipe=joint", f"batch.size={batch}", f"tables.width={width}", *more]
    return Training(held, written(held, shape), words, resident=BATCHES)


def loss_of(model: Any, output: Output, batch: Batch) -> Tensor:
    """What `joint` minimises: gamma0 is 1."""
    target, source = model.losses(output, batch)
    return target.mean() + (batch.source_valid * source).mean()


def as_written(model: Any, embedded: dict[str, Tensor]) -> Output:
    """CoNet with the same parameters, as its equations read."""
    target = torch.cat([embedded[f] for f in ("user", "target_item", "target_category")], dim=1)
    source = torch.cat([embedded[f] for f in ("user", "source_item", "source_category")], dim=1)
    for to_target, to_source, cross in zip(model.target_tower, model.source_tower, model.cross, strict=True):
        target, source = (to_target(target) + cross(source)).relu(), (to_source(source) + cross(target)).relu()
    return Output(model.target_head(target).squeeze(1), model.source_head(source).squeeze(1), target)


class Plain:
    """The same batches and parameters, tables as nn.Embedding; one process, no framework.

    kind: `sparse` with torch's Adagrad, `sparse by hand` with a row-wise one as FBGEMM has, `dense` with Adam.
    """

    def __init__(self, session: Any, kind: str) -> None:
        self.features, self.kind, self.lr = dict(session.features), kind, session.config.tables.lr
        sparse = kind != "dense"
        self.tables = nn.ModuleDict()
        for name, (_, rows) in session.tables.shards().items():
            self.tables[name] = nn.Embedding.from_pretrained(rows.clone(), freeze=False, sparse=sparse, padding_idx=0)
        self.state = {name: torch.zeros(table.num_embeddings) for name, table in self.tables.items()}
        self.model = copy.deepcopy(session.model)
        dense = self.model.parameters() if sparse else [*self.model.parameters(), *self.tables.parameters()]
        self.adam = torch.optim.Adam(dense, lr=session.config.dense.lr)
        self.adagrad = torch.optim.Adagrad(self.tables.parameters(), lr=self.lr, eps=1e-8) if kind == "sparse" else None
        batches = [fed.batch for fed in session.lower.batches]
        self.batches = [({f: batch.train[f].values() for f in self.features}, batch) for batch in batches]
        self.turn = 0

    def step(self) -> float:
        ids, batch = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        embedded = {f: self.tables[t](ids[f]) for f, t in self.features.items()}
        loss = loss_of(self.model, as_written(self.model, embedded), batch)
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        if self.adagrad is not None:
            self.adagrad.step()
            self.adagrad.zero_grad()
        elif self.kind == "sparse by hand":
            self.rowwise_adagrad()
        return loss.item()

    @torch.no_grad()
    def rowwise_adagrad(self) -> None:
        """One statistic a row; only the rows of the batch are touched."""
        for name, table in self.tables.items():
            gradient = table.weight.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            state = self.state[name].index_add_(0, rows, values.square().mean(1))
            rate = -self.lr / (state[rows].sqrt() + 1e-8)
            table.weight.index_add_(0, rows, values * rate.unsqueeze(1))
            table.weight.grad = None
