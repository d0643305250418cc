"""The upper update: one step of the perceptron along the implicit gradient (BIAO, Algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cdr_dist.bilevel.hypergradient import hypergradient
from cdr_dist.data.stream import Place
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.embeddings.workers import reduce_flat
from cdr_dist.models.protocol import cross_entropy

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


class Upper:
    """Train batch: the next lower batch, looked at early and trained on as usual. Tables do not move."""

    counts = False
    learned = True
    needs_head = True

    def bind(self, session: Session) -> None:
        self._session = session
        refresh = session.config.upper.head_refresh
        self._refresh = int(refresh[4:]) if refresh.startswith("dev:") and session.dev_head is not None else 0

    def run(self, stop_wanted: bool) -> dict[str, float]:
        """One update -> gamma, the norm of the hypergradient, |v_0| and |v_K|, and whether the series grew."""
        s = self._session
        options = s.config.upper
        if self._refresh:
            self._refresh_head()
        found = hypergradient(
            s.model,
            s.perceptron,
            s.dev_head,
            s.tables,
            s.lower.peek().batch,
            self._dev_batch(),
            s.config.hypergradient,
        )
        s.passes["upper"] += s.config.hypergradient.terms + 3
        named = dict(s.perceptron.named_parameters())
        for name, parameter in named.items():
            parameter.grad = found.phi[name].to(parameter.dtype)
        largest = options.clip if options.clip > 0 else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(named.values(), largest))
        s.optimisers["perceptron"].step()
        s.optimisers["perceptron"].zero_grad(set_to_none=True)
        norms = found.norms.tolist()
        return {
            "gamma": float(s.perceptron.gamma.detach()),
            "hypergradient_norm": norm,
            "series_first": norms[0],
            "series_last": norms[-1],
            "series_grows": float(norms[-1] > norms[0]),
        }

    def _dev_batch(self):
        s = self._session
        if s.config.upper.dev == "reordered":
            return s.dev.next().batch
        fed = s.lower.peek()
        return s.builder.dev_of_same_users(fed.table, fed.place, fed.batch.global_rows).to(s.device)

    def _refresh_head(self) -> None:
        """The released way: the extra head learns on the first batches of the dev stream, always the same ones."""
        s = self._session
        feed = s.training_feed("dev", s.config.upper.dev_batch_size or s.config.batch.size)
        feed.seek(Place())
        for _ in range(self._refresh):
            batch = feed.next().batch
            with torch.no_grad():
                rows = s.tables.read(ids_by_table(batch.train, s.features))
                features = s.model(rows_by_feature(rows, batch.train, s.features), batch).target_features
            loss = cross_entropy(s.dev_head(features).squeeze(1), batch.label)
            (batch.weight * loss).sum().div(batch.global_rows).backward()
            s.passes["head"] += 1
            parameters = list(s.dev_head.parameters())
            for p, g in zip(parameters, reduce_flat([p.grad for p in parameters]), strict=True):
                p.grad = g
            s.optimisers["dev_head"].step()
            s.optimisers["dev_head"].zero_grad(set_to_none=True)
        feed.close()
