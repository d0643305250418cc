"""How much every source behaviour of a batch counts in the lower loss: one class a way of weighing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from cdr_dist.bilevel.lookup import perceptron_input
from cdr_dist.data.batch import Batch
from cdr_dist.data.truth import usefulness_by_category

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


class Weighting(Protocol):
    """`learned`: whether the session needs a perceptron. `counts`: whether source losses are asked for at all."""

    learned: bool
    counts: bool

    def bind(self, session: Session) -> None: ...

    def weights(self, batch: Batch, embedded: Mapping[str, Tensor]) -> Tensor | None:
        """[B] weights of the source losses, already divided by what they are a mean of; None: no source loss."""
        ...


class NoSource:
    """Base-S and Base-0: the source loss does not count."""

    learned = counts = False

    def bind(self, session: Session) -> None:
        pass

    def weights(self, batch: Batch, embedded: Mapping[str, Tensor]) -> Tensor | None:
        return None


class Uniform:
    """Base: every source behaviour weighs gamma0 / B."""

    learned, counts = False, True

    def bind(self, session: Session) -> None:
        self._gamma0 = session.config.upper.gamma0

    def weights(self, batch: Batch, embedded: Mapping[str, Tensor]) -> Tensor | None:
        return batch.source_valid * (self._gamma0 / batch.global_rows)


class OfKinds:
    """Planted data: gamma0 / B for the behaviours of the kept kinds (helpful, neutral, harmful), 0 for the rest."""

    learned, counts = False, True
    needs_truth = True

    def __init__(self, keep: list[str]) -> None:
        self._keep = list(keep)

    def bind(self, session: Session) -> None:
        self._gamma0 = session.config.upper.gamma0
        kind = usefulness_by_category(session.folder, session.manifest)
        self._kept = torch.tensor([name in self._keep for name in kind]).to(session.device)

    def weights(self, batch: Batch, embedded: Mapping[str, Tensor]) -> Tensor | None:
        kept = self._kept[batch.train["source_category"].values()]
        return batch.source_valid * kept * (self._gamma0 / batch.global_rows)


class Learned:
    """BIAO: the behavioural perceptron's weights, constants in the lower loss (unless perceptron.item_gradient)."""

    learned = counts = True

    def bind(self, session: Session) -> None:
        assert session.perceptron is not None
        self._perceptron, self._tables = session.perceptron, session.tables
        self._features = session.features
        self._parts = session.config.batch.accumulate

    def weights(self, batch: Batch, embedded: Mapping[str, Tensor]) -> Tensor | None:
        flows = self._perceptron.options.item_gradient
        # As released, the item that enters the global part takes a gradient, the perceptron's parameters never do.
        with nullcontext() if flows else torch.no_grad():
            seen = perceptron_input(self._tables, self._features, batch.histories, embedded, flows)
            score = torch.cat([self._perceptron(part) for part in seen.parts(1 if flows else self._parts)])
            return self._perceptron.weights(score, batch.source_valid, batch.global_rows)
