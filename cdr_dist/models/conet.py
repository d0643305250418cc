"""CoNet: two towers joined by cross units (Hu, Zhang & Yang, CIKM 2018), as BIAO uses it (WWW 2023, section 4)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cdr_dist.errors import UserError
from cdr_dist.models.protocol import Labels, Output, Spec, TwoHeads

_TARGET = {"user": "user", "target_item": "target_item", "target_category": "target_category"}
_SOURCE = {"source_item": "source_item", "source_category": "source_category"}


class CoNet(TwoHeads):
    """a_t(h+1) = ReLU(W_t a_t(h) + b_t + H a_s(h)), and the same with the domains swapped (CoNet, eq. 8).

    One H a layer serves both directions; cross_layers: how many layers have one, from the first on (None: all, as in
    BIAO; CoNet's own code: 2). sparsity: times the sum of the |H|, added to the loss (SCoNet). Input of a tower: [user;
    item; category], 3 x width. With `source=False` this is the single-domain variant (-S): no source tower, no cross
    units, no source features.
    """

    def __init__(
        self,
        width: int,
        hidden: Sequence[int] = (64, 32, 16, 8),
        cross_layers: int | None = None,
        sparsity: float = 0.0,
        source: bool = True,
    ) -> None:
        super().__init__()
        if not hidden:
            raise UserError("model.hidden: at least one layer is needed")
        if (cross_layers or 0) < 0 or sparsity < 0:
            raise UserError("model.cross_layers and model.sparsity must not be negative")
        sizes = [3 * width, *hidden]
        layers = list(itertools.pairwise(sizes))
        self.target_tower = nn.ModuleList(nn.Linear(a, b) for a, b in layers)
        self.target_head = nn.Linear(sizes[-1], 1)
        self.source, self.sparsity = source, sparsity
        if source:
            self.source_tower = nn.ModuleList(nn.Linear(a, b) for a, b in layers)
            self.cross = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in layers[:cross_layers])
            self.source_head = nn.Linear(sizes[-1], 1)

    def spec(self) -> Spec:
        return Spec(_TARGET | _SOURCE if self.source else _TARGET)

    def forward(self, embedded: Mapping[str, Tensor], batch: Labels) -> Output:
        """embedded: feature -> [B, width]."""
        if not self.source:
            target = _side_by_side(embedded, [*_TARGET])
            for layer in self.target_tower:
                target = layer(target).relu_()
            return Output(self.target_head(target).squeeze(1), None, target)
        # Both towers are one: [a_t; a_s] times [[W_t, H], [H, W_s]], a third of the operators. The user, which both
        # begin with, goes in once.
        both = _side_by_side(embedded, [*_TARGET, *_SOURCE])
        for weight, bias in self._layers(embedded["user"].shape[1]):
            both = torch.addmm(bias, both, weight.t()).relu_()
        target, source = both.split(self.target_head.in_features, dim=1)
        return Output(self.target_head(target).squeeze(1), self.source_head(source).squeeze(1), target)

    def losses(self, output: Output, batch: Labels) -> tuple[Tensor, Tensor | None]:
        target, source = super().losses(output, batch)
        if self.sparsity and self.source:  # on every example, so once on their mean
            target = target + self.sparsity * torch.stack([h.abs().sum() for h in self.cross.parameters()]).sum()
        return target, source

    def pair_scorer(self) -> _Pairs:
        return _Pairs(self)

    def _layers(self, width: int) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of both towers joined, layer by layer; of the target tower where it is alone."""
        target = _parameters(self.target_tower)
        if not self.source:
            return target
        cross = [h for h, _ in _parameters(self.cross)]
        cross += [torch.zeros_like(w) for w, _ in target[len(cross) :]]
        layers = zip(target, _parameters(self.source_tower), cross, strict=True)
        return [
            _Joined.apply(0 if i else width, w_t, w_s, h, b_t, b_s)
            for i, ((w_t, b_t), (w_s, b_s), h) in enumerate(layers)
        ]

    def initial_values(self) -> dict[str, Tensor]:
        """Small positive biases in the towers, so that a layer of 8 ReLUs starts with its units alive; heads at zero,
        so that the first losses are ln 2 and no large first step kills units (AUC .5 for good)."""
        domains = ["target"] + (["source"] if self.source else [])
        biases = {
            f"{domain}_tower.{i}.bias": torch.full_like(layer.bias, 0.1)
            for domain in domains
            for i, layer in enumerate(getattr(self, f"{domain}_tower"))
        }
        return biases | {f"{d}_head.weight": torch.zeros_like(getattr(self, f"{d}_head").weight) for d in domains}


