"""Where every positive of a split ranks among all target items, over all workers.

Exact, though most pairs are never scored: as soon as max(ks) items stand above a positive, it adds nothing to any
metric, whatever the rest. Items that score high in general come first, so that this happens early.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.feature_names import of_history, of_target_item
from cdr_dist.data.stream import Rows
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import sum_over_workers, world_size
from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import all_gather_rows, gains_at_ranks
from cdr_dist.models.pairs import PairScorer, pair_scorer
from cdr_dist.training.evaluate import evaluation_rows, one_ahead

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

HELD_ROWS = 1 << 16
"""Positives of a worker that are ranked at a time: the items' rows are looked up once for all of these."""
HELD_WITH_HISTORIES = 1 << 12
"""The same of a backbone that reads histories, which a row's part may hold whole."""
LOOKED_UP = 1 << 16
"""Items whose rows are looked up at a time."""
COLUMNS, PAIRS = 1024, 2048
"""Items between two looks at which positives are settled, and pairs scored at a time: they stay in the cache."""
SAMPLE = 64
"""Rows whose scores decide which items come first."""

_TRAINED = "target_candidates_item"


@torch.no_grad()
def full_ranking(session: Session, split: str, ks: Sequence[int]) -> dict[str, float]:
    """`full_hr@K`, `full_ndcg@K`, `full_mrr@K`, the same on any number of workers. A collective call.

    A row with label 1 is ranked among all items of the target vocabulary but those of its user's training behaviours,
    with a source behaviour of the user's, a fixed draw; ties count as in `ranking`. UserError: a score that is not
    finite.
    """
    if not ks:
        return {}
    session.model.eval()
    scorer, most = pair_scorer(session.model), max(ks)
    steps = _steps(session, split)
    ranked, order = [], None
    while held := _held(session, scorer, steps):
        order = _by_score(session, scorer, held) if order is None else order
        _rank(session, scorer, [positives for positives in held if len(positives.own)], order, most)
        ranked += [torch.stack([p.example, p.above, p.tied], dim=1) for p in held]
    session.model.train()
    rows = torch.cat(ranked) if ranked else torch.empty(0, 3, dtype=torch.int64, device=session.device)
    if world_size() > 1:
        rows = all_gather_rows(rows)
    _, above, tied = rows.cpu().numpy()[np.argsort(rows[:, 0].cpu().numpy())].T
    return {f"full_{name}": value for name, value in gains_at_ranks(above, tied, ks).items()}


@dataclass
class _Positives:
    """n rows of a step with label 1: their part of the scores [n, p], their own logits, and what was found so far.

    row, item: pairs that do not count, [m] each: the row's own item, and what its user trained on.
    """

    part: Tensor
    own: Tensor
    example: Tensor
    row: NDArray[np.int64]
    item: NDArray[np.int64]
    above: Tensor = field(init=False)
    tied: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.above, self.tied = torch.zeros_like(self.example), torch.ones_like(self.example)


def _steps(session: Session, split: str) -> Iterator[Rows]:
    return one_ahead(evaluation_rows(session, split, more=(_TRAINED,)))


def _held(session: Session, scorer: PairScorer, steps: Iterator[Rows]) -> list[_Positives]:
    """The next steps' positives; of as many steps on every worker, because lookups are collective."""
    held: list[_Positives] = []
    most = HELD_WITH_HISTORIES if any(map(of_history, session.features)) else HELD_ROWS
    for rows in steps:
        held.append(_positives(session, scorer, rows))
        if len(held) * session.config.evaluation.batch_size >= most:
            break
    return held


