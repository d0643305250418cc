"""Embedding tables sharded by row over the workers, with the optimiser fused into the backward pass.

A lookup that trains (`rows`) writes its tables during *any* backward pass through it, so nothing may
differentiate twice through it; what only needs values uses `read`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import WeightDecayMode
from torch import Tensor, nn
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cdr_dist.embeddings.initialisation import normal_rows
from cdr_dist.embeddings.options import TableOptions, TableSpec
from cdr_dist.embeddings.workers import world_size
from cdr_dist.errors import UserError

_OPTIMISERS: dict[str, type[torch.optim.Optimizer]] = {
    "rowwise_adagrad": RowWiseAdagrad,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
}


class _Holder(nn.Module):
    """The planner takes a module that contains the collection."""

    def __init__(self, collection: EmbeddingCollection) -> None:
        super().__init__()
        self.tables = collection


class ShardedTables:
    """The tables of a model over all workers. Every worker makes the same calls in the same order."""

    def __init__(self, specs: list[TableSpec], options: TableOptions, seed: int, device: torch.device) -> None:
        if options.optimiser == "adam" and device.type == "cpu":
            raise UserError("tables.optimiser=adam: FBGEMM has no Adam on CPU; use rowwise_adagrad, adagrad or sgd")
        self.specs = {spec.name: spec for spec in specs}
        self.device = device
        # Losses are divided by the global batch size, so gradients are summed over workers, not averaged.
        comm_ops.set_gradient_division(False)
        self.collection = _shard(specs, options, device)
        self._initialise(seed)

    def rows(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Looks up int64 ids [n] of each table -> rows [n, width], and trains them in the backward pass."""
        return self._lookup(ids)

    @torch.no_grad()
    def read(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Like `rows`, values only: trains nothing and builds no graph."""
        return {name: rows.detach() for name, rows in self._lookup(ids).items()}

    def rows_per_worker(self, table: str) -> int:
        """The owner of an id is worker id // rows_per_worker."""
        return -(-self.specs[table].padded_rows // world_size())

    def shards(self) -> dict[str, tuple[int, Tensor]]:
        """Table -> (first global row, this worker's rows); writing into the tensor writes the table."""
        out = {}
        for path, tensor in self.collection.state_dict().items():
            (shard,) = tensor.local_shards()
            out[path.split(".")[1]] = (int(shard.metadata.shard_offsets[0]), shard.tensor)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Sharded weights and fused optimiser state, for torch.distributed.checkpoint."""
        return {
            "weights": self.collection.state_dict(),
            "optimiser": {
                table: dict(values) for table, values in self.collection.fused_optimizer.state_dict()["state"].items()
            },
        }

    def unsharded(self, table: str) -> Tensor | None:
        """The whole table without padding rows, [rows, width] on worker 0 (None elsewhere)."""
        _, shard = self.shards()[table]
        if world_size() == 1:
            return shard[: self.specs[table].rows].detach().cpu()
        block = self.rows_per_worker(table)
        padded = torch.zeros(block, shard.shape[1], dtype=shard.dtype)
        padded[: shard.shape[0]] = shard.cpu()
        parts = [torch.empty_like(padded) for _ in range(world_size())] if dist.get_rank() == 0 else None
        dist.gather(padded, parts)
        return torch.cat(parts)[: self.specs[table].rows] if parts is not None else None

    def _lookup(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        empty = torch.zeros(1, dtype=torch.int64, device=self.device)
        # A worker that asks for nothing would crash the exchange of its peers: it asks for the padding row.
        asked = {name: ids.get(name, empty) if name in ids and ids[name].numel() else empty for name in self.specs}
        features = KeyedJaggedTensor(
            keys=list(asked),
            values=torch.cat(list(asked.values())),
            lengths=torch.tensor([v.numel() for v in asked.values()], dtype=torch.int32, device=self.device),
        )
        found = self.collection(features)
        return {name: found[name].values()[: ids[name].numel()] * (ids[name] != 0).unsqueeze(1) for name in ids}

    def _initialise(self, seed: int) -> None:
        for name, (first, shard) in self.shards().items():
            spec = self.specs[name]
            shard.copy_(normal_rows(seed, f"table.{name}", first, shard.shape[0], spec.width, spec.init_std))


def _shard(specs: list[TableSpec], options: TableOptions, device: torch.device) -> ShardedEmbeddingCollection:
    collection = EmbeddingCollection(
        tables=[
            EmbeddingConfig(name=s.name, num_embeddings=s.padded_rows, embedding_dim=s.width, feature_names=[s.name])
            for s in specs
        ],
        device=torch.device("meta"),
    )
    # A dictionary of its own for each call: apply_optimizer_in_backward changes it.
    apply_optimizer_in_backward(_OPTIMISERS[options.optimiser], collection.parameters(), _fused(options))
    sharder = EmbeddingCollectionSharder()
    plan = plan_tables(_Holder(collection), [s.name for s in specs], world_size(), device)
    module_plan = plan.plan["tables"]
    group = dist.group.WORLD
    return sharder.shard(collection, module_plan, ShardingEnv.from_process_group(group), device=device)


def _fused(options: TableOptions) -> dict[str, Any]:
    """What the fused optimiser takes. FBGEMM ignores a weight decay that comes without its mode."""
    decay = {"weight_decay": options.weight_decay, "weight_decay_mode": WeightDecayMode.DECOUPLE}
    return {"lr": options.lr} | (decay if options.weight_decay else {})


def plan_tables(holder: nn.Module, names: list[str], workers: int, device: torch.device) -> Any:
    """The planner's row-wise plan. Every worker computes it: inside a collective one failure would hang the rest."""
    constraints = {name: ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"]) for name in names}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
    topology = Topology(world_size=workers, local_world_size=min(local, workers), compute_device=device.type)
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints)
    try:
        return planner.plan(holder, [EmbeddingCollectionSharder()])
    except PlannerError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the tables do not fit on {workers} workers: {reason}") from error
