"""Embedding tables sharded by row over the workers, with the optimiser fused into the backward pass.

TorchRec plans, shards and holds the tables. Lookups go to FBGEMM's kernel directly, as bags of one id (unpooled, as
TorchRec asks, it takes more than twice as long: docs/performance.md), and what other workers own comes in one message
(`stack.py`).

A lookup that trains (`rows`) writes its tables during *any* backward pass through it, so nothing may
differentiate twice through it; what only needs values uses `read`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.distributed import comm_ops
from torchrec.distributed.embedding import EmbeddingCollectionSharder, ShardedEmbeddingCollection
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, PlannerError
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

from cdr_dist.compiled import compiled
from cdr_dist.embeddings.features import SideBySide
from cdr_dist.embeddings.initialisation import normal_rows
from cdr_dist.embeddings.options import TableOptions, TableSpec
from cdr_dist.embeddings.stack import Asked, Stack, bags
from cdr_dist.embeddings.workers import rank, world_size
from cdr_dist.errors import UserError

_OPTIMISERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
}


class _Holder(nn.Module):
    """The planner takes a module that contains the collection."""

    def __init__(self, collection: EmbeddingCollection) -> None:
        super().__init__()
        self.tables = collection


class ShardedTables:
    """The tables of a model over all workers. Every worker makes the same calls in the same order."""

    def __init__(
        self, specs: list[TableSpec], options: TableOptions, seed: int, device: torch.device, memory: int = 0
    ) -> None:
        """memory: bytes that the planner may give a worker's tables; 0: what TorchRec assumes of a machine."""
        if options.optimiser == "adam" and device.type == "cpu":
            raise UserError("tables.optimiser=adam: FBGEMM has no Adam on CPU; use rowwise_adagrad, adagrad or sgd")
        self.specs = {spec.name: spec for spec in specs}
        self.device = device
        # Losses are divided by the global batch size, so gradients are summed over workers, not averaged.
        comm_ops.set_gradient_division(False)
        self.collection = _shard(specs, options, device, memory)
        (self._kernel,) = _kernels(self.collection)
        # The pooled kernel of a CPU is twice as fast and leaves weight decay out without a word.
        self._pooled = not options.weight_decay or device.type != "cpu"
        if self._pooled:
            self._kernel.pooling_mode = PoolingMode.SUM
        self._names: list[str] = self._kernel.table_names
        self._first = {name: rank() * self.rows_per_worker(name) for name in self._names}
        self._firsts = torch.tensor(list(self._first.values()), device=device).unsqueeze(1)
        self._weights = dict(zip(self._names, self._kernel.split_embedding_weights(), strict=True))
        self._graph = torch.zeros((), device=device, requires_grad=True)
        self._stack = Stack(self._names, [self.rows_per_worker(name) for name in self._names], device)
        self._starts = dict(zip(self._names, self._stack.first.tolist(), strict=True))
        self._stacked, self._shift = self._as_one()
        self._initialise(seed)

    def rows(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Looks up int64 ids [n] of each table -> rows [n, width], and trains them in the backward pass."""
        if world_size() == 1:
            return self._own_rows(ids)
        asked = Asked(ids, self._stack)
        return asked.by_table(_FromOwners.apply(asked, *self._trained(asked.local), self._graph))

    @torch.no_grad()
    def read(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Like `rows`, values only: trains nothing and builds no graph."""
        if world_size() == 1:
            return self._own_values(ids)
        asked = Asked(ids, self._stack)
        return asked.by_table(asked.spread(asked.to_askers(self._values(asked.local))))

    @torch.no_grad()
    def read_joined(self, wanted: Sequence[Sequence[tuple[str, Tensor]]]) -> list[Tensor]:
        """Of each list of (table, ids [n]): the rows side by side, [n, tables x width], without gradient."""
        if world_size() == 1 and self.device.type == "cpu":
            return [self._side_by_side(ids) for ids in wanted]
        together: dict[str, list[Tensor]] = {}
        for ids in wanted:
            for table, of in ids:
                together.setdefault(table, []).append(of)
        read = self.read({table: torch.cat(parts) for table, parts in together.items()})
        rows = {table: iter(read[table].split([len(of) for of in parts])) for table, parts in together.items()}
        return [torch.cat([next(rows[table]) for table, _ in ids], dim=1) for ids in wanted]

    def rows_per_worker(self, table: str) -> int:
        """The owner of an id is worker id // rows_per_worker."""
        return -(-self.specs[table].padded_rows // world_size())

    def shards(self) -> dict[str, tuple[int, Tensor]]:
        """Table -> (first global row, this worker's rows); writing into the tensor writes the table."""
        return {name: (self._first[name], self._weights[name]) for name in self._names}

    def optimiser_shards(self) -> dict[str, list[Tensor]]:
        """Table -> the fused optimiser's statistics of this worker's rows ([rows] or [rows, width] each), writable."""
        none = self._kernel.optimizer == EmbOptimType.EXACT_SGD  # for which FBGEMM shows memory that nobody wrote
        states = [[] for _ in self._names] if none else self._kernel.split_optimizer_states()
        return dict(zip(self._names, states, strict=True))

    @property
    def updates(self) -> int:
        """Updates so far, which a fused Adam corrects its bias by."""
        return int(self._kernel.iter[0])

    @updates.setter
    def updates(self, count: int) -> None:
        self._kernel.set_optimizer_step(count)

    def blocks(self, table: str, most_bytes: int = 64 << 20) -> Iterator[Tensor]:
        """The rows of a whole table without padding, in order, a block at a time on worker 0; nothing elsewhere.

        Every worker goes through it to its end.
        """
        _, shard = self.shards()[table]
        rows, each = self.specs[table].rows, self.rows_per_worker(table)
        size = max(1, most_bytes // (4 * shard.shape[1]))
        for owner in range(world_size()):
            first = owner * each
            for start in range(first, min(first + each, rows), size):
                stop = min(start + size, first + each, rows)
                if rank() == owner == 0:
                    yield shard[start:stop].detach().cpu()
                elif rank() == owner:
                    dist.send(shard[start - first : stop - first].contiguous(), 0)
                elif rank() == 0:
                    block = shard.new_empty(stop - start, shard.shape[1])
                    dist.recv(block, owner)
                    yield block.cpu()

    def unsharded(self, table: str) -> Tensor | None:
        """The whole table without padding rows, [rows, width] on worker 0 (None elsewhere)."""
        found = list(self.blocks(table))
        return torch.cat(found) if rank() == 0 else None

    def _trained(self, local: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of this worker's stack, looked up to train: the kernel's result, row by row, and where each one is."""
        width = next(iter(self._weights.values())).shape[1]
        if not len(local):
            return self._weights[self._names[0]].new_zeros(0, width), local
        of = bags(local, self._stack)
        out = self._kernel(of.ids, of.offsets)
        if self._pooled:
            return out.view(-1, width), of.side_by_side
        return torch.cat([out, out.new_zeros(1, width)]), of.in_order

    def _values(self, local: Tensor) -> Tensor:
        """Rows of this worker's stack; padding is zero."""
        rows = self._stacked.index_select(0, local + self._shift[self._stack.table(local)])
        if rank() == 0:
            rows.masked_fill_((local.unsqueeze(1) == self._stack.first).any(1, keepdim=True), 0.0)
        return rows

    def _own_rows(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows that this worker holds, as bags of one id; padding is an empty bag, which is zero and trains nothing."""
        longest = max((len(of) for of in ids.values()), default=0)
        if longest == 0:
            return {t: self._weights[t].new_zeros(0, self._weights[t].shape[1]) for t in ids}
        even = all(len(ids.get(name, ())) == longest for name in self._names)
        if even:
            every = torch.stack([ids[name] for name in self._names])
        else:
            every = torch.zeros(len(self._names), longest, dtype=torch.int64, device=self.device)
            for line, name in zip(every, self._names, strict=True):
                if name in ids:
                    line[: len(ids[name])] = ids[name]
        local, offsets = _bags(every, self._firsts)
        out = self._kernel(local, offsets)
        if self._pooled:  # [longest, tables x width]
            if even:
                return SideBySide.of(out, self._names)
            by_table = out.view(longest, len(self._names), -1).unbind(1)
        else:
            taken = every.flatten().nonzero().squeeze(1)
            whole = out.new_zeros(every.numel(), out.shape[1]).index_copy(0, taken, out)
            by_table = whole.view(len(self._names), longest, -1).unbind(0)
        found = {name: rows for name, rows in zip(self._names, by_table, strict=True) if name in ids}
        # A slice of all rows would cost a copy in the backward pass.
        return {name: rows if len(ids[name]) == longest else rows[: len(ids[name])] for name, rows in found.items()}

    def _own_values(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of one worker alone, all tables at once."""
        sizes = [len(of) for of in ids.values()]
        if self.device.type == "cpu":
            if len(set(sizes)) == 1:
                return SideBySide.of(self._side_by_side([*ids.items()]), list(ids))
            return {table: self._side_by_side([(table, of)]) for table, of in ids.items()}
        asked = torch.cat(list(ids.values()))
        numbers = asked.clone()
        for table, part in zip(ids, numbers.split(sizes), strict=True):
            part += self._starts[table]
        rows = self._stacked.index_select(0, numbers).masked_fill_((asked == 0).unsqueeze(1), 0.0)
        return dict(zip(ids, rows.split(sizes), strict=True))

    def _side_by_side(self, ids: Sequence[tuple[str, Tensor]]) -> Tensor:
        """Tables with ids [n], of one worker alone on CPU -> [n, tables x width]; padding is zero.

        IndexError: an id that the table has no row for.
        """
        width = self._stacked.shape[1]
        joined = torch.empty(len(ids[0][1]), len(ids) * width)
        for column, (table, of) in enumerate(ids):
            first, rows = self._starts[table], len(self._weights[table])
            if not _read_into(*(x.numpy() for x in (self._stacked, of, joined)), first, rows, column * width):
                raise IndexError(f"table {table}: an id beyond its {rows} rows")
        return joined

    def _as_one(self) -> tuple[Tensor, Tensor]:
        """All shards as they lie in memory, and how far from its place in the stack each one begins (the last worker's
        shards may be shorter)."""
        shards = list(self._weights.values())
        width = shards[0].shape[1]
        starts = torch.tensor([of.storage_offset() - shards[0].storage_offset() for of in shards]) // width
        whole = shards[0].as_strided((sum(map(len, shards)), width), (width, 1))
        return whole, starts.to(self.device) - self._stack.first

    def _initialise(self, seed: int) -> None:
        for name, (first, shard) in self.shards().items():
            spec = self.specs[name]
            shard.copy_(normal_rows(seed, f"table.{name}", first, shard.shape[0], spec.width, spec.init_std))


def _bags(every: Tensor, firsts: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [tables, n] and each table's first id here [tables, 1] -> those but 0, counted from the first, and the
    offsets [tables x n + 1] of bags that hold one id or none."""
    offsets = torch.zeros(every.numel() + 1, dtype=torch.int64, device=every.device)
    if every.device.type == "cpu":  # in one go: a small batch pays for every operator
        local = torch.empty(every.numel(), dtype=torch.int64)
        return local[: _bags_at_once(every.numpy(), firsts.numpy(), local.numpy(), offsets.numpy())], offsets
    taken = every != 0
    torch.cumsum(taken.flatten(), 0, out=offsets[1:])
    return (every - firsts)[taken], offsets


@compiled()
def _bags_at_once(every: Any, firsts: Any, local: Any, offsets: Any) -> int:
    found = 0
    for table in range(every.shape[0]):
        for i in range(every.shape[1]):
            if every[table, i] != 0:
                local[found] = every[table, i] - firsts[table, 0]
                found += 1
            offsets[table * every.shape[1] + i + 1] = found
    return found


@compiled()
def _read_into(stacked: Any, ids: Any, joined: Any, first: Any, rows: Any, column: Any) -> bool:
    """Row ids[i] of the table of so many rows that begins at `first` -> row i of `joined` from `column` on; padding is
    zero. False where there is no such row."""
    width = stacked.shape[1]
    for i in range(len(ids)):
        if ids[i] < 0 or ids[i] >= rows:
            return False
        if ids[i] == 0:
            for t in range(width):
                joined[i, column + t] = 0
        else:
            for t in range(width):
                joined[i, column + t] = stacked[first + ids[i], t]
    return True


class _FromOwners(torch.autograd.Function):
    """Looked-up rows from their owners to the workers that asked, one for each id; gradients go back, summed by row.

    rows [r, width], place [m]: what `ShardedTables._trained` gives. `graph` requires a gradient on every worker: one
    that owns nothing of a batch takes part in the way back, too.
    """

    @staticmethod
    def forward(ctx: Any, asked: Asked, rows: Tensor, place: Tensor, graph: Tensor) -> Tensor:
        ctx.asked, ctx.place, ctx.rows = asked, place, len(rows)
        return asked.spread(asked.to_askers(rows.index_select(0, place)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        # A row that nobody asked for is of an empty bag, whose gradient nobody reads.
        back = ctx.asked.to_owners(ctx.asked.gathered(gradient))
        return None, gradient.new_empty(ctx.rows, gradient.shape[1]).index_copy_(0, ctx.place, back), None, None


def _shard(
    specs: list[TableSpec], options: TableOptions, device: torch.device, memory: int
) -> ShardedEmbeddingCollection:
    collection = EmbeddingCollection(
        tables=[
            EmbeddingConfig(name=s.name, num_embeddings=s.padded_rows, embedding_dim=s.width, feature_names=[s.name])
            for s in specs
        ],
        device=torch.device("meta"),
    )
    sharder = EmbeddingCollectionSharder(fused_params=_fused(options))
    plan = plan_tables(_Holder(collection), [s.name for s in specs], world_size(), device, memory)
    module_plan = plan.plan["tables"]
    group = dist.group.WORLD
    return sharder.shard(collection, module_plan, ShardingEnv.from_process_group(group), device=device)


def _fused(options: TableOptions) -> dict[str, Any]:
    """What the fused optimiser takes. FBGEMM ignores a weight decay that comes without its mode."""
    decay = {"weight_decay": options.weight_decay, "weight_decay_mode": WeightDecayMode.DECOUPLE}
    own = {"optimizer": _OPTIMISERS[options.optimiser], "learning_rate": options.lr}
    return own | decay if options.weight_decay else own


def plan_tables(holder: nn.Module, names: list[str], workers: int, device: torch.device, memory: int) -> Any:
    """The planner's row-wise plan. Every worker computes it: inside a collective one failure would hang the rest."""
    constraints = {name: ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"]) for name in names}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", workers))
    cap = {} if not memory else {"ddr_cap" if device.type == "cpu" else "hbm_cap": memory}
    topology = Topology(world_size=workers, local_world_size=min(local, workers), compute_device=device.type, **cap)
    # Whether a worker fits with all that it needs besides is checked elsewhere: the planner keeps nothing back.
    reserved = FixedPercentageStorageReservation(0.0) if memory else None
    planner = EmbeddingShardingPlanner(topology=topology, constraints=constraints, storage_reservation=reserved)
    try:
        return planner.plan(holder, [EmbeddingCollectionSharder()])
    except PlannerError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the tables do not fit on {workers} workers: {reason}") from error


def _kernels(collection: ShardedEmbeddingCollection) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """TorchRec groups tables by width, type and placement, which are one here, so there is one kernel a worker."""
    parts = (part for lookup in collection._lookups for part in lookup.modules())
    return [part for part in parts if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen)]
