"""The upper update: one step of the perceptron along the implicit gradient (BIAO, Algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cdr_dist.bilevel.hypergradient import Hypergradient, hypergradient
from cdr_dist.bilevel.options import HypergradientOptions
from cdr_dist.data.batch import Batch
from cdr_dist.data.hold_out import HoldOut
from cdr_dist.data.stream import Place
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.models.protocol import cross_entropy
from cdr_dist.profiling import span

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


class Upper:
    """Train batch: the next lower batch, looked at early and trained on as usual. Tables do not move."""

    counts = False
    passes = 0
    """It says itself how many it made: `hypergradient` counts them."""
    learned = True
    needs_head = True

    def bind(self, session: Session) -> None:
        assert session.perceptron is not None
        self._session, self._perceptron = session, session.perceptron
        refresh = session.config.upper.head_refresh
        self._refresh = int(refresh[4:]) if refresh.startswith("dev:") and session.dev_head is not None else 0

    def run(self, stop_wanted: bool) -> dict[str, float]:
        """One update -> gamma, the norm of the hypergradient, |v_0| and |v_K|, and whether the series grew.

        Nothing happens, and nothing is returned, during the warm-up.
        """
        s, options = self._session, self._session.config.hypergradient
        if s.lower.place.epoch < s.config.upper.warm_up_epochs:
            return {}
        if self._refresh:
            self._refresh_head()
        train = self._train_batch()
        dev = self._dev_batch()
        found = self._hypergradient(train, dev, options)
        s.passes["upper"] += found.passes
        norm = self.learn(found, train)
        norms = found.norms.tolist()
        return {
            "gamma": float(self._perceptron.gamma.detach()),
            "hypergradient_norm": norm,
            "series_first": norms[0],
            "series_last": norms[-1],
            "series_grows": float(norms[-1] > norms[0]),
        }

    def _hypergradient(self, train: Batch, dev: Batch, options: HypergradientOptions) -> Hypergradient:
        s = self._session
        return hypergradient(s.model, self._perceptron, s.dev_head, s.tables, train, dev, options)

    def learn(self, found: Hypergradient, train: Batch) -> float:
        """A step of the perceptron -> the norm of the hypergradient that `train` and its dev batch gave."""
        named = dict(self._perceptron.named_parameters())
        for name, parameter in named.items():
            parameter.grad = found.phi[name].to(parameter.dtype)
        clip = self._session.config.upper.clip
        norm = float(torch.nn.utils.clip_grad_norm_(named.values(), clip if clip > 0 else float("inf")))
        optimiser = self._session.optimisers["perceptron"]
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        return norm

    def _train_batch(self) -> Batch:
        s = self._session
        fed, draws = s.lower.peek(), s.config.upper.source_draws
        if draws == 1:
            return s.counted(fed.batch)
        rows = fed.batch.global_rows // s.builder.expansion
        return s.counted(s.builder.train(fed.stored, fed.place, rows, s.hold_out, draws).to(s.device))

    def _dev_batch(self) -> Batch:
        s = self._session
        if s.config.upper.dev == "reordered":
            return s.dev.next().batch
        if s.config.upper.dev == "split":
            return s.counted(s.dev.next().batch, always=True)
        fed = s.lower.peek()
        rows = fed.batch.global_rows // s.builder.expansion
        each = s.config.upper.dev_behaviours
        rotating = s.hold_out if isinstance(s.hold_out, HoldOut) else None
        batch = s.builder.dev_of_same_users(fed.stored, fed.place.epoch, rows, rotating, each)
        return s.counted(batch.to(s.device), always=True)

    def _refresh_head(self) -> None:
        """The released way: the extra head learns on the first batches of the dev stream, always the same ones."""
        s = self._session
        assert s.dev_head is not None
        feed = s.dev_feed()
        feed.seek(Place())
        for _ in range(self._refresh):
            batch = feed.next().batch
            with span("head forward"), torch.no_grad():
                rows = s.tables.read(ids_by_table(batch.train, s.features))
                features = s.model(rows_by_feature(rows, batch.train, s.features), batch).target_features
            loss = cross_entropy(s.dev_head(features).squeeze(1), batch.label)
            with span("head backward"):
                (batch.weight * loss).sum().div(batch.global_rows).backward()
            s.passes["head"] += 1
            s.dense_step.step("dev_head")
        feed.close()
