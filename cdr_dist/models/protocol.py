"""What a backbone is: a plain module from embeddings to scores and per-example losses.

A backbone never sees ids, tables, Ray, Hydra or Parquet. Its class or instance says through `spec()` which features
it reads and from which tables, and gets their rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from cdr_dist.data.candidates import Candidates
from cdr_dist.data.histories import History


@dataclass(frozen=True)
class Spec:
    """features: name -> table.

    Of a row: user, {target,source}_{item,category}, and source_user, the user once more for a table of its own. Of the
    distinct items of the rows' histories: {target,source}_history_{item,category}; what a row's history is says
    `batch.histories`.
    """

    features: Mapping[str, str]
    sequences: Mapping[str, str] = field(default_factory=dict)
    """The same of batches of source sequences, which a phase of pre-training reads."""

    @property
    def tables(self) -> list[str]:
        return list(dict.fromkeys([*self.features.values(), *self.sequences.values()]))


class Output(NamedTuple):
    """Logits [B]; `target_features` [B, k] is what the target head reads (the extra head of BIAO reads it too).

    losses: per-example target and source losses [B] of a backbone that needs more than logits for them.
    """

    target_logit: Tensor
    source_logit: Tensor | None
    target_features: Tensor
    losses: tuple[Tensor, Tensor | None] | None = None


class Labels(Protocol):
    """What a backbone may know of B rows: labels [B], float, and domain -> histories, where `Spec` has features of
    theirs; B / len(histories) rows after one another share one. source_before [B], int64: how many items of a row's
    source history came before its source behaviour, which stands in it itself; source_item [B], int64, which item that
    is. candidates: domain -> those of its
    softmax. draws [histories, `Backbone.draws`]: numbers of (0, 1) for whatever a backbone draws by example.
    """

    label: Tensor
    source_label: Tensor
    histories: Mapping[str, History]
    source_before: Tensor
    source_item: Tensor
    candidates: Mapping[str, Candidates]
    draws: Tensor


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


def pairwise_losses(logit: Tensor, label: Tensor) -> Tensor:
    """BPR, -log sigmoid(score of a positive - score of its negative), [B]: with the negatives, which follow their
    positive; a positive's own is 0 (Rendle et al., UAI 2009)."""
    positive = label > 0
    number = positive.cumsum(0) - 1
    assert int(number[0]) == 0 or not positive.any(), "rows of a positive and its negatives are cut apart"
    of_positive = logit[positive]
    if not len(of_positive):
        return 0.0 * logit  # a worker without rows takes part in the backward pass all the same
    gap = of_positive.index_select(0, number.clamp(min=0)) - logit
    return torch.where(positive, torch.zeros_like(gap), functional.softplus(-gap))


class PerExampleLosses(torch.nn.Module):
    """The losses of a backbone with one binary label a domain."""

    def losses(self, output: Output, batch: Labels) -> tuple[Tensor, Tensor | None]:
        target = cross_entropy(output.target_logit, batch.label)
        if output.source_logit is None:
            return target, None
        return target, cross_entropy(output.source_logit, batch.source_label)


class TwoHeads(PerExampleLosses):
    """With `target_head` and, where there is a source, `source_head`: the linear layers that predict."""

    target_head: torch.nn.Linear

    def heads(self) -> tuple[str, ...]:
        return ("target_head", "source_head")

    @property
    def target_feature_width(self) -> int:
        return self.target_head.in_features
