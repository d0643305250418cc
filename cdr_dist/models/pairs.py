"""Scores of many rows with many target items: what a backbone can compute once a row and once an item, if it says so.

A backbone with a method `pair_scorer()` that returns a `PairScorer` is scored with it, any other one row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cdr_dist.models.protocol import Backbone

ITEM_FEATURES = ("target_item", "target_category")


class PairScorer(Protocol):
    """Of a backbone with its present parameters, without gradient."""

    def row_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        """What a row adds, the target item aside: features [R, width] -> [R, p]."""
        ...

    def item_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        """ITEM_FEATURES [I, width] -> [I, q]."""
        ...

    def logits(self, rows: Tensor, items: Tensor) -> Tensor:
        """rows [.., p] and items [.., q] of the same or broadcast leading sizes -> target logits [..]."""
        ...


def pair_scorer(model: Backbone) -> PairScorer:
    own = getattr(model, "pair_scorer", None)
    return own() if own is not None else _RowByRow(model)


@dataclass
class _NoLabels:
    label: Tensor
    source_label: Tensor


class _RowByRow:
    """Any backbone: every pair is a row of a batch."""

    def __init__(self, model: Backbone) -> None:
        self._model = model
        features = list(model.spec().features)
        self._of_item = [f for f in features if f in ITEM_FEATURES]
        self._of_row = [f for f in features if f not in ITEM_FEATURES]

    def row_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([embedded[f] for f in self._of_row], dim=1)

    def item_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([embedded[f] for f in self._of_item], dim=1)

    def logits(self, rows: Tensor, items: Tensor) -> Tensor:
        sizes = torch.broadcast_shapes(rows.shape[:-1], items.shape[:-1])
        parts: dict[str, Any] = {}
        for names, values in ((self._of_row, rows), (self._of_item, items)):
            flat = values.expand(*sizes, values.shape[-1]).reshape(-1, values.shape[-1])
            parts |= dict(zip(names, flat.chunk(len(names), dim=1), strict=True))
        none = torch.zeros(sizes.numel(), device=rows.device)
        return self._model(parts, _NoLabels(none, none)).target_logit.view(sizes)
