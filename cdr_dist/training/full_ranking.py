"""Where every positive of a split ranks among all target items, over all workers.

Exact, though most pairs are never scored: as soon as max(ks) items stand above a positive, it adds nothing to any
metric, whatever the rest. Items that score high in general come first, so that this happens early.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.feature_names import of_target_item
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import sum_over_workers, world_size
from cdr_dist.evaluation.metrics import FULL, all_gather_rows, gains_at_ranks
from cdr_dist.models.pairs import ByProduct, PairScorer, pair_scorer
from cdr_dist.training.positives import Positives, finite, positives_held
from cdr_dist.training.product_ranks import ranks_by_product

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

LOOKED_UP = 1 << 16
"""Items whose rows are looked up at a time."""
COLUMNS, PAIRS = 1024, 2048
"""Items between two looks at which positives are settled, and pairs scored at a time: they stay in the cache."""
SAMPLE = 64
"""Rows whose scores decide which items come first."""


@torch.no_grad()
def full_ranking(session: Session, split: str, ks: Sequence[int]) -> dict[str, float]:
    """`full_hr@K`, `full_ndcg@K`, `full_mrr@K`, the same on any number of workers. A collective call.

    A row with label 1 is ranked among all items of the target vocabulary but those that evaluation.full_exclude says,
    with a source behaviour of the user's, a fixed draw; ties count as in `ranking`. UserError: a score that is not
    finite.
    """
    if not ks:
        return {}
    session.model.eval()
    scorer, most = pair_scorer(session.model), max(ks)
    ranked, order = [], None
    for held in positives_held(session, scorer, split, session.config.evaluation.full_exclude):
        order = _by_score(session, scorer, held) if order is None else order
        if isinstance(scorer, ByProduct):
            above, tied = _by_product(session, scorer, held, order, most)
        else:
            above, tied = _by_pairs(session, scorer, held, order, most)
        ranked.append(torch.stack([torch.cat([p.example for p in held]), above, tied], dim=1))
    session.model.train()
    rows = torch.cat(ranked) if ranked else torch.empty(0, 3, dtype=torch.int64, device=session.device)
    if world_size() > 1:
        rows = all_gather_rows(rows)
    _, above, tied = rows.cpu().numpy()[np.argsort(rows[:, 0].cpu().numpy())].T
    return {f"{FULL}{name}": value for name, value in gains_at_ranks(above, tied, ks).items()}


def _by_score(session: Session, scorer: PairScorer, held: Sequence[Positives]) -> NDArray[np.int64]:
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


def _places(session: Session, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of every item id its place in `order`; -1 of what is no item."""
    place = np.full(session.manifest.rows["target_item"], -1)
    place[order] = np.arange(len(order))
    return place


def _by_product(
    session: Session, scorer: ByProduct, held: Sequence[Positives], order: NDArray[np.int64], most: int
) -> tuple[Tensor, Tensor]:
    place = _places(session, order)
    starts = np.cumsum([0, *(len(p.own) for p in held)])
    row = np.concatenate([p.row + start for p, start in zip(held, starts, strict=False)])
    barred = place[np.concatenate([p.item for p in held])]
    column = place[np.concatenate([p.own_item for p in held])]
    part, own = (torch.cat([getattr(p, name) for p in held]) for name in ("part", "own"))
    return ranks_by_product(scorer, part, own, column, (row, barred), lambda: item_parts(session, scorer, order), most)


def _by_pairs(
    session: Session, scorer: PairScorer, held: Sequence[Positives], order: NDArray[np.int64], most: int
) -> tuple[Tensor, Tensor]:
    """Items above and beside every positive, counted until `most` stand above it."""
    place = _places(session, order)
    pairs = [_sorted_by(place[positives.item], positives.row) for positives in held]
    counts = [(torch.zeros_like(p.example), torch.ones_like(p.example)) for p in held]
    first = 0
    for part in item_parts(session, scorer, order):
        for items in part.split(COLUMNS):
            for positives, (above, tied), (column, row) in zip(held, counts, pairs, strict=True):
                a, b = np.searchsorted(column, [first, first + len(items)])
                _count(scorer, positives, above, tied, items, (row[a:b], column[a:b] - first), most)
            first += len(items)
    return torch.cat([above for above, _ in counts]), torch.cat([tied for _, tied in counts])


def _sorted_by(column: NDArray[np.int64], row: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.argsort(column, kind="stable")
    return column[order], row[order]


def _count(
    scorer: PairScorer,
    positives: Positives,
    above: Tensor,
    tied: Tensor,
    items: Tensor,
    barred: tuple[NDArray[np.int64], NDArray[np.int64]],
    most: int,
) -> None:
    """barred: (rows, columns) of pairs that do not count."""
    alive = torch.nonzero(above < most).squeeze(1)
    if not len(alive):
        return
    scores = finite(pair_scores(scorer, positives.part[alive], items))
    now = np.full(len(positives.own), -1)
    now[alive.cpu().numpy()] = np.arange(len(alive))
    row, column = barred
    out = torch.from_numpy(np.stack([now[row], column])[:, now[row] >= 0]).to(scores.device)
    scores[out[0], out[1]] = -torch.inf
    own = positives.own[alive, None]
    above[alive] += (scores > own).sum(1)
    tied[alive] += (scores == own).sum(1)


def pair_scores(scorer: PairScorer, rows: Tensor, items: Tensor) -> Tensor:
    """[n, p] and [m, q] -> logits [n, m]."""
    if isinstance(scorer, ByProduct):
        return scorer.matrix(rows, items)
    found = rows.new_empty(len(rows), len(items))
    for a, b in itertools.product(range(0, len(rows), PAIRS // COLUMNS), range(0, len(items), COLUMNS)):
        some, few = rows[a : a + PAIRS // COLUMNS], items[b : b + COLUMNS]
        found[a : a + len(some), b : b + len(few)] = scorer.logits(some[:, None], few)
    return found
