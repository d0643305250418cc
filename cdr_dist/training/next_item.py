"""The update of pre-training: every next item of a batch of source sequences, by a softmax over the source items."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import sum_over_workers
from cdr_dist.errors import UserError
from cdr_dist.profiling import span
from cdr_dist.training.evaluate import evaluation_rows, one_ahead

if TYPE_CHECKING:
    from cdr_dist.data.batch import Batch
    from cdr_dist.training.session import Session


class NextItem:
    """Minimises the mean loss of all positions of the global batch (UAF, eq. 5, divided by their number)."""

    counts = True
    passes = 1
    stream = "sequences"
    learned = False
    needs_head = False

    def bind(self, session: Session) -> None:
        self._session = session
        if session.config.batch.accumulate > 1:
            raise UserError("batch.accumulate: pre-training takes its batches whole; take 1, or fewer batch.sequences")

    def run(self, stop_wanted: bool) -> dict[str, float]:
        """One update -> `loss` (also called nll, as in evaluation), and `stop` > 0 where a worker was told to stop."""
        s = self._session
        assert s.sequences is not None
        batch = s.sequences.next().batch
        with span("lower forward"):
            rows = s.rows(ids_by_table(batch.train, s.features))
            loss, positions = s.model.next_item(rows_by_feature(rows, batch.train, s.features), batch)
            loss = loss / sum_over_workers(positions).clamp(min=1)
        with span("lower backward"):
            loss.backward()
        s.passes["lower"] += self.passes
        told, stop = s.dense_step([loss, torch.tensor(float(stop_wanted))])
        return {"loss": told, "nll": told, "stop": stop}

    def validate(self, metric: str) -> dict[str, float]:
        return self.measure("valid")

    @torch.no_grad()
    def measure(self, split: str, scores: str | None = None) -> dict[str, float]:
        """`nll`: the mean loss of all positions of the split's sequences, among all items or a fixed draw of them."""
        s = self._session
        s.model.eval()
        rows = evaluation_rows(s, f"sequences_{split}")
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in one_ahead(s.builder.sequences(of) for of in rows):
            sums += self._sums(batch.to(s.device))
        s.model.train()
        loss, positions = sum_over_workers(sums).tolist()
        if not positions:
            raise UserError(f"{split}: no sequence of {s.folder} has a known item to predict")
        return {"nll": loss / positions}

    def _sums(self, batch: Batch) -> torch.Tensor:
        s = self._session
        found = s.tables.read(ids_by_table(batch.train, s.features))
        sums = s.model.next_item(rows_by_feature(found, batch.train, s.features), batch)
        return torch.stack(sums).double().cpu()
