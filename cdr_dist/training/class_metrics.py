"""How well the classes of a split are told, where a dataset's target items are classes (prepare's classes=)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.keys import Keys
from cdr_dist.embeddings.workers import world_size
from cdr_dist.evaluation.classification import classification, most_likely
from cdr_dist.evaluation.metrics import all_gather_rows
from cdr_dist.models.pairs import PairScorer, pair_scorer
from cdr_dist.training.full_ranking import PAIRS, item_parts
from cdr_dist.training.positives import finite, positives_held

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


@torch.no_grad()
def class_metrics(session: Session, split: str) -> dict[str, float]:
    """`accuracy` and `f1` of the rows with label 1, whose class is that of the highest score among all classes.

    The same on any number of workers. A collective call. UserError: a score that is not finite.
    """
    session.model.eval()
    scorer, (item, class_of) = pair_scorer(session.model), _classes(session)
    parts = torch.cat(list(item_parts(session, scorer, item)))
    found = [torch.empty(0, 2, dtype=torch.int64, device=session.device)]
    for held in positives_held(session, scorer, split, "none"):
        for positives in held:
            predicted = most_likely(finite(_scores(scorer, positives.part, parts)))
            true = torch.from_numpy(class_of[positives.own_item]).to(predicted.device)
            found.append(torch.stack([predicted, true], dim=1))
    session.model.train()
    rows = torch.cat(found)
    if world_size() > 1:
        rows = all_gather_rows(rows)
    predicted, true = rows.cpu().unbind(1)
    return classification(predicted, true, len(item), session.config.evaluation.positive_class)


def _classes(session: Session) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The item id of every class, and the class of every item id (-1 of the reserved ones)."""
    ids = np.arange(FIRST_ID, session.manifest.rows["target_item"])
    number = np.array([int(key) for key in Keys(session.folder, session.manifest, "target_item").of(ids).to_pylist()])
    class_of = np.full(len(ids) + FIRST_ID, -1)
    class_of[ids] = number
    return ids[np.argsort(number)], class_of


def _scores(scorer: PairScorer, rows: Tensor, items: Tensor) -> Tensor:
    """[n, classes], pair by pair: in a product so narrow the bits of equal classes differ by where they stand."""
    step = max(1, PAIRS // len(items))
    return torch.cat([scorer.logits(some[:, None], items) for some in rows.split(step)])
