"""The dense part of a finished run as a program of its own: embeddings in, logits out, with torch alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdr_dist.data.feature_names import DOMAINS, of_history
from cdr_dist.errors import UserError
from cdr_dist.models.protocol import Backbone


class Padded:
    """A `History` of B rows with a history each, whose items are given as [B * longest, width]."""

    def __init__(self, lengths: Tensor, longest: int) -> None:
        self.lengths, self._longest = lengths, longest

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def padded(self) -> tuple[Tensor, Tensor]:
        place = torch.arange(self.lengths.shape[0] * self._longest, device=self.lengths.device)
        real = torch.arange(self._longest, device=self.lengths.device) < self.lengths.unsqueeze(1)
        return place.view(-1, self._longest), real

    def before(self, ends: Tensor, most: int) -> tuple[Tensor, Tensor]:
        size = min(most, self._longest)
        first = (ends - size).clamp(min=0).unsqueeze(1)
        within = first + torch.arange(size, device=ends.device)
        rows = torch.arange(ends.shape[0], device=ends.device).unsqueeze(1)
        real = within < ends.unsqueeze(1)
        return rows * self._longest + within.clamp(max=self._longest - 1), real


@dataclass
class _Rows:
    label: Tensor
    source_label: Tensor
    histories: dict[str, Padded]
    source_before: Tensor
    draws: Tensor


class Scorer(nn.Module):
    """Target logits [B] of features [B, width], of histories [B, longest, width], oldest first, and lengths [B]."""

    def __init__(self, model: Backbone, longest: int) -> None:
        super().__init__()
        self.model, self._longest = model, longest
        self._histories = {f for f in model.spec().features if of_history(f)}
        self._draws = int(getattr(model, "draws", 0))

    def forward(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> Tensor:
        # The first row comes again at the end: a program for any number of rows need not hold for one alone.
        more = {f: torch.cat([x, x[:1]]) for f, x in features.items()}
        embedded = {f: x.flatten(0, 1) if f in self._histories else x for f, x in more.items()}
        some = next(iter(more.values()))
        nothing = some.new_zeros(some.shape[0])
        histories = {domain: Padded(torch.cat([of, of[:1]]), self._longest) for domain, of in lengths.items()}
        draws = some.new_full((some.shape[0], self._draws), 0.5)  # no score depends on them: `exported` has looked
        batch: Any = _Rows(nothing, nothing, histories, nothing.long(), draws)
        logit: Tensor = self.model(embedded, batch).target_logit
        return logit[:-1]


class _Read(dict[str, Tensor]):
    """Remembers which features were asked for."""

    def __init__(self, features: Mapping[str, Tensor]) -> None:
        super().__init__(features)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.asked.add(name)
        return super().__getitem__(name)


@torch.no_grad()
def features_of(model: Any, width: int, longest: int) -> list[str]:
    """What scoring reads; losses may read more. UserError: scores by what is drawn or planted for a user."""
    generator = torch.Generator().manual_seed(0)
    features = model.spec().features
    embedded = _Read(
        {f: torch.randn(2 * longest if of_history(f) else 2, width, generator=generator) for f in features}
    )
    nothing, draws = torch.zeros(2), int(getattr(model, "draws", 0))
    histories = {d: Padded(torch.full((2,), longest), longest) for d in DOMAINS}
    was = model.training
    model.eval()
    scores = []
    for drawn in (0.01, 0.99):
        batch: Any = _Rows(nothing, nothing, histories, nothing.long(), torch.full((2, draws), drawn))
        scores.append(model(embedded, batch).target_logit)
    model.train(was)
    if not torch.equal(*scores):
        raise UserError(
            "what is drawn or planted for each user decides the scores (uaf_random, uaf_oracle), which no program "
            "elsewhere knows"
        )
    return [f for f in features if f in embedded.asked]


def exported(model: Any, width: int, longest: int) -> torch.export.ExportedProgram:
    """Of `features_of` the model. UserError: a backbone that torch.export cannot take, or that draws."""
    names = features_of(model, width, longest)
    domains = sorted({f.partition("_")[0] for f in names if of_history(f)})
    features = {f: torch.zeros(2, longest, width) if of_history(f) else torch.zeros(2, width) for f in names}
    lengths = {domain: torch.full((2,), longest) for domain in domains}
    rows = torch.export.Dim("rows", min=1)
    shapes = ({f: {0: rows} for f in features}, {domain: {0: rows} for domain in domains})
    try:
        with torch.no_grad():
            return torch.export.export(
                Scorer(model, longest).eval(), (features, lengths), dynamic_shapes=shapes, strict=True
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model={type(model).__name__.lower()}: torch.export cannot take it ({reason})") from error
