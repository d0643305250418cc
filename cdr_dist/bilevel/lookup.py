"""Rows of a batch as leaves: the second-order part of the project never differentiates through a sharded lookup."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cdr_dist.bilevel.perceptron import HISTORIES, PerceptronInput
from cdr_dist.data.feature_names import is_bag, is_shared, of_history
from cdr_dist.data.histories import History
from cdr_dist.embeddings.features import Features, ids_by_table, rows_by_feature
from cdr_dist.embeddings.tables import ShardedTables


class ResidentRows:
    """The unique rows that a batch's training features use: one leaf a table row, however many features share it.

    `unique` table -> int64 [n] sorted ids; `rows` table -> [n, width] leaf.
    """

    def __init__(self, batch: KeyedJaggedTensor, features: Features) -> None:
        self._batch, self._features = batch, features
        self.occurrences = ids_by_table(batch, features)
        self.unique: dict[str, Tensor] = {}
        self._place: dict[str, Tensor] = {}
        for table, ids in self.occurrences.items():
            self.unique[table], self._place[table] = torch.unique(ids, return_inverse=True)
        self.rows: dict[str, Tensor] = {}

    def read(self, tables: ShardedTables, dtype: torch.dtype) -> ResidentRows:
        """Fetches the rows (float32 tables, cast to `dtype`) and makes them leaves."""
        self.rows = {t: r.to(dtype).requires_grad_() for t, r in tables.read(self.unique).items()}
        return self

    def embedded(self) -> dict[str, Tensor]:
        """Feature -> rows [B, width], differentiable with respect to `rows` any number of times.

        index_select and not rows[place]: the latter's backward pass is not bit-stable with several threads.
        """
        taken = {
            t: self.rows[t].index_select(0, place) * (self.occurrences[t] != 0).unsqueeze(1)
            for t, place in self._place.items()
        }
        return rows_by_feature(taken, self._batch, self._features)

    def counts(self, weight: Tensor, histories: Mapping[str, History]) -> dict[str, Tensor]:
        """Table -> [n]: the summed weights [B] of the examples that use each row, on this worker; a softmax's
        candidates are used by all of them."""
        found = {t: weight.new_zeros(len(ids)) for t, ids in self.unique.items()}
        start = dict.fromkeys(found, 0)
        for feature, size in zip(self._batch.keys(), self._batch.length_per_key(), strict=True):
            table = self._features.get(feature)
            if table is not None:
                if is_shared(feature):
                    of = weight.sum().expand(size)
                else:
                    of = _by_item(histories[feature.partition("_")[0]], weight) if of_history(feature) else weight
                if is_bag(feature):
                    of = of.repeat_interleave(self._batch[feature].lengths().long(), output_size=size)
                found[table].index_add_(0, self._place[table][start[table] : start[table] + size], of)
                start[table] += size
        return found


def _by_item(history: History, weight: Tensor) -> Tensor:
    """The summed weights [B] of the rows in whose history each distinct item stands, once for every time, [U]."""
    of_history = weight.view(len(history), -1).sum(1).repeat_interleave(history.lengths)
    return weight.new_zeros(len(history.item)).index_add_(0, history.position, of_history)


def perceptron_input(
    tables: ShardedTables,
    features: Features,
    histories: Mapping[str, History],
    embedded: Mapping[str, Tensor],
    item_gradient: bool,
) -> PerceptronInput:
    """Looks the histories' unique items up, without gradient, and joins them with the source item of each example."""
    wanted = [
        [(features[f"{d}_{part}"], getattr(histories[d], part)) for part in ("item", "category")] for d in HISTORIES
    ]
    joined = tables.read_joined(wanted)
    item = torch.cat([embedded["source_item"], embedded["source_category"]], dim=1)
    return PerceptronInput(
        item=item if item_gradient else item.detach(),
        history={d: rows.to(item.dtype) for d, rows in zip(HISTORIES, joined, strict=True)},
        position={d: histories[d].position for d in HISTORIES},
        lengths={d: histories[d].lengths for d in HISTORIES},
    )