class _Pairs:
    """The first layer is linear before its ReLU: what the row and what the item add to it is computed once each."""

    def __init__(self, model: CoNet) -> None:
        names = [*_TARGET, *(_SOURCE if model.source else ())]
        width = _parameters(model.target_tower)[0][0].shape[1] // len(_TARGET)
        (first, self._bias), *layers = model._layers(width)
        of = dict(zip(names, first.split(width, dim=1), strict=True))
        self._of_item = {f: of.pop(f) for f in ("target_item", "target_category")}
        self._of_row = of
        k = model.target_head.in_features
        if layers:  # of the last layer only the target's half is wanted
            layers[-1] = layers[-1][0][:k], layers[-1][1][:k]
        self._layers = [(weight.t().contiguous(), bias) for weight, bias in layers]
        self._head, self._k = model.target_head, k

    def row_part(self, embedded: Mapping[str, Tensor], _batch: Labels) -> Tensor:
        return torch.stack([embedded[f] @ w.t() for f, w in self._of_row.items()]).sum(0) + self._bias

    def item_part(self, embedded: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([embedded[f] @ w.t() for f, w in self._of_item.items()]).sum(0)

    def logits(self, rows: Tensor, items: Tensor) -> Tensor:
        hidden = torch.add(rows, items).relu_()
        sizes, hidden = hidden.shape[:-1], hidden.view(-1, hidden.shape[-1])
        for weight, bias in self._layers:
            hidden = torch.addmm(bias, hidden, weight).relu_()
        return self._head(hidden[:, : self._k]).view(sizes)


def _parameters(tower: nn.ModuleList) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of every layer."""
    return [(layer.weight, layer.bias) for layer in tower if isinstance(layer, nn.Linear)]


class _Joined(torch.autograd.Function):
    """[[W_t, H], [H, W_s]] and [b_t; b_s] of a layer whose two inputs share their first `shared` columns.

    Columns: shared, target's own, source's own. One node in place of some twenty, which a small batch pays for.
    """

    @staticmethod
    def forward(ctx: Any, shared: int, w_t: Tensor, w_s: Tensor, h: Tensor, b_t: Tensor, b_s: Tensor) -> Any:
        ctx.shared = shared
        (t_both, t_own), (s_both, s_own), (h_both, h_other) = (w.tensor_split([shared], dim=1) for w in (w_t, w_s, h))
        target, source = [t_own, h_other], [h_other, s_own]
        if shared:
            target, source = [t_both + h_both, *target], [s_both + h_both, *source]
        return torch.cat([torch.cat(target, 1), torch.cat(source, 1)]), torch.cat([b_t, b_s])

    @staticmethod
    def backward(ctx: Any, weight: Tensor, bias: Tensor) -> Any:
        u, own = ctx.shared, (weight.shape[1] - ctx.shared) // 2
        target, source = weight.chunk(2)
        of_source, of_cross = source[:, u + own :], target[:, u + own :] + source[:, u : u + own]
        if u:
            of_source = torch.cat([source[:, :u], of_source], 1)
            of_cross = torch.cat([target[:, :u] + source[:, :u], of_cross], 1)
        return None, target[:, : u + own], of_source, of_cross, *bias.chunk(2)


def _side_by_side(embedded: Mapping[str, Tensor], names: list[str]) -> Tensor:
    """[B, names x width]; looked-up rows lie like that already."""
    whole = getattr(embedded, "whole", None)
    return whole if whole is not None and list(embedded) == names else _SideBySide.apply(*(embedded[f] for f in names))


class _SideBySide(torch.autograd.Function):
    """Matrices as one. torch.cat, differentiated twice, adds up as many matrices of the whole's size."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.split(ctx.sizes, dim=1)
