"""The lower update: one step of the backbone on the target loss and the weighted source loss (BIAO, eq. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cdr_dist.data.batch import Batch
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.profiling import span
from cdr_dist.training.accumulation import Part, backward_in_parts
from cdr_dist.training.split_metrics import split_metrics, validation_metrics
from cdr_dist.training.weighting import Weighting

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


class Lower:
    """L_train = sum of target losses / B + sum of w_j x source losses; tables are written during its backward pass."""

    counts = True
    """Whether one such update is one step of the run."""
    passes = 1
    """Backward passes of one."""
    stream = "lower"
    needs_head = False

    def __init__(self, weighting: Weighting) -> None:
        self._weighting = weighting
        self.seen: dict[str, float] = {}
        """What else a step has found; the same on all workers."""
        self.learned, self.counts_source = weighting.learned, getattr(weighting, "counts", True)
        self.needs_truth = getattr(weighting, "needs_truth", False)

    def bind(self, session: Session) -> None:
        self._session = session
        self._weighting.bind(session)
        self._head = session.dev_head if session.config.upper.head_refresh == "lower" else None

    def run(self, stop_wanted: bool) -> dict[str, float]:
        """One update. Numbers are sums over workers: `loss`, and `stop` > 0 where a worker was told to stop."""
        s = self._session
        batch = s.counted(s.lower.next().batch)
        with span("lower forward"):
            rows = s.rows(ids_by_table(batch.train, s.features))
        if s.config.batch.accumulate > 1:
            _, target_loss, source_loss = self._in_parts(batch, rows)
        else:
            _, target_loss, source_loss = self._at_once(batch, rows)
        s.passes["lower"] += self.passes
        told = torch.tensor(float(stop_wanted))
        loss, source_part, stop = s.dense_step([target_loss, source_loss, told])
        found = {"loss": loss + source_part, "target_loss": loss, "stop": stop}
        if self._weighted:
            found["source_loss"] = source_part
        return found | self.seen

    def validate(self, metric: str) -> dict[str, float]:
        return validation_metrics(self._session, metric)

    def measure(self, split: str, scores: str | None = None) -> dict[str, float]:
        return split_metrics(self._session, split, self._session.config.evaluation.full_ks, scores)

    def _at_once(self, batch: Batch, rows: Mapping[str, Tensor]) -> list[Tensor]:
        embedded = rows_by_feature(rows, batch.train, self._session.features)
        found = self._losses(embedded, batch, self._weights(batch, embedded), batch.global_rows)
        with span("lower backward"):
            found[0].backward()
        return found

    def _in_parts(self, batch: Batch, rows: Mapping[str, Tensor]) -> list[Tensor]:
        s = self._session
        with span("lower backward"):
            return backward_in_parts(
                rows,
                batch,
                s.features,
                lambda embedded: self._weights(batch, embedded),
                lambda embedded, part, weights: self._losses(embedded, part, weights, batch.global_rows),
                s.config.batch.accumulate,
            )

    def _weights(self, batch: Batch, embedded: Mapping[str, Tensor]) -> Tensor | None:
        with span("lower weights"):
            weights = self._weighting.weights(batch, embedded)
        self._weighted = weights is not None
        return weights

    def _losses(
        self, embedded: Mapping[str, Tensor], rows: Batch | Part, weights: Tensor | None, global_rows: int
    ) -> list[Tensor]:
        """What is differentiated, the target loss in it, and the source loss in it."""
        s = self._session
        with span("lower forward"):
            output = s.model(embedded, rows)
            target, source = s.model.losses(output, rows)
        target_loss = (rows.weight * target).sum() / global_rows
        source_loss = target_loss.new_zeros(()) if weights is None or source is None else (weights * source).sum()
        total = target_loss + source_loss
        if self._head is not None:
            with span("lower backward"):
                add_head_gradient(self._head, output.target_features.detach(), rows, global_rows)
        return [total, target_loss, source_loss]


@torch.no_grad()
def add_head_gradient(head: nn.Linear, features: Tensor, rows: Batch | Part, global_rows: int) -> None:
    """Adds the gradient of the mean cross-entropy of the extra head on features [B, k] to its parameters'.

    It is logistic regression: the gradient is written down at once, a quarter of the time that autograd takes.
    """
    residual = (head(features).squeeze(1).sigmoid() - rows.label) * (rows.weight / global_rows)
    head.weight.grad.addmm_(residual.unsqueeze(0), features)  # type: ignore[union-attr]
    head.bias.grad.add_(residual.sum())  # type: ignore[union-attr]
