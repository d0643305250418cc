"""A step in parts: its rows are looked up once, computed with a part at a time, and trained once.

The tables' fused optimiser makes an update in every backward pass through a lookup, and updates of parts are not the
update of the whole (Adagrad's statistic adds squares). So parts are computed with copies of the rows, whose gradients
are collected, and one backward pass takes them through the lookup. Only one part's activations are held at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cdr_dist.data.batch import Batch
from cdr_dist.data.candidates import Candidates
from cdr_dist.data.feature_names import is_shared, of_history
from cdr_dist.data.histories import History
from cdr_dist.embeddings.features import Features, gradient_by_table, rows_by_feature

_COLUMNS = ("label", "source_label", "weight", "source_before", "source_item")

Weights = Callable[[Mapping[str, Tensor]], Tensor | None]
"""Feature -> rows [B, width] to the weights [B] of all rows, which may couple them."""


@dataclass(frozen=True)
class Part:
    """What a loss needs of some rows of a batch: [b] each, and their histories."""

    label: Tensor
    source_label: Tensor
    weight: Tensor
    histories: Mapping[str, History]
    source_before: Tensor
    source_item: Tensor
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    draws: Tensor = field(default_factory=lambda: torch.zeros(0, 0))


def backward_in_parts(
    rows: Mapping[str, Tensor],
    batch: Batch,
    features: Features,
    weights: Weights,
    losses: Callable[[Mapping[str, Tensor], Part, Tensor | None], list[Tensor]],
    parts: int,
) -> list[Tensor]:
    """Differentiates the first of the losses, summed over the parts, down to the tables; returns all their sums.

    rows: of each table, as looked up for the batch's training features. losses(embedded, part, weights) -> scalars.
    """
    values = rows_by_feature({t: r.detach() for t, r in rows.items()}, batch.train, features)
    into = {f: torch.zeros_like(v) for f, v in values.items()}
    whole = {f: v.detach().requires_grad_() for f, v in values.items()}
    weighed = weights(whole)
    flows = weighed is not None and weighed.requires_grad
    constant = None if weighed is None else weighed.detach().requires_grad_(flows)
    sums: list[Tensor] = []
    copies = len(batch) // len(next(iter(batch.histories.values()))) if batch.histories else batch.group
    for start, stop in _bounds(len(batch) // copies, parts):
        some = slice(start * copies, stop * copies)
        # The rows of histories are those of the whole batch: which of them a part uses is not worth finding out.
        of_rows = {f: slice(None) if of_history(f) or is_shared(f) else some for f in values}
        leaves = {f: v[of_rows[f]].detach().requires_grad_() for f, v in values.items()}
        histories = {domain: of.some(start, stop) for domain, of in batch.histories.items()}
        columns = {name: getattr(batch, name)[some] for name in _COLUMNS}
        part = Part(**columns, histories=histories, candidates=batch.candidates, draws=batch.draws[start:stop])
        found = losses(leaves, part, None if constant is None else constant[some])
        found[0].backward()
        for f, leaf in leaves.items():
            if leaf.grad is not None:
                into[f][of_rows[f]] += leaf.grad
        found = [x.detach() for x in found]
        sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
    if weighed is not None and constant is not None and constant.grad is not None:
        back = torch.autograd.grad(weighed, list(whole.values()), constant.grad, allow_unused=True)
        for f, gradient in zip(whole, back, strict=True):
            if gradient is not None:
                into[f] += gradient
    gradients = gradient_by_table(into, batch.train, features)
    trained = [t for t, of in rows.items() if of.requires_grad]
    torch.autograd.backward([rows[t] for t in trained], [gradients[t] for t in trained])
    return sums


def _bounds(rows: int, parts: int) -> list[tuple[int, int]]:
    size = -(-rows // min(parts, rows))
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]
