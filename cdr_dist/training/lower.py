"""The lower update: one step of the backbone on the target loss and the weighted source loss (BIAO, eq. 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.models.protocol import cross_entropy
from cdr_dist.profiling import span
from cdr_dist.training.weighting import Weighting

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


class Lower:
    """L_train = sum of target losses / B + sum of w_j x source losses; tables are written during its backward pass."""

    counts = True
    """Whether one such update is one step of the run."""
    needs_head = False

    def __init__(self, weighting: Weighting) -> None:
        self._weighting = weighting
        self.learned = weighting.learned
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
            rows = s.tables.rows(ids_by_table(batch.train, s.features))
            embedded = rows_by_feature(rows, batch.train, s.features)
            output = s.model(embedded, batch)
            target, source = s.model.losses(output, batch)
            target_loss = (batch.weight * target).sum() / batch.global_rows
        with span("lower weights"):
            weights = None if source is None else self._weighting.weights(batch, embedded)
        source_loss = target_loss.new_zeros(()) if weights is None else (weights * source).sum()
        total = target_loss + source_loss
        if self._head is not None:
            logit = self._head(output.target_features.detach()).squeeze(1)
            total = total + (batch.weight * cross_entropy(logit, batch.label)).sum() / batch.global_rows
        with span("lower backward"):
            total.backward()
        s.passes["lower"] += 1
        told = torch.tensor(float(stop_wanted))
        loss, source_part, stop = s.dense_step([target_loss, source_loss, told])
        found = {"loss": loss + source_part, "target_loss": loss, "stop": stop}
        if weights is not None:
            found["source_loss"] = source_part
        return found
