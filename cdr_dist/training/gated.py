"""The simple competitor of BIAO: the source loss counts as far as its gradient points where the target's does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cdr_dist.data.batch import Batch
from cdr_dist.embeddings.exchange import RowExchange
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import reduce_flat, sum_over_workers
from cdr_dist.errors import UserError
from cdr_dist.profiling import span
from cdr_dist.training.lower import Lower
from cdr_dist.training.session import Session
from cdr_dist.training.weighting import Uniform

GATES = ("weighted", "sign")


class GatedLower(Lower):
    """Joint training whose source gradient is multiplied by the gate of the cosine between the two gradients.

    gate: weighted, max(0, cosine), or sign, 1 where the cosine is above 0 and else 0 (Du et al., "Adapting auxiliary
    losses using gradient similarity", 2018). The gradients are those of theta in BIAO's eq. 14: all tables' rows and
    the dense parameters but the heads, of the whole batch over all workers. A head is of one domain and takes its own
    gradient whole: else a gate that is shut would never open. Two backward passes a step; they meet the tables as one.
    """

    passes = 2

    def __init__(self, gate: str = "weighted") -> None:
        super().__init__(Uniform())
        if gate not in GATES:
            raise UserError(f"recipe: gate={gate}: choose {' or '.join(GATES)}")
        self._gate = gate

    def bind(self, session: Session) -> None:
        super().bind(session)
        if session.config.batch.accumulate > 1:
            raise UserError("batch.accumulate: this recipe's gate needs the gradients of the whole batch; take 1")
        heads = session.model.heads()
        self._named = [(name, p) for name, p in session.model.named_parameters() if p.requires_grad]
        self._shared = [not name.startswith(heads) for name, _ in self._named]

    def _at_once(self, batch: Batch, rows: Mapping[str, Tensor]) -> list[Tensor]:
        features = self._session.features
        given = {table: of.detach().requires_grad_() for table, of in rows.items()}
        embedded = rows_by_feature(given, batch.train, features)
        total, *losses = self._losses(embedded, batch, self._weights(batch, embedded), batch.global_rows)
        inputs = [p for _, p in self._named] + list(given.values())
        with span("lower backward"):
            target, source = (
                torch.autograd.grad(loss, inputs, retain_graph=loss is losses[0], materialize_grads=True)
                for loss in losses
            )
        ids = ids_by_table(batch.train, features)
        cosine = self._cosine(target, source, {table: ids[table] for table in given})
        share = max(0.0, cosine) if self._gate == "weighted" else float(cosine > 0)
        self.seen = {"gradient_cosine": cosine, "gate": share}
        gates = [share if shared else 1.0 for shared in self._shared] + [share] * len(given)
        whole = [t + gate * s for t, s, gate in zip(target, source, gates, strict=True)]
        with torch.no_grad():
            for (_, p), gradient in zip(self._named, whole, strict=False):
                assert p.grad is not None
                p.grad += gradient
        with span("lower backward"):
            torch.autograd.backward(list(rows.values()), whole[len(self._named) :])
        return [total, losses[0], share * losses[1]]

    @torch.no_grad()
    def _cosine(self, target: Sequence[Tensor], source: Sequence[Tensor], ids: Mapping[str, Tensor]) -> float:
        """Of the two gradients over the whole batch, shared parameters and rows; 0 where one of them is 0.

        Both are of the dense parameters and then of the tables in the order of `ids`.
        """
        n = len(self._named)
        kept = [i for i, shared in enumerate(self._shared) if shared]
        dense = reduce_flat([g[i] for g in (target, source) for i in kept])
        tables = self._session.tables
        unique, pairs = {}, {}
        for table, t, s in zip(ids, target[n:], source[n:], strict=True):
            unique[table], place = torch.unique(ids[table], return_inverse=True)
            both = torch.cat([t, s], dim=1) * (ids[table] != 0).unsqueeze(1)  # padding is zero, and trains nothing
            pairs[table] = both.new_zeros(len(unique[table]), both.shape[1]).index_add_(0, place, both)
        exchange = RowExchange(unique, {table: tables.rows_per_worker(table) for table in unique})
        halves = [of.double().chunk(2, dim=1) for of in exchange.sum_at_owners(pairs).values()]
        products = torch.zeros(3, dtype=torch.float64, device=dense[0].device if dense else None)
        for t, s in halves:
            products += torch.stack([(t * s).sum(), (t * t).sum(), (s * s).sum()])
        products = sum_over_workers(products)
        for t, s in zip(dense[: len(kept)], dense[len(kept) :], strict=True):
            t, s = t.double(), s.double()
            products += torch.stack([(t * s).sum(), (t * t).sum(), (s * s).sum()])
        across, of_target, of_source = products.tolist()
        norms = math.sqrt(of_target * of_source)
        return across / norms if norms else 0.0
