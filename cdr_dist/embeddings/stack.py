"""What a batch asks of the workers that own its rows: one message for all tables, each distinct row once.

Every worker stacks its shards of all tables, which have one width: a row is then a number, and a batch's rows are
sorted, sent and picked together, whatever table they are of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdr_dist.compiled import compiled
from cdr_dist.embeddings.features import SideBySide
from cdr_dist.embeddings.workers import exchange, rank, world_size


class Stack:
    """names: the tables in the order in which they are stacked; rows: of each that a worker holds (the last
    one may hold fewer).

    Row i of table t is number owner x total + first[t] + (i - owner x rows[t]); its owner is worker i // rows[t].
    """

    def __init__(self, names: Sequence[str], rows: Sequence[int], device: torch.device) -> None:
        self.number = {name: i for i, name in enumerate(names)}
        self.rows = torch.tensor(list(rows), device=device)
        self.total = sum(rows)
        self.first = self.rows.cumsum(0) - self.rows

    def numbers(self, ids: Tensor, tables: Sequence[str]) -> Tensor:
        """ids [tables, n] -> the numbers of their rows."""
        which = torch.tensor([self.number[t] for t in tables], device=ids.device)
        rows, first = self.rows[which].unsqueeze(1), self.first[which].unsqueeze(1)
        owner = torch.div(ids, rows, rounding_mode="floor")
        return ids + owner * (self.total - rows) + first

    def table(self, local: Tensor) -> Tensor:
        """Places in a worker's stack [m] -> the number of each one's table."""
        return torch.bucketize(local, self.first[1:], right=True)


class Asked:
    """The rows that this worker's ids ask for, and what others ask of this worker. All workers make one together.

    ids: table -> int64 [n]; all workers name the same tables. `local` [m]: places in this worker's stack that others,
    and itself, ask for, worker by worker.
    """

    def __init__(self, ids: Mapping[str, Tensor], stack: Stack) -> None:
        self._tables = [t for t in stack.number if t in ids]
        self._sizes = [len(ids[t]) for t in self._tables]
        self._even = len(set(self._sizes)) == 1
        if self._even:
            numbers = stack.numbers(torch.stack([ids[t] for t in self._tables]), self._tables).flatten()
        else:
            parts = [stack.numbers(ids[t].unsqueeze(0), [t]).squeeze(0) for t in self._tables]
            numbers = torch.cat(parts)
        distinct, place = torch.unique(numbers, return_inverse=True)
        # Side by side, row by row, where every table has as many: what a model reads, then.
        self._picked = place.view(len(self._tables), -1).T.flatten() if self._even else place
        edges = stack.total * torch.arange(world_size() + 1, device=distinct.device)
        sent = torch.searchsorted(distinct, edges).diff()
        came = exchange(sent, [1] * world_size(), [1] * world_size())
        self._sent, self._came = sent.tolist(), came.tolist()
        self.local = self.to_owners(distinct) - rank() * stack.total

    def to_owners(self, values: Tensor) -> Tensor:
        """Of the distinct rows of this worker's ids [u, ..] -> of what is asked of it [m, ..]."""
        return exchange(values, self._sent, self._came)

    def to_askers(self, values: Tensor) -> Tensor:
        """The way back of `to_owners`."""
        return exchange(values, self._came, self._sent)

    def spread(self, values: Tensor) -> Tensor:
        """Of the distinct rows [u, width] -> of all ids [N, width]."""
        return values.index_select(0, self._picked)

    def gathered(self, values: Tensor) -> Tensor:
        """The other way: sums over the ids of each distinct row."""
        return values.new_zeros(sum(self._sent), values.shape[1]).index_add_(0, self._picked, values.contiguous())

    def by_table(self, values: Tensor) -> dict[str, Tensor]:
        """Of all ids, as `spread` gives them -> table -> [n, width]."""
        if self._even:
            return SideBySide.of(values.view(self._sizes[0], len(self._tables) * values.shape[1]), self._tables)
        return dict(zip(self._tables, values.split(self._sizes), strict=True))


@dataclass(frozen=True)
class Bags:
    """Rows as FBGEMM's bags of one id or none, `longest` of each table: ids and offsets [tables x longest + 1].

    side_by_side, in_order: where each asked row stands in the result, of the pooled kernel (flattened to rows), and of
    the other one (its last row + 1: padding).
    """

    ids: Tensor
    offsets: Tensor
    side_by_side: Tensor
    in_order: Tensor


def bags(local: Tensor, stack: Stack) -> Bags:
    """local: places in this worker's stack [m]. Global row 0 of a table, padding, is an empty bag: zero, and trains
    nothing."""
    padded = rank() == 0
    if local.device.type != "cpu":
        return _bags_on_device(local, stack, padded)
    return Bags(*map(torch.from_numpy, _bags_in_loops(local.numpy(), stack.first.numpy(), padded)))


def _bags_on_device(local: Tensor, stack: Stack, padded: bool) -> Bags:
    table = stack.table(local)
    within = local - stack.first[table]
    order = table.argsort(stable=True)
    counts = torch.bincount(table, minlength=len(stack.first))
    slot = torch.empty_like(local)
    slot[order] = torch.arange(len(local), device=local.device) - (counts.cumsum(0) - counts)[table[order]]
    longest = int(counts.max())
    bag = table * longest + slot
    filled = (within != 0) | (not padded)
    offsets = local.new_zeros(len(counts) * longest + 1)
    offsets[1:].index_copy_(0, bag, filled.to(offsets.dtype)).cumsum_(0)
    in_order = torch.where(filled, offsets[bag], offsets[-1])
    return Bags(within[order][filled[order]], offsets, slot * len(counts) + table, in_order)


@compiled()
def _bags_in_loops(local: Any, first: Any, padded: Any) -> Any:
    tables, m = len(first), len(local)
    table, slot, counts = np.empty(m, np.int64), np.empty(m, np.int64), np.zeros(tables, np.int64)
    for i in range(m):
        t = tables - 1
        while local[i] < first[t]:
            t -= 1
        table[i], slot[i] = t, counts[t]
        counts[t] += 1
    longest = counts.max()
    offsets = np.zeros(tables * longest + 1, np.int64)
    for i in range(m):
        if not (padded and local[i] == first[table[i]]):
            offsets[table[i] * longest + slot[i] + 1] = 1
    for bag in range(tables * longest):
        offsets[bag + 1] += offsets[bag]
    ids, in_order = np.empty(offsets[-1], np.int64), np.empty(m, np.int64)
    for i in range(m):
        t = table[i]
        bag = t * longest + slot[i]
        in_order[i] = offsets[bag] if offsets[bag + 1] > offsets[bag] else offsets[-1]
        if in_order[i] < len(ids):
            ids[in_order[i]] = local[i] - first[t]
        slot[i] = slot[i] * tables + t
    return ids, offsets, slot, in_order
