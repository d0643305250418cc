"""Scores of a split over all workers, and their metrics."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cdr_dist.data.stream import Rows
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import Predictions, ScoredRows

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


@torch.no_grad()
def score_split(session: Session, split: str) -> ScoredRows:
    """Every row of a split with its stored negatives, scored by the current parameters; equal on all workers."""
    session.model.eval()
    predictions = Predictions()
    for rows in session.evaluation_stream(split).epoch():
        batch = evaluation_batch(session, rows)
        found = session.tables.read(ids_by_table(batch.train, session.features))
        output = session.model(rows_by_feature(found, batch.train, session.features), batch)
        predictions.append(batch.user, batch.label, output.target_logit, batch.weight, batch.example)
    session.model.train()
    return predictions.gather()


def evaluation_batch(session: Session, rows: Rows):
    return session.builder.evaluate(rows.table, rows.global_rows).to(session.device)


def evaluate(session: Session, split: str, scores: Path | None = None) -> dict[str, float]:
    """The metrics of a split; HR@K and NDCG@K for evaluation.ks where negatives are stored.

    `scores`: worker 0 writes every row there (Parquet: user, example, label, score).
    """
    rows = score_split(session, split)
    if scores is not None and session.rank == 0:
        columns = {"user": rows.user, "example": rows.group, "label": rows.label, "score": rows.score}
        pq.write_table(pa.table(columns), scores)
    try:
        return rows.compute(ks=tuple(session.config.evaluation.ks))
    except ValueError as error:
        raise UserError(f"{split}: {error}") from error
