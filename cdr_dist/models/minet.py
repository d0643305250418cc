"""MiNet: a user's interests from both domains' histories, weighed twice (Ouyang et al., CIKM 2020)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cdr_dist.data.histories import History
from cdr_dist.errors import UserError
from cdr_dist.models.protocol import Labels, Output, Spec, TwoHeads


class MiNet(TwoHeads):
    """Target click from long-term interest p (the user), target interest a_t and source interest a_s (MiNet, eq. 3-11).

    Item-level attention: a_t is the mean of the target history's items r_i by their fit to the candidate q,
    softmax_i(v . ReLU(V [r_i; q; p; r_i * q])); a_s the same of the source history, whose items meet q as
    (r_i A B) * q, of rank `rank`.
    Interest-level attention: p, a_t and a_s enter the target tower times exp(h . ReLU(W [q; p; a_t; a_s]) + b), not
    normalised, b = 1, 0, 0 at first. The source tower reads [source item; p]. No biases in towers and attentions.

    An item is its id, its category and declared columns of the item files (`features`: brand, title words, …; the
    values of each are summed), so q and r have (2 + features) x width; the user, p, likewise its id and declared
    columns of the user file (`user_features`: age, region, …). `source=False` (-S): no source history, no a_s,
    no source loss. Softmax runs over real positions alone (the released code counts padding); an empty history's
    interest is 0.
    """

    def __init__(
        self,
        width: int,
        hidden: Sequence[int] = (256, 128),
        attention: int = 64,
        rank: int = 10,
        features: Sequence[str] = (),
        user_features: Sequence[str] = (),
        source: bool = True,
    ) -> None:
        super().__init__()
        if not hidden or min(attention, rank) < 1:
            raise UserError("model.hidden: at least one layer is needed; model.attention and model.rank: at least 1")
        self.source, self._parts = source, ("item", "category", *features)
        self._user = ("user", *(f"user_{column}" for column in user_features))
        item, user = len(self._parts) * width, len(self._user) * width
        self.target_attention = _ItemAttention(item, user, attention, None)
        interests = {"user": user, "target": item}
        if source:
            self.source_attention = _ItemAttention(item, user, attention, rank)
            interests["source"] = item
        self.interest = nn.ModuleDict(
            {name: _InterestWeight(item + sum(interests.values()), attention) for name in interests}
        )
        self.target_tower, self.target_head = _tower(item + sum(interests.values()), hidden)
        if source:
            self.source_tower, self.source_head = _tower(item + user, hidden)

    def spec(self) -> Spec:
        domains = ("target", "source") if self.source else ("target",)
        names = [f"{d}{of}_{part}" for d in domains for of in ("", "_history") for part in self._parts]
        return Spec({name: name for name in self._user} | {name: name.replace("_history", "") for name in names})

    def forward(self, embedded: Mapping[str, Tensor], batch: Labels) -> Output:
        """embedded: feature -> [B, width], of histories [U, width]."""
        user = torch.cat([embedded[name] for name in self._user], dim=1)
        candidate = self._items(embedded, "target")
        found = {"user": user}
        for domain in ("target", "source") if self.source else ("target",):
            attention = getattr(self, f"{domain}_attention")
            items = self._items(embedded, f"{domain}_history")
            found[domain] = attention(items, batch.histories[domain], candidate, user)
        seen = torch.cat([candidate, *found.values()], dim=1)
        weighed = [self.interest[name](seen) * of for name, of in found.items()]
        features = self.target_tower(torch.cat([candidate, *weighed], dim=1))
        logit = self.target_head(features).squeeze(1)
        if not self.source:
            return Output(logit, None, features)
        source = self.source_tower(torch.cat([self._items(embedded, "source"), user], dim=1))
        return Output(logit, self.source_head(source).squeeze(1), features)

    def _items(self, embedded: Mapping[str, Tensor], name: str) -> Tensor:
        return torch.cat([embedded[f"{name}_{part}"] for part in self._parts], dim=1)

    def initial_values(self) -> dict[str, Tensor]:
        """Heads at zero: the first losses are ln 2, and no large first step kills a tower. Interests enter with exactly
        (e, 1, 1)."""
        zero = ["target_head.weight", *(["source_head.weight"] if self.source else [])]
        zero += [f"interest.{name}.out.weight" for name in self.interest]
        named = dict(self.named_parameters())
        first = {f"interest.{name}.bias": torch.tensor(float(name == "user")) for name in self.interest}
        return {name: torch.zeros_like(named[name]) for name in zero} | first


class _ItemAttention(nn.Module):
    """The mean of a history's items r [U, item] by their fit to a candidate q [B, item] and a user p [B, user]."""

    def __init__(self, item: int, user: int, size: int, rank: int | None) -> None:
        super().__init__()
        self.of_item, self.of_candidate = (nn.Linear(item, size, bias=False) for _ in range(2))
        self.of_user, self.of_product = nn.Linear(user, size, bias=False), nn.Linear(item, size, bias=False)
        self.out = nn.Linear(size, 1, bias=False)
        self.transfer = (
            None
            if rank is None
            else nn.Sequential(nn.Linear(item, rank, bias=False), nn.Linear(rank, item, bias=False))
        )

    def forward(self, items: Tensor, history: History, candidate: Tensor, user: Tensor) -> Tensor:
        """-> [B, item]; B / len(history) candidates after one another share a history."""
        place, real = history.padded()
        if not place.shape[1]:
            return torch.zeros_like(candidate)
        moved = items if self.transfer is None else self.transfer(items)
        shape = (len(place), len(candidate) // len(place))  # histories, candidates of each
        rows, other, of_rows = (
            torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, place.flatten()).view(*place.shape, -1)
            for x in (items, moved, self.of_item(items))
        )
        product = other.unsqueeze(1) * candidate.view(*shape, 1, -1)  # [H, copies, n, item]
        of_pair = (self.of_candidate(candidate) + self.of_user(user)).view(*shape, 1, -1)
        score = self.out((of_rows.unsqueeze(1) + of_pair + self.of_product(product)).relu()).squeeze(3)
        share = _softmax(score, real.unsqueeze(1))
        return (share @ rows).view(len(candidate), -1)


class _InterestWeight(nn.Module):
    """exp(h . ReLU(W z) + b), [B, 1]."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.seen, self.out = nn.Linear(width, size, bias=False), nn.Linear(size, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        weight: Tensor = (self.out(self.seen(z).relu()) + self.bias).exp()
        return weight


def _softmax(score: Tensor, real: Tensor) -> Tensor:
    """Over the last dimension, of real positions; zeros where there is none."""
    share = score.masked_fill(~real, torch.finfo(score.dtype).min).softmax(-1)
    return share * real


def _tower(width: int, hidden: Sequence[int]) -> tuple[nn.Sequential, nn.Linear]:
    layers = [[nn.Linear(a, b, bias=False), nn.ReLU()] for a, b in itertools.pairwise([width, *hidden])]
    return nn.Sequential(*itertools.chain(*layers)), nn.Linear(hidden[-1], 1, bias=False)
