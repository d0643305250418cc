"""Scores of many rows with many target items: what a backbone can compute once a row and once an item, if it says so.

A backbone with a method `pair_scorer()` that returns a `PairScorer` is scored with it, any other one row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from cdr_dist.data.candidates import Candidates
from cdr_dist.data.feature_names import of_history, of_target_item
from cdr_dist.data.histories import History
from cdr_dist.models.protocol import Backbone, Labels


class PairScorer(Protocol):
    """Of a backbone with its present parameters, without gradient."""

    def row_part(self, embedded: Mapping[str, Tensor], batch: Labels) -> Tensor:
        """What a row adds, the target item aside: features of R rows and of their histories -> [R, p]."""
        ...

    def item_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        """Features of the target items (`feature_names.of_target_item`) [I, width] -> [I, q]."""
        ...

    def logits(self, rows: Tensor, items: Tensor) -> Tensor:
        """rows [.., p] and items [.., q] of the same or broadcast leading sizes -> target logits [..]."""
        ...


@runtime_checkable
class ByProduct(PairScorer, Protocol):
    """One whose logits are a matrix product, and so says it: all items are then ranked several times as fast."""

    def matrix(self, rows: Tensor, items: Tensor) -> Tensor:
        """rows [n, p] and items [m, q] -> target logits [n, m], each of one row and one item alone; a new tensor."""
        ...


class DotProduct:
    """A row's vector times an item's: the two functions are a `PairScorer`'s row_part and item_part, p = q.

    What is added for an item (a bias) is the product of one more value with a row's 1.
    """

    def __init__(
        self,
        row_part: Callable[[Mapping[str, Tensor], Labels], Tensor],
        item_part: Callable[[Mapping[str, Tensor]], Tensor],
    ) -> None:
        self.row_part, self.item_part = row_part, item_part

    def logits(self, rows: Tensor, items: Tensor) -> Tensor:
        return (rows * items).sum(-1)

    def matrix(self, rows: Tensor, items: Tensor) -> Tensor:
        return rows @ items.t()


def pair_scorer(model: Backbone) -> PairScorer:
    own = getattr(model, "pair_scorer", None)
    return own() if own is not None else _RowByRow(model)


@dataclass
class _NoLabels:
    label: Tensor
    source_label: Tensor
    histories: Mapping[str, History]
    source_before: Tensor
    source_item: Tensor
    candidates: Mapping[str, Candidates]
    draws: Tensor


class _RowByRow:
    """Any backbone: every pair is a row of a batch. A row's histories travel with it, filled up to the longest."""

    def __init__(self, model: Backbone) -> None:
        self._model = model
        features = list(model.spec().features)
        self._of_item = [f for f in features if of_target_item(f)]
        self._of_row = [f for f in features if not of_target_item(f) and not of_history(f)]
        self._of_history = [f for f in features if of_history(f)]
        self._domains = list(dict.fromkeys(f.partition("_")[0] for f in self._of_history))

    def row_part(self, embedded: Mapping[str, Tensor], batch: Labels) -> Tensor:
        parts = [embedded[f] for f in self._of_row]
        width = parts[0].shape[1]
        padded = {domain: batch.histories[domain].padded() for domain in self._domains}
        longest = max((real.shape[1] for _, real in padded.values()), default=0)
        for domain, (place, real) in padded.items():
            history = batch.histories[domain]
            copies = len(parts[0]) // len(history)
            parts.append(history.lengths.to(parts[0].dtype).unsqueeze(1).repeat_interleave(copies, 0))
            place = place.masked_fill(~real, len(history.item))
            place = functional.pad(place, (0, longest - place.shape[1]), value=len(history.item))
            for f in self._of_history:
                if f.startswith(domain):
                    filled = functional.pad(embedded[f], (0, 0, 0, 1))
                    rows = filled.index_select(0, place.flatten()).view(len(history), longest * width)
                    parts.append(rows.repeat_interleave(copies, 0))
        return torch.cat(parts, dim=1)

    def item_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([embedded[f] for f in self._of_item], dim=1)

    def logits(self, rows: Tensor, items: Tensor) -> Tensor:
        sizes = torch.broadcast_shapes(rows.shape[:-1], items.shape[:-1])
        width = items.shape[-1] // len(self._of_item)
        flat_rows, flat_items = (x.expand(*sizes, x.shape[-1]).reshape(-1, x.shape[-1]) for x in (rows, items))
        parts: dict[str, Any] = dict(zip(self._of_item, flat_items.split(width, dim=1), strict=True))
        parts |= {f: flat_rows[:, i * width : (i + 1) * width] for i, f in enumerate(self._of_row)}
        histories = self._histories(flat_rows[:, len(self._of_row) * width :], width, parts)
        none = torch.zeros(sizes.numel(), device=rows.device)
        labels = _NoLabels(none, none, histories, none.long(), none.long(), {}, none.new_zeros(len(none), 0))
        return self._model(parts, labels).target_logit.view(sizes)

    def _histories(self, rest: Tensor, width: int, parts: dict[str, Any]) -> dict[str, History]:
        """Puts the histories' rows into `parts`; each position is an item of its own."""
        found: dict[str, History] = {}
        longest = (rest.shape[1] - len(self._domains)) // (width * max(len(self._of_history), 1))
        for domain in self._domains:
            lengths, rest = rest[:, 0].long(), rest[:, 1:]
            real = torch.arange(longest, device=rest.device) < lengths.unsqueeze(1)
            for f in self._of_history:
                if f.startswith(domain):
                    block, rest = rest.tensor_split([longest * width], dim=1)
                    parts[f] = block.reshape(-1, longest, width)[real]
            each = torch.arange(int(lengths.sum()), device=rest.device)
            found[domain] = History(each, each, each, lengths)
        return found
