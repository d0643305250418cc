"""What a backbone is: a plain module from embeddings to scores and per-example losses.

A backbone never sees ids, tables, Ray, Hydra or Parquet. Its class or instance says through `spec()` which features
it reads and from which tables, and gets their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Spec:
    """features: name -> table. Known features: user, target_{item,category}, source_{item,category}, each [B]."""

    features: Mapping[str, str]

    @property
    def tables(self) -> list[str]:
        return list(dict.fromkeys(self.features.values()))


class Output(NamedTuple):
    """Logits [B]; `target_features` [B, k] is what the target head reads (the extra head of BIAO reads it too)."""

    target_logit: Tensor
    source_logit: Tensor | None
    target_features: Tensor


class Labels(Protocol):
    """The part of a batch that a loss needs: labels [B], float."""

    label: Tensor
    source_label: Tensor


class Backbone(Protocol):
    """A model that target_only, source_features, joint and biao can train; docs/backbone.md has one in 40 lines."""

    def spec(self) -> Spec: ...

    def heads(self) -> tuple[str, ...]:
        """Prefixes of the parameters that predict only; eq. 14's theta leaves them out, as the released code does."""
        ...

    @property
    def target_feature_width(self) -> int: ...

    def __call__(self, embedded: Mapping[str, Tensor], batch: Labels) -> Output: ...

    def losses(self, output: Output, batch: Labels) -> tuple[Tensor, Tensor | None]:
        """Per-example target and source losses [B]."""
        ...


def cross_entropy(logit: Tensor, label: Tensor) -> Tensor:
    """Per-example binary cross-entropy [B] of logits."""
    # softplus(x) - y x; above 40 softplus is x to the last bit of a double.
    return torch.addcmul(functional.softplus(logit, threshold=40.0), logit, label.to(logit.dtype), value=-1.0)


class PerExampleLosses(torch.nn.Module):
    """The losses of a backbone with one binary label a domain."""

    def losses(self, output: Output, batch: Labels) -> tuple[Tensor, Tensor | None]:
        target = cross_entropy(output.target_logit, batch.label)
        if output.source_logit is None:
            return target, None
        return target, cross_entropy(output.source_logit, batch.source_label)
