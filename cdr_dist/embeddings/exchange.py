"""The exact exchange of row vectors between the workers that use a row and the worker that owns it.

Second-order terms are sums over all workers that touched a row. Each worker keeps one copy of every row its batch
uses; `sum_copies` adds the copies at the owner (the worker that stores the row, id // rows_per_worker) and sends the
sum back, so that afterwards all copies agree. The cost depends on the batch, never on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from cdr_dist.embeddings.workers import exchange, rank, world_size


class RowExchange:
    """The exchange for one batch: table -> the ids it uses (int64 [n], sorted, unique) on this worker."""

    def __init__(self, ids: Mapping[str, Tensor], rows_per_worker: Mapping[str, int], alone: bool = False) -> None:
        """`alone`: exchange nothing, each worker keeps to its own rows."""
        self.ids = dict(ids)
        self._world = 1 if alone else world_size()
        if self._world == 1:
            self.asked = self.ids
            return
        # Sorted ids are grouped by owner already: a slice of each table goes to each owner.
        first = torch.arange(self._world, device=next(iter(self.ids.values())).device)
        cuts = torch.stack([torch.searchsorted(own, first * rows_per_worker[t]) for t, own in self.ids.items()], dim=1)
        ends = torch.tensor([[len(own) for own in self.ids.values()]], device=cuts.device)
        sizes = torch.cat([cuts, ends]).diff(dim=0)
        arriving = exchange(sizes, [1] * self._world, [1] * self._world)
        self._sent = dict(zip(self.ids, sizes.T.tolist(), strict=True))
        self._arriving = dict(zip(self.ids, arriving.T.tolist(), strict=True))
        self.asked = {t: found.squeeze(1) for t, found in self.to_owners(_columns(self.ids)).items()}
        """Table -> the ids that all workers ask of this one, an id once for each of them."""

    @cached_property
    def _unique(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Table -> (the sorted unique ids asked of this worker, which of them each one asked is)."""
        return {t: torch.unique(ids, return_inverse=True) for t, ids in self.asked.items()}

    def _owned(self, table: str) -> Tensor:
        return self.ids[table] if self._world == 1 else self._unique[table][0]

    def sum_copies(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """values[table] [n, width], one row an id -> the sum over all workers of the rows with the same id."""
        if self._world == 1:
            return dict(values)
        return self._to_users(self.sum_at_owners(values))

    def pull(self, other: RowExchange, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of another batch's rows, at this batch's ids: aligned by id, 0 where the other has none."""
        theirs = other.sum_at_owners(values)
        aligned = {}
        for table in self.ids:
            mine, ids, rows = self._owned(table), other._owned(table), theirs[table]
            place = torch.searchsorted(ids, mine).clamp(max=max(len(ids) - 1, 0))
            hit = (ids[place] == mine).unsqueeze(1) if len(ids) else mine.new_zeros(len(mine), 1, dtype=torch.bool)
            found = rows[place] if len(ids) else rows.new_zeros(len(mine), rows.shape[1])
            aligned[table] = torch.where(hit, found, rows.new_zeros(()))
        return aligned if self._world == 1 else self._to_users(aligned)

    def copies(self) -> dict[str, Tensor]:
        """float64 [n, 1]: how many workers hold a copy of each row, for sums that count a row once."""
        ones = {t: i.new_ones(len(i), 1, dtype=torch.float64) for t, i in self.ids.items()}
        return self.sum_copies(ones)

    def to_owners(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """values[table] [n, width] of this worker's ids -> of the ids `asked` of it."""
        return _all_to_all(values, self._sent, self._arriving, self._world)

    def to_askers(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """values[table] of the ids `asked` -> [n, width] of this worker's ids; the way back of `to_owners`."""
        return _all_to_all(values, self._arriving, self._sent, self._world)

    def sum_at_owners(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """values[table] [n, width] -> the sums over workers of the rows with the same id, each at its owner alone."""
        if self._world == 1:
            return dict(values)
        sums = {}
        for table, rows in self.to_owners(values).items():
            ids, slot = self._unique[table]
            sums[table] = rows.new_zeros(len(ids), rows.shape[1]).index_add_(0, slot, rows)
        return sums

    def _to_users(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.to_askers({table: rows.index_select(0, self._unique[table][1]) for table, rows in sums.items()})


def _columns(ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {table: of.unsqueeze(1) for table, of in ids.items()}


def _all_to_all(
    values: Mapping[str, Tensor], out: Mapping[str, list[int]], into: Mapping[str, list[int]], world: int
) -> dict[str, Tensor]:
    """One message a peer with the rows of all tables. out/into: table -> rows for/from each worker.

    Rows that stay on this worker are in no message.
    """
    tables, own = list(values), rank()
    others = [w for w in range(world) if w != own]
    widths = {t: values[t].shape[1] for t in tables}
    cut = {t: values[t].split(out[t]) for t in tables}
    message = torch.cat([cut[t][w].reshape(-1) for w in others for t in tables])
    sent, came = (
        [sum(rows[t][w] * widths[t] for t in tables) if w != own else 0 for w in range(world)] for rows in (out, into)
    )
    received = exchange(message, sent, came)
    pieces = iter(received.split([into[t][w] * widths[t] for w in others for t in tables]))
    found: dict[str, list[Tensor]] = {t: [] for t in tables}
    for w in range(world):
        for t in tables:
            found[t].append(cut[t][w] if w == own else next(pieces).view(-1, widths[t]))
    return {t: torch.cat(parts) for t, parts in found.items()}
