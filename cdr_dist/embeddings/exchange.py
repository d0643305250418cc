"""The exact exchange of row vectors between the workers that use a row and the worker that owns it.

Second-order terms are sums over all workers that touched a row. Each worker keeps one copy of every row its batch
uses; `sum_copies` adds the copies at the owner (the worker that stores the row, id // rows_per_worker) and sends the
sum back, so that afterwards all copies agree. The cost depends on the batch, never on the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from cdr_dist.embeddings.workers import world_size


class RowExchange:
    """The exchange for one batch: table -> the ids it uses (int64 [n], sorted, unique) on this worker."""

    def __init__(self, ids: Mapping[str, Tensor], rows_per_worker: Mapping[str, int], alone: bool = False) -> None:
        """`alone`: exchange nothing, each worker keeps to its own rows."""
        self.ids = dict(ids)
        self._world = 1 if alone else world_size()
        if self._world == 1:
            self._owned = self.ids
            return
        # Sorted ids are grouped by owner already: a slice of each table goes to each owner.
        self._sent = {
            table: torch.bincount(own // rows_per_worker[table], minlength=self._world).tolist()
            for table, own in self.ids.items()
        }
        sizes = torch.tensor([[self._sent[t][w] for t in self.ids] for w in range(self._world)])
        arriving = torch.empty_like(sizes)
        dist.all_to_all_single(arriving, sizes)
        self._arriving = {t: arriving[:, i].tolist() for i, t in enumerate(self.ids)}
        came = self._to_owners({t: own.unsqueeze(1) for t, own in self.ids.items()})
        self._owned, self._slot = {}, {}
        for table, keys in came.items():
            self._owned[table], self._slot[table] = torch.unique(keys.squeeze(1), return_inverse=True)

    def sum_copies(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """values[table] [n, width], one row an id -> the sum over all workers of the rows with the same id."""
        if self._world == 1:
            return dict(values)
        return self._to_users(self._sum_at_owners(values), self._slot)

    def pull(self, other: RowExchange, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sums of another batch's rows, at this batch's ids: aligned by id, 0 where the other has none."""
        theirs = other._sum_at_owners(values)
        aligned = {}
        for table, mine in self._owned.items():
            ids, rows = other._owned[table], theirs[table]
            place = torch.searchsorted(ids, mine).clamp(max=max(len(ids) - 1, 0))
            hit = (ids[place] == mine).unsqueeze(1) if len(ids) else torch.zeros(len(mine), 1, dtype=torch.bool)
            found = rows[place] if len(ids) else rows.new_zeros(len(mine), rows.shape[1])
            aligned[table] = torch.where(hit, found, torch.zeros((), dtype=rows.dtype))
        return aligned if self._world == 1 else self._to_users(aligned, self._slot)

    def copies(self) -> dict[str, Tensor]:
        """float64 [n, 1]: how many workers hold a copy of each row, for sums that count a row once."""
        ones = {t: torch.ones(len(i), 1, dtype=torch.float64) for t, i in self.ids.items()}
        return self.sum_copies(ones)

    def _sum_at_owners(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._world == 1:
            return dict(values)
        sums = {}
        for table, rows in self._to_owners(values).items():
            total = rows.new_zeros(len(self._owned[table]), rows.shape[1])
            sums[table] = total.index_add_(0, self._slot[table], rows)
        return sums

    def _to_owners(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _all_to_all(values, self._sent, self._arriving, self._world)

    def _to_users(self, sums: Mapping[str, Tensor], slot: Mapping[str, Tensor]) -> dict[str, Tensor]:
        back = {table: rows.index_select(0, slot[table]) for table, rows in sums.items()}
        return _all_to_all(back, self._arriving, self._sent, self._world)


def _all_to_all(
    values: Mapping[str, Tensor], out: Mapping[str, list[int]], into: Mapping[str, list[int]], world: int
) -> dict[str, Tensor]:
    """One message a peer with the rows of all tables. out/into: table -> rows for/from each worker."""
    tables = list(values)
    widths = {t: values[t].shape[1] for t in tables}
    cut = {t: values[t].split(out[t]) for t in tables}
    message = torch.cat([cut[t][w].reshape(-1) for w in range(world) for t in tables])
    sent = [sum(out[t][w] * widths[t] for t in tables) for w in range(world)]
    came = [sum(into[t][w] * widths[t] for t in tables) for w in range(world)]
    received = message.new_empty(sum(came))
    dist.all_to_all_single(received, message, came, sent)
    pieces = received.split([into[t][w] * widths[t] for w in range(world) for t in tables])
    return {
        t: torch.cat([pieces[w * len(tables) + i].view(-1, widths[t]) for w in range(world)])
        for i, t in enumerate(tables)
    }
