"""What a policy does: how much of each block is its fine-tuned copy, over a split's examples (UAF, figure 3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import sum_over_workers
from cdr_dist.training.evaluate import evaluation_rows, one_ahead

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


@torch.no_grad()
def tuned_shares(session: Session, split: str) -> tuple[list[float], list[float]] | None:
    """Of each block mean and standard deviation of the gate over the split's rows; None of a model without gates.

    A deviation of 0: the policy says the same of everybody. A collective call.
    """
    if getattr(session.model, "gates", None) is None:
        return None
    session.model.eval()
    sums: torch.Tensor | None = None
    rows = evaluation_rows(session, split)
    for batch in one_ahead(session.builder.evaluate(r.stored, r.global_rows, negatives=False) for r in rows):
        batch = batch.to(session.device)
        found = session.tables.read(ids_by_table(batch.train, session.features))
        gates = session.model.gates(rows_by_feature(found, batch.train, session.features), batch)
        if gates is None:
            break
        real = batch.weight.unsqueeze(1)
        part = torch.cat([(gates * real).sum(0), (gates * gates * real).sum(0), real.sum(0)]).double()
        sums = part if sums is None else sums + part
    session.model.train()
    if sums is None:
        return None
    sums = sum_over_workers(sums)
    mean, square = (sums[:-1] / sums[-1].clamp(min=1)).chunk(2)
    return mean.tolist(), (square - mean * mean).clamp(min=0).sqrt().tolist()
