"""The reference's random problem in the product's own types: sharded tables, modules, each worker's part of a batch."""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import HISTORIES, BehaviouralPerceptron
from cdr_dist.data.batch import Batch
from cdr_dist.data.histories import History
from cdr_dist.data.lists import Lists
from cdr_dist.embeddings.options import TableOptions, TableSpec
from cdr_dist.embeddings.tables import ShardedTables
from cdr_dist.models.conet import CoNet
from tests import reference

TRAIN = {
    "user": "user",
    "target_item": "item",
    "target_category": "category",
    "source_item": "source_item",
    "source_category": "source_category",
}


def consistent(problem):
    """Gives every item one category, as a dataset does."""
    for batch in problem.batches:
        for domain, item, category in (("target", "item", "category"), ("source", "source_item", "source_category")):
            rows = problem.tables[f"{domain}_category"].shape[0]
            batch[category] = batch[item] % rows
            batch[f"{domain}_history_category"] = [[i % rows for i in row] for row in batch[f"{domain}_history_item"]]
    return problem


def make(**options):
    """A random problem whose tables hold float32 values, as sharded tables do."""
    problem = consistent(reference.random_problem(**options))
    with torch.no_grad():
        for table in problem.tables.values():
            table.copy_(table.float())
    return problem


def history(items, categories=None):
    """A batch's histories of one domain from lists of items, and of their categories (0 unless given)."""
    flat = [int(i) for row in items for i in row]
    of_item = np.zeros(max(flat, default=0) + 1, dtype=np.int32)
    if categories is not None:
        of_item[flat] = [int(c) for row in categories for c in row]
    lists = Lists.jagged(np.array(flat, dtype=np.int64), np.array([len(row) for row in items], dtype=np.int64))
    return History.of_steps(lists, [len(items)], max(len(flat), 1), of_item)[0]


def part_of(batch, rank, workers):
    """This worker's contiguous share of the reference's global batch; global_rows counts the real rows."""
    size = len(batch["user"])
    rows = slice(rank * size // workers, (rank + 1) * size // workers)
    ids = [batch[key][rows] for key in TRAIN.values()]
    return Batch(
        train=KeyedJaggedTensor(
            keys=list(TRAIN), values=torch.cat(ids), lengths=torch.ones(5 * len(ids[0]), dtype=torch.int32)
        ),
        histories={d: history(*(batch[f"{d}_history_{p}"][rows] for p in ("item", "category"))) for d in HISTORIES},
        label=batch["label"][rows],
        source_label=batch["source_label"][rows],
        source_valid=batch["source_valid"][rows],
        source_before=torch.zeros_like(batch["user"][rows]),
        source_item=batch["source_item"][rows],
        weight=batch["weight"][rows],
        user=batch["user"][rows],
        example=torch.arange(size)[rows],
        global_rows=int(batch["weight"].sum()),
    )


def sharded(problem, **options):
    specs = [TableSpec(n, t.shape[0], t.shape[1], 0.1) for n, t in problem.tables.items()]
    width = next(iter(problem.tables.values())).shape[1]
    tables = ShardedTables(specs, TableOptions(width=width, **options), seed=1, device=torch.device("cpu"))
    for name, (first, shard) in tables.shards().items():
        values = problem.tables[name].detach().float()[first : first + len(shard)]
        shard[: len(values)] = values
    return tables


def modules(problem, dtype=torch.float64, **options):
    """(CoNet, perceptron, extra head) with the problem's parameters."""
    width = next(iter(problem.tables.values())).shape[1]
    hidden = [
        problem.dense[f"target_tower.{h}.weight"].shape[0]
        for h in range(100)
        if f"target_tower.{h}.weight" in problem.dense
    ]
    model = CoNet(width, hidden).to(dtype)
    model.load_state_dict({n: p.detach() for n, p in problem.dense.items()})
    local = [
        problem.phi[f"local_mlp.{i}.weight"].shape[0] for i in range(100) if f"local_mlp.{i}.weight" in problem.phi
    ]
    perceptron = BehaviouralPerceptron(
        width, PerceptronOptions(heads=problem.heads, local_hidden=local[:-1], **options)
    ).to(dtype)
    phi = {n: p.detach() for n, p in problem.phi.items()}
    for name in [n for n in phi if ".key." in n]:
        phi[name] = phi[name][:, : 2 * width]
    perceptron.load_state_dict({n: phi[n] for n in perceptron.state_dict()})
    head = torch.nn.Linear(hidden[-1], 1).to(dtype)
    head.load_state_dict({n: p.detach() for n, p in problem.dev_head.items()})
    return model, perceptron, head


@contextlib.contextmanager
def replaced(holder, name, value):
    """Breaks one thing for the length of a block: the mutations that the laws' tests must catch."""
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)
