"""What a run's training rows held: whom and what the model knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.parquet_input import ParquetInput
from cdr_dist.embeddings.workers import sum_over_workers

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


@dataclass(frozen=True)
class Trained:
    """users [users], items [items]: of every id, whether a training row has it. likes [items]: rows with label 1."""

    users: NDArray[np.bool_]
    items: NDArray[np.bool_]
    likes: NDArray[np.float64]

    @classmethod
    def read(cls, session: Session, folder: str) -> Trained:
        """Of the dataset in `folder`, whose ids are the session's, too. A collective call; workers share the shards."""
        manifest, rows = read_manifest(folder), session.manifest.rows
        users = torch.zeros(rows["user"], dtype=torch.float64)
        items, likes = (torch.zeros(rows["target_item"], dtype=torch.float64) for _ in range(2))
        for shard in manifest.shards["train"][session.rank :: session.workers]:
            uri = storage.join(folder, shard.path)
            with storage.naming(uri), storage.open_input(uri) as file:
                for group in ParquetInput(file).iter_batches(columns=["user", "item", "label"]):
                    user, item, label = (torch.from_numpy(c.to_numpy().copy()) for c in group.columns)
                    users += torch.bincount(user, minlength=len(users))
                    items += torch.bincount(item, minlength=len(items))
                    likes += torch.bincount(item, weights=label.double(), minlength=len(likes))
        counts = [sum_over_workers(x).numpy() for x in (users, items, likes)]
        return cls(counts[0] > 0, counts[1] > 0, counts[2])
