"""Matrix factorisation of the target alone: the single-domain model that any transfer has to beat."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cdr_dist.errors import UserError
from cdr_dist.models.pairs import DotProduct
from cdr_dist.models.protocol import Labels, Output, Spec, cross_entropy, pairwise_losses

LOSSES = ("bpr", "bce")


class MatrixFactorisation(nn.Module):
    """u . v + b_v (Rendle et al., "BPR", UAI 2009): a row's first value is the item's bias, and the user's has no use.

    loss: bpr, - log sigmoid(score of a positive - score of its negative), for labels by sampled negatives, whose rows
    follow their positive's; bce, cross-entropy of every row, for ratings. A positive's own loss is 0 in bpr.
    """

    def __init__(self, width: int, loss: str = "bpr", source: bool = False) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise UserError(f"model.loss={loss}: choose {' or '.join(LOSSES)}")
        if source:
            raise UserError("model=mf reads the target alone; take recipe=target_only")
        self._width, self._loss = width, loss
        self.bias = nn.Parameter(torch.zeros(()))

    def spec(self) -> Spec:
        return Spec({"user": "user", "target_item": "target_item"})

    def heads(self) -> tuple[str, ...]:
        return ()

    @property
    def target_feature_width(self) -> int:
        return self._width

    def forward(self, embedded: Mapping[str, Tensor], batch: Labels) -> Output:
        """embedded: feature -> [B, width]."""
        user, item = embedded["user"], embedded["target_item"]
        features = torch.cat([item[:, :1], user[:, 1:] * item[:, 1:]], dim=1)
        return Output(features.sum(1) + self.bias, None, features)

    def pair_scorer(self) -> DotProduct:
        """An item's own bias is times 1, and the one of all items goes into it."""

        def row_part(embedded: Mapping[str, Tensor], _batch: Labels) -> Tensor:
            user = embedded["user"]
            return torch.cat([torch.ones_like(user[:, :1]), user[:, 1:]], dim=1)

        def item_part(embedded: Mapping[str, Tensor]) -> Tensor:
            item = embedded["target_item"]
            return torch.cat([item[:, :1] + self.bias, item[:, 1:]], dim=1)

        return DotProduct(row_part, item_part)

    def initial_values(self) -> dict[str, Tensor]:
        return {"bias": torch.zeros(())}

    def losses(self, output: Output, batch: Labels) -> tuple[Tensor, Tensor | None]:
        if self._loss == "bce":
            return cross_entropy(output.target_logit, batch.label), None
        return pairwise_losses(output.target_logit, batch.label), None
