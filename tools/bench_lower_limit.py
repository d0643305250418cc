"""What the machine's kernels allow: our lower step against a bare loop over FBGEMM's tables, for one process only."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from tools.bench_case import Build, Case
from tools.bench_flops import lower_flops
from tools.bench_lower import loss_of, lower_training


def cases(quick: bool, data: str) -> dict[str, Build]:
    sizes = [(32, 8, 1.0)] if quick else [(64, 12, 1 / 2.6), (1024, 64, 1 / 1.4)]
    return {f"batch {b} width {w}": partial(case, quick, b, w, target) for b, w, target in sizes}


def case(quick: bool, batch: int, width: int, target: float, held: ExitStack) -> Case:
    training = lower_training(quick, batch, width, held)
    bare = Bare(training.session)
    flops = lower_flops(training.session)
    return Case(target, partial(training.steps, 1), bare.step, unit="step", flops=flops)


class Bare:
    """The same model and batches over fused tables with the same values: bags of one id."""

    def __init__(self, session: Any) -> None:
        features = dict(session.features)
        values = session.tables.shards()
        assert sorted(features.values()) == sorted(values), "a table a feature"
        self.features, self.width = list(features), session.config.tables.width
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [(len(values[t][1]), self.width, EmbeddingLocation.HOST, ComputeDevice.CPU) for t in features.values()],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=session.config.tables.lr,
            eps=1e-8,
        )
        for rows, table in zip(self.tables.split_embedding_weights(), features.values(), strict=True):
            rows.copy_(values[table][1])
        self.model = copy.deepcopy(session.model)
        self.adam = torch.optim.Adam(self.model.parameters(), lr=session.config.dense.lr)
        batches = [fed.batch for fed in session.lower.batches]
        self.batches = [(torch.cat([batch.train[f].values() for f in self.features]), batch) for batch in batches]
        self.offsets = torch.arange(len(self.batches[0][0]) + 1)
        self.turn = 0

    def step(self) -> float:
        ids, batch = self.batches[self.turn % len(self.batches)]
        self.turn += 1
        rows = self.tables(ids, self.offsets).split(self.width, 1)
        loss = loss_of(self.model, self.model(dict(zip(self.features, rows, strict=True)), batch), batch)
        loss.backward()
        self.adam.step()
        self.adam.zero_grad()
        return loss.item()
