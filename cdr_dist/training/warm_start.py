"""The parameters of an earlier run in tables that have grown: ids stay (`data/earlier.py`), new rows come behind.

A new item's row starts at the mean of its category's rows, any other new row at the mean of its table: what the model
knows of something that it has not seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdr_dist.data.dataset import FIRST_ID, read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.feature_names import DOMAINS, vocabulary_of
from cdr_dist.data.item_columns import item_categories
from cdr_dist.embeddings.workers import sum_over_workers
from cdr_dist.training.checkpoint import Checkpoints, best_step
from cdr_dist.training.checks import build_model
from cdr_dist.training.run_folder import RunFolder

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


@torch.no_grad()
def warm_start(
    session: Session, place: RunFolder, new_rows: str = "mean", statistics: bool = False, whole: bool = False
) -> dict[str, int]:
    """Loads the run's best checkpoint -> the rows of each table that are the earlier run's. All workers call it.

    new_rows: mean, or seed: as a run without a past starts. statistics: the fused optimiser's of each row, too. whole:
    the session is of that very run, so that all of its model is read, also what fine-tuning added.
    `start.check_fits` holds. UserError: a damaged checkpoint.
    """
    before = place.config()
    earlier, tables = read_manifest(dataset_of(before.data)), set(build_model(before).spec().tables)
    checkpoints = Checkpoints(place.checkpoints, session, before.trainer.keep)
    try:
        checkpoints.load_grown(checkpoints.of_step(best_step(place)), statistics, whole)
    finally:
        checkpoints.close()
    known = {}
    for table, vocabularies in _vocabularies(session).items():
        if table not in tables:
            continue
        known[table] = max(earlier.rows.get(name, FIRST_ID) for name in vocabularies)
        if new_rows == "mean" and len(vocabularies) == 1:
            _fill_with_means(session, table, next(iter(vocabularies)), known[table])
    if not statistics:
        session.tables.updates = 0
    return known


def _vocabularies(session: Session) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {table: set() for table in session.tables.specs}
    for feature, table in session.features.items():
        found[table].add(vocabulary_of(feature))
    return found


def _fill_with_means(session: Session, table: str, vocabulary: str, known: int) -> None:
    """Rows from `known` on: each gets the mean of the earlier rows of its category, or of all where it has none."""
    first, shard = session.tables.shards()[table]
    group = torch.from_numpy(_groups(session, vocabulary)).long()
    rows = torch.arange(first, first + len(shard))
    old, new = (rows >= FIRST_ID) & (rows < known), (rows >= known) & (rows < len(group))
    groups = int(group.max()) + 1 if len(group) else 1
    sums = shard.new_zeros(groups, shard.shape[1] + 1)
    ones = shard.new_ones(int(old.sum()), 1)
    sums.index_add_(0, group[rows[old]].to(shard.device), torch.cat([shard[old.to(shard.device)], ones], dim=1))
    sums = sum_over_workers(sums)
    overall = _mean(sums.sum(0, keepdim=True), sums.new_zeros(1, shard.shape[1]))
    means = _mean(sums, overall)
    shard[new.to(shard.device)] = means[group[rows[new]].to(shard.device)]


def _mean(sums: Tensor, otherwise: Tensor) -> Tensor:
    """Sums with the count in the last column -> means; rows of count 0 are `otherwise`."""
    count = sums[:, -1:]
    return torch.where(count > 0, sums[:, :-1] / count.clamp(min=1), otherwise)


def _groups(session: Session, vocabulary: str) -> NDArray[np.int32]:
    """Of every id of a vocabulary the group whose mean it may start from: an item's category."""
    domain, _, what = vocabulary.partition("_")
    if domain in DOMAINS and what == "item":
        return item_categories(session.folder, session.manifest, domain)
    return np.zeros(session.manifest.rows[vocabulary], dtype=np.int32)
