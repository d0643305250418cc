"""Backbones of a user's own: one that shares tables and has a norm and dropout, and some that break the contract."""

from __future__ import annotations

import torch
from torch import nn

from cdr_dist.models.protocol import Output, PerExampleLosses, Spec


class Shared(PerExampleLosses):
    """One table for the categories of both domains, under a name of its own."""

    def __init__(self, width, source=True, dropout=0.0):
        super().__init__()
        self.source = source
        self.tower = nn.Sequential(nn.Linear(3 * width, 8), nn.LayerNorm(8), nn.Dropout(dropout), nn.ReLU())
        self.target_head = nn.Linear(8, 1)
        self.source_head = nn.Linear(8, 1)

    def spec(self):
        domains = ("target", "source") if self.source else ("target",)
        tables = {f"{d}_item": f"{d}_item" for d in domains} | {f"{d}_category": "topic" for d in domains}
        return Spec({"user": "user", **tables})

    def heads(self):
        return ("target_head", "source_head")

    @property
    def target_feature_width(self):
        return 8

    def forward(self, embedded, batch):
        logits = {}
        for domain in ("target", "source") if self.source else ("target",):
            parts = ("user", f"{domain}_item", f"{domain}_category")
            features = self.tower(torch.cat([embedded[p] for p in parts], dim=1))
            logits[domain] = getattr(self, f"{domain}_head")(features).squeeze(1)
            if domain == "target":
                target_features = features
        return Output(logits["target"], logits.get("source"), target_features)


class TwoColumns(Shared):
    def forward(self, embedded, batch):
        out = super().forward(embedded, batch)
        return out._replace(target_logit=out.target_logit.unsqueeze(1))


class UnknownFeature(Shared):
    def spec(self):
        return Spec({**super().spec().features, "brand": "brand"})


class NoWidth(Shared):
    @property
    def target_feature_width(self):
        return 9


class NoSourceLoss(Shared):
    """Reads the source and predicts nothing of it."""

    def forward(self, embedded, batch):
        return super().forward(embedded, batch)._replace(source_logit=None)


class LostHead(Shared):
    def heads(self):
        return ("target_head", "sourse_head")


class TargetItemsOnly(Shared):
    """Reads too little for the perceptron."""

    def __init__(self, width, source=True):
        super().__init__(width, source)
        self.tower = nn.Linear(2 * width, 8)

    def spec(self):
        return Spec({"user": "user", "target_item": "target_item", "source_item": "source_item"})

    def forward(self, embedded, batch):
        features = [self.tower(torch.cat([embedded["user"], embedded[f"{d}_item"]], 1)) for d in ("target", "source")]
        heads = (self.target_head, self.source_head)
        logits = [head(f).squeeze(1) for head, f in zip(heads, features, strict=True)]
        return Output(*logits, features[0])
