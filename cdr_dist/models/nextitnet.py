"""NextItNet: the next item of a sequence by dilated causal convolutions, pre-trained and then asked for target items.

Yuan et al., WSDM 2019; fine-tuned as in UAF (Chen et al., "User-specific adaptive fine-tuning", TKDE) and PeterRec
(Yuan et al., SIGIR 2020), by what stands in `cdr_dist/transfer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cdr_dist.data.candidates import Candidates
from cdr_dist.data.feature_names import NEXT
from cdr_dist.errors import UserError
from cdr_dist.models.causal import DILATIONS
from cdr_dist.models.encoder import Encoder, NextItems, Route, Sequences
from cdr_dist.models.protocol import Labels, Output, Spec, cross_entropy, pairwise_losses
from cdr_dist.models.softmax import LOGITS, softmax_losses, weighted_softmax_loss

LOSSES = ("bpr", "bce", "softmax")
POOLINGS = ("last", "mean")
POSITIONS = ("drawn", "all")


class Transfer(Protocol):
    """A way of transfer, as it stands in a recipe."""

    def encoder(self, width: int, dilations: Sequence[int]) -> Encoder: ...


class NextItNet(nn.Module):
    """Score of a target item y for a user with source sequence x: h(x) . w_y + b_y (UAF, eq. 7).

    h is the hidden vector of the last position, or the mean over all (`pooling`; released code: mean). The bias is an
    item row's first value, and the hidden vector's first one has no use; `bias=False` (released) takes all of it. An
    empty sequence's h is zero. loss: bpr, -log sigmoid(positive - its negative) (eq. 8); bce, pointwise (released);
    softmax over all target items, for class labels. `dilations` are those of the blocks' first convolutions.

    Pre-training predicts every next item of a sequence by a softmax over the source items, whose rows are a table of
    their own (eq. 3-5). With a source loss (source=True: mtl, joint, biao) the same softmax judges, for every row, its
    source behaviour from what came before it (`source_positions=drawn`) or all positions of its sequence (`all`).
    `categories`: an item is its row plus its category's. pretrain, target: which kinds of phases the recipe has.
    """

    def __init__(
        self,
        width: int,
        source: bool = False,
        pretrain: bool = False,
        target: bool = True,
        dilations: Sequence[int] = DILATIONS,
        loss: str = "bpr",
        pooling: str = "last",
        bias: bool = True,
        categories: bool = False,
        source_positions: str = "drawn",
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("loss", loss, LOSSES),
            ("pooling", pooling, POOLINGS),
            ("source_positions", source_positions, POSITIONS),
        ):
            if value not in known:
                raise UserError(f"model.{name}={value}: choose {', '.join(known[:-1])} or {known[-1]}")
        if not dilations or min(dilations) < 1:
            raise UserError(f"model.dilations={list(dilations)}: at least one block, of dilations from 1 on")
        self._width, self._source, self._pretrain, self._target = width, source, pretrain, target
        self._loss, self._mean, self._bias = loss, pooling == "mean", bias
        self._parts = ("item", "category") if categories else ("item",)
        self._drawn, self._dilations = source_positions == "drawn", [int(d) for d in dilations]
        self.encoder = Encoder(width, self._dilations)

    def adapt(self, transfer: Transfer) -> None:
        """Before anything is trained: the encoder becomes what a way of transfer makes of it."""
        self.encoder = transfer.encoder(self._width, self._dilations)

    def begin(self) -> None:
        """The pre-trained parameters are in place: what is added may start from them."""
        self.encoder.begin()

    @property
    def judges_behaviours(self) -> bool:
        """Whether a row's source loss is that of its source behaviour alone, so that this can be weighed."""
        return self._drawn

    def architecture(self) -> dict[str, Any]:
        """What a run must share with the one that it starts from."""
        return {"dilations": self._dilations, "categories": "category" in self._parts}

    def pretrained(self) -> list[str]:
        """Names of the parameters that a pre-trained run has, the others start as they are."""
        return [f"encoder.{name}" for name in self.encoder.pretrained()]

    def trained(self, pretraining: bool) -> tuple[list[str], list[str]]:
        """Names of the parameters and of the tables that pre-training, or else fine-tuning, trains."""
        spec = self.spec()
        if pretraining:
            return self.pretrained(), list(dict.fromkeys(spec.sequences.values()))
        tables = list(dict.fromkeys(spec.features.values()))
        if not self.encoder.trains_items:
            tables = [t for t in tables if t not in ("source_item", "source_category")]
        return [f"encoder.{name}" for name in self.encoder.trained()], tables

    @property
    def draws(self) -> int:
        return self.encoder.draws

    @property
    def fixed_draws(self) -> bool:
        return self.encoder.fixed_draws

    @property
    def needs_truth(self) -> bool:
        return self.encoder.needs_truth

    def spec(self) -> Spec:
        history = {f"source_history_{part}": f"source_{part}" for part in self._parts}
        rows = history | {f"target_{part}": f"target_{part}" for part in self._parts}
        if self._loss == "softmax":
            rows["target_softmax"] = "target_item"
        if self._source:
            rows |= {f"source_{part}": f"source_{part}" for part in self._parts}
            rows |= {"source_next" if self._drawn else NEXT: "source_output", "source_softmax": "source_output"}
        sequences = history | {NEXT: "source_output", "source_softmax": "source_output"}
        return Spec(rows if self._target else {}, sequences if self._pretrain else {})

    def heads(self) -> tuple[str, ...]:
        return ()

    @property
    def target_feature_width(self) -> int:
        return self._width

    def forward(self, embedded: Mapping[str, Tensor], batch: Labels) -> Output:
        """embedded: feature -> [B, width], of histories [U, width], of a softmax's candidates [S, width]."""
        seen = self._seen(embedded, batch)
        route = self.encoder.route(seen, batch.draws)
        hidden = self.encoder(seen, route)
        item = self._vectors(embedded, "target")
        copies = len(item) // len(seen.lengths)
        query = self._pooled(hidden, seen).repeat_interleave(copies, 0)
        features = query * item
        logit = features.sum(1)
        if not self.training:
            return Output(logit, None, features)
        target = self._target_losses(embedded, batch, query, logit)
        if route is not None and route.learns:
            target = target + self._policy_losses(route, seen, item, logit, batch)
        if not self._source:
            return Output(logit, None, features, (target, None))
        before = self._query(seen.last(hidden, batch.source_before.view(-1, copies))).flatten(0, 1)
        own = embedded["source_next"] if self._drawn else self._vectors(embedded, "source")
        source = self._source_losses(embedded, batch, hidden, before)
        return Output(logit, (before * own).sum(1), features, (target, source))

    def losses(self, output: Output, batch: Labels) -> tuple[Tensor, Tensor | None]:
        assert output.losses is not None, "losses belong to training"
        return output.losses

    def next_item(self, embedded: Mapping[str, Tensor], batch: Labels) -> tuple[Tensor, Tensor]:
        """Pre-training on a batch of sequences -> the sum of the losses of all positions, and how many these are.

        A position counts where its next item is known. Differentiable once.
        """
        history, seen = batch.histories["source"], self._seen(embedded, batch)
        at = NextItems.of(history, seen.rows.shape[1])
        query = self._query(self.encoder.pretraining(seen.rows).flatten(0, 1).index_select(0, at.place))
        own, ids = embedded[NEXT].index_select(0, at.distinct), history.item.index_select(0, at.distinct)
        weight = torch.ones_like(at.place, dtype=query.dtype)
        rows, candidates = embedded["source_softmax"], batch.candidates["source"]
        return weighted_softmax_loss(query, own, ids, weight, rows, candidates), weight.sum()

    def gates(self, embedded: Mapping[str, Tensor], batch: Labels) -> Tensor | None:
        """How much of each block is its fine-tuned copy, [histories, blocks]; None where nothing decides that."""
        route = self.encoder.route(self._seen(embedded, batch), batch.draws)
        return None if route is None else route.tuned

    def pair_scorer(self) -> _Products:
        return _Products(self)

    def _seen(self, embedded: Mapping[str, Tensor], batch: Labels) -> Sequences:
        return Sequences.of(self._vectors(embedded, "source_history"), batch.histories["source"])

    def _vectors(self, embedded: Mapping[str, Tensor], what: str) -> Tensor:
        """Of items: their rows, with their categories' where the model reads these."""
        found = embedded[f"{what}_{self._parts[0]}"]
        for part in self._parts[1:]:
            found = found + embedded[f"{what}_{part}"]
        return found

    def _pooled(self, hidden: Tensor, seen: Sequences) -> Tensor:
        """[n, length, width] -> what target items are multiplied by, [n, width]."""
        whole = seen.mean(hidden) if self._mean else seen.last(hidden, seen.lengths.unsqueeze(1)).squeeze(1)
        return self._query(whole)

    def _query(self, hidden: Tensor) -> Tensor:
        if not self._bias:
            return hidden
        return torch.cat([torch.ones_like(hidden[..., :1]), hidden[..., 1:]], dim=-1)

    def _target_losses(self, embedded: Mapping[str, Tensor], batch: Labels, query: Tensor, logit: Tensor) -> Tensor:
        """[B]; bpr's stands with the negatives, which follow their positive, softmax's with the positives."""
        if self._loss == "bce":
            return cross_entropy(logit, batch.label)
        if self._loss == "softmax":
            losses = (query @ embedded["target_softmax"].T).logsumexp(1) - logit
            return torch.where(batch.label > 0, losses, torch.zeros_like(losses))
        return pairwise_losses(logit, batch.label)

    def _policy_losses(self, route: Route, seen: Sequences, item: Tensor, logit: Tensor, batch: Labels) -> Tensor:
        """[B]; a sequence's stands with the first of its rows, its positive."""
        copies = len(item) // len(seen.rows)
        with torch.no_grad():
            other = self._pooled(self.encoder(seen, route.baseline()), seen).repeat_interleave(copies, 0)
            right = [_right(of.view(-1, copies), batch.label.view(-1, copies)) for of in (logit, (other * item).sum(1))]
        losses = route.policy_loss(*right).unsqueeze(1)
        return functional.pad(losses, (0, copies - 1)).flatten()

    def _source_losses(self, embedded: Mapping[str, Tensor], batch: Labels, hidden: Tensor, before: Tensor) -> Tensor:
        """[B]; of all positions of its sequence every row has the mean."""
        rows, candidates = embedded["source_softmax"], batch.candidates["source"]
        if self._drawn:
            return softmax_losses(before, embedded["source_next"], batch.source_item, rows, candidates)
        history = batch.histories["source"]
        at = NextItems.of(history, hidden.shape[1])
        query = self._query(hidden.flatten(0, 1).index_select(0, at.place))
        own, ids = embedded[NEXT].index_select(0, at.distinct), history.item.index_select(0, at.distinct)
        losses = _losses_in_blocks(query, own, ids, rows, candidates)
        sums = losses.new_zeros(2, len(history)).index_add(1, at.row, torch.stack([losses, torch.ones_like(losses)]))
        return (sums[0] / sums[1].clamp(min=1)).repeat_interleave(len(before) // len(history))


class _Products:
    """A `PairScorer` whose logits are products of rows and items."""

    def __init__(self, model: NextItNet) -> None:
        self._model = model

    def row_part(self, embedded: Mapping[str, Tensor], batch: Labels) -> Tensor:
        model, seen = self._model, self._model._seen(embedded, batch)
        hidden = model.encoder(seen, model.encoder.route(seen, batch.draws))
        return model._pooled(hidden, seen).repeat_interleave(len(batch.label) // len(seen.lengths), 0)

    def item_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        return self._model._vectors(embedded, "target")

    def logits(self, rows: Tensor, items: Tensor) -> Tensor:
        return (rows * items).sum(-1)

    def matrix(self, rows: Tensor, items: Tensor) -> Tensor:
        return rows @ items.T


def _right(logit: Tensor, label: Tensor) -> Tensor:
    """Whether the first of every line, the positive, stands above all others, its negatives: [n, copies] -> [n].

    A rated row stands alone: whether the sign of its logit is that of its label.
    """
    if logit.shape[1] == 1:
        return ((logit > 0) == (label > 0))[:, 0]
    return (logit[:, :1] > logit[:, 1:]).all(1) & (label[:, 0] > 0)


def _losses_in_blocks(query: Tensor, own: Tensor, ids: Tensor, rows: Tensor, candidates: Candidates) -> Tensor:
    """`softmax_losses` that holds a few logits at a time, and computes them again in the backward pass."""
    size = max(1, 8 * LOGITS // max(1, len(rows)))
    parts = zip(query.split(size), own.split(size), ids.split(size), strict=True)
    found = [checkpoint(softmax_losses, *part, rows, candidates, use_reentrant=False) for part in parts]
    return torch.cat(found) if found else query.new_zeros(0)