def _positives(session: Session, scorer: PairScorer, rows: Rows) -> _Positives:
    batch = session.builder.evaluate(rows.stored, rows.global_rows, negatives=False)
    trained, lengths = rows.stored.lists(_TRAINED).of(np.arange(len(rows.stored)))
    row = np.concatenate([np.arange(len(lengths)), np.repeat(np.arange(len(lengths)), lengths)])
    item = np.concatenate([rows.stored["item"], trained.astype(np.int64)])
    kept = (batch.label > 0) & (batch.weight > 0)
    number = np.cumsum(kept.numpy()) - 1
    counts = kept.numpy()[row] if len(row) else np.zeros(0, dtype=bool)
    batch, kept = batch.to(session.device), kept.to(session.device)
    found = session.tables.read(ids_by_table(batch.train, session.features))
    features = rows_by_feature(found, batch.train, session.features)
    part = scorer.row_part(features, batch)[kept]
    own = scorer.logits(part, scorer.item_part({f: features[f][kept] for f in features if of_target_item(f)}))
    return _Positives(part, finite(own), batch.example[kept], number[row[counts]], item[counts])


def _by_score(session: Session, scorer: PairScorer, held: Sequence[_Positives]) -> NDArray[np.int64]:
    """All item ids; those that score high with the first rows of the split come first."""
    ids = np.arange(FIRST_ID, session.manifest.rows["target_item"])
    sample = held[0].part[:SAMPLE] if session.rank == 0 else held[0].part[:0]
    scores = torch.cat([pair_scores(scorer, sample, part).sum(0) for part in item_parts(session, scorer, ids)])
    return ids[np.argsort(-sum_over_workers(scores).cpu().numpy(), kind="stable")]


def item_parts(session: Session, scorer: PairScorer, ids: NDArray[np.int64]) -> Iterator[Tensor]:
    """`PairScorer.item_part` of item ids [n], LOOKED_UP at a time. A collective call: as many on every worker."""
    features = {f: table for f, table in session.features.items() if of_target_item(f)}
    for first in range(0, len(ids), LOOKED_UP):
        asked = session.builder.target_items(ids[first : first + LOOKED_UP]).to(session.device)
        found = session.tables.read(ids_by_table(asked, features))
        yield scorer.item_part(rows_by_feature(found, asked, features))


def _rank(
    session: Session, scorer: PairScorer, held: Sequence[_Positives], order: NDArray[np.int64], most: int
) -> None:
    """Counts the items above and beside every positive, until `most` stand above it."""
    place = np.full(session.manifest.rows["target_item"], -1)
    place[order] = np.arange(len(order))
    pairs = [_sorted_by(place[positives.item], positives.row) for positives in held]
    first = 0
    for part in item_parts(session, scorer, order):
        for items in part.split(COLUMNS):
            for positives, (column, row) in zip(held, pairs, strict=True):
                a, b = np.searchsorted(column, [first, first + len(items)])
                _count(scorer, positives, items, row[a:b], column[a:b] - first, most)
            first += len(items)


def _sorted_by(column: NDArray[np.int64], row: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(column, kind="stable")
    return column[order], row[order]


def _count(
    scorer: PairScorer,
    positives: _Positives,
    items: Tensor,
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    most: int,
) -> None:
    """row, column: pairs that do not count."""
    alive = torch.nonzero(positives.above < most).squeeze(1)
    if not len(alive):
        return
    scores = finite(pair_scores(scorer, positives.part[alive], items))
    now = np.full(len(positives.own), -1)
    now[alive.cpu().numpy()] = np.arange(len(alive))
    out = torch.from_numpy(np.stack([now[row], column])[:, now[row] >= 0]).to(scores.device)
    scores[out[0], out[1]] = -torch.inf
    own = positives.own[alive, None]
    positives.above[alive] += (scores > own).sum(1)
    positives.tied[alive] += (scores == own).sum(1)


def pair_scores(scorer: PairScorer, rows: Tensor, items: Tensor) -> Tensor:
    """[n, p] and [m, q] -> logits [n, m]."""
    found = rows.new_empty(len(rows), len(items))
    for a, b in itertools.product(range(0, len(rows), PAIRS // COLUMNS), range(0, len(items), COLUMNS)):
        some, few = rows[a : a + PAIRS // COLUMNS], items[b : b + COLUMNS]
        found[a : a + len(some), b : b + len(few)] = scorer.logits(some[:, None], few)
    return found


def finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise UserError("scores are not finite: the model has diverged")
    return scores
