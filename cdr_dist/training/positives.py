"""The positives of a split with what they add to their scores, as many rows at a time as memory may hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.data.feature_names import of_history, of_target_item
from cdr_dist.data.stream import Rows
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.models.pairs import ByProduct, PairScorer
from cdr_dist.training.evaluate import evaluation_rows, one_ahead

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

HELD_ROWS = 1 << 16
"""Positives of a worker that are ranked at a time: the items' rows are looked up once for all of these."""
HELD_WITH_HISTORIES = 1 << 12
"""The same of a backbone that reads histories, which a row's part may hold whole; one that is a product holds none."""

_TRAINED = "target_candidates_item"


@dataclass
class Positives:
    """n rows of a step with label 1: their part of the scores [n, p], their own logits and items, their examples [n].

    row, item: pairs that do not count, [m] each: the row's own item, and what its user trained on.
    """

    part: Tensor
    own: Tensor
    own_item: NDArray[np.int64]
    example: Tensor
    row: NDArray[np.int64]
    item: NDArray[np.int64]


def positives_held(session: Session, scorer: PairScorer, split: str, exclude: str) -> Iterator[list[Positives]]:
    """All positives of a split, some steps' at a time; of as many steps on every worker, because lookups are
    collective. exclude: train, or none of the user's other items (`evaluation.full_exclude`).
    """
    more = (_TRAINED,) if exclude == "train" else ()
    wide = any(map(of_history, session.features)) and not isinstance(scorer, ByProduct)
    rows_a_step = max(1, session.config.evaluation.batch_size // session.stored_rows)
    most = -(-(HELD_WITH_HISTORIES if wide else HELD_ROWS) // rows_a_step)
    held: list[Positives] = []
    for rows in one_ahead(evaluation_rows(session, split, more=more)):
        held.append(_positives(session, scorer, rows, bool(more)))
        if len(held) == most:
            yield held
            held = []
    if held:
        yield held


def _positives(session: Session, scorer: PairScorer, rows: Rows, trained: bool) -> Positives:
    batch = session.builder.evaluate(rows.stored, rows.global_rows, negatives=False)
    row, item = np.arange(len(rows.stored)), rows.stored["item"].astype(np.int64)
    if trained:
        seen, lengths = rows.stored.lists(_TRAINED).of(np.arange(len(rows.stored)))
        row = np.concatenate([row, np.repeat(np.arange(len(lengths)), lengths)])
        item = np.concatenate([item, seen.astype(np.int64)])
    kept = (batch.label > 0) & (batch.weight > 0)
    number = np.cumsum(kept.numpy()) - 1
    counts = kept.numpy()[row] if len(row) else np.zeros(0, dtype=bool)
    own_item = item[: len(rows.stored)][kept.numpy()[: len(rows.stored)]]
    batch, kept = batch.to(session.device), kept.to(session.device)
    found = session.tables.read(ids_by_table(batch.train, session.features))
    features = rows_by_feature(found, batch.train, session.features)
    part = scorer.row_part(features, batch)[kept]
    own = scorer.logits(part, scorer.item_part({f: features[f][kept] for f in features if of_target_item(f)}))
    return Positives(part, finite(own), own_item, batch.example[kept], number[row[counts]], item[counts])


def finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise UserError("scores are not finite: the model has diverged")
    return scores
