"""DASL: two domains' sequences, each read by both, and users joined by an orthogonal map (Li et al., KDD 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cdr_dist.data.histories import History
from cdr_dist.errors import UserError
from cdr_dist.models.protocol import Labels, Output, Spec, TwoHeads


class DASL(TwoHeads):
    """Dual embedding and dual attention.

    A domain's users have rows of their own; a head reads its user's row and the other domain's, moved by one
    orthogonal matrix X there and by its inverse back. Each item domain has a GRU over steps [item; category; user];
    for a prediction it reads the domain's own behaviours and, with the same user's row, the other domain's, `recent` at
    most of each. What it says at all steps of both is weighed by one softmax of v . tanh(W x + b): the preference. The
    head is [preference; item; category; user] -> norm -> hidden (sigmoid) -> 1.

    For a source behaviour only what came before it is read (the released code shows the target item as the last
    step). X is orthogonal by construction (Cayley), where the released code never applies its penalty; a norm over each
    row stands for batch norm, which would couple the rows of a batch and so of workers; biases of items and users are
    left to the norm's layer. `source=False` (-S): the target's own behaviours alone.
    """

    def __init__(
        self, width: int, hidden: Sequence[int] = (80, 40), memory: int = 128, recent: int = 10, source: bool = True
    ) -> None:
        super().__init__()
        if not hidden or min(memory, recent) < 1:
            raise UserError("model.hidden: at least one layer is needed; model.memory and model.recent: at least 1")
        self.source, self.recent = source, recent
        self.domains = ("target", "source") if source else ("target",)
        self.memory = nn.ModuleDict({d: nn.GRU(3 * width, memory, batch_first=True) for d in self.domains})
        self.attention = nn.ModuleDict({d: _Attention(memory) for d in self.domains})
        self._memory = memory
        self.target_tower, self.target_head = _tower(memory + 3 * width, hidden)
        if source:
            self.source_tower, self.source_head = _tower(memory + 3 * width, hidden)
            self.skew = nn.Parameter(torch.zeros(width, width))

    def spec(self) -> Spec:
        names = [f"{d}{of}_{part}" for d in self.domains for of in ("", "_history") for part in ("item", "category")]
        users = {"user": "user"} | ({"source_user": "source_user"} if self.source else {})
        return Spec(users | {name: name.replace("_history", "") for name in names})

    def forward(self, embedded: Mapping[str, Tensor], batch: Labels) -> Output:
        """embedded: feature -> [B, width], of histories [U, width]."""
        user = {"target": embedded["user"]} | ({"source": embedded["source_user"]} if self.source else {})
        ends = {d: batch.histories[d].lengths for d in self.domains}
        target = self._features("target", embedded, batch, user, ends)
        logit = self.target_head(target).squeeze(1)
        if not self.source:
            return Output(logit, None, target)
        source = self._features("source", embedded, batch, user, ends | {"source": batch.source_before})
        return Output(logit, self.source_head(source).squeeze(1), target)

    def initial_values(self) -> dict[str, Tensor]:
        """Heads at zero: the first losses are ln 2. X is the identity."""
        named = dict(self.named_parameters())
        return {n: torch.zeros_like(named[n]) for n in named if n == "skew" or n.endswith("_head.weight")}

    def orthogonal(self) -> Tensor:
        """X = (I - A) (I + A)^-1 with A skew-symmetric, [width, width]."""
        a, one = self.skew - self.skew.T, torch.eye(len(self.skew), dtype=self.skew.dtype, device=self.skew.device)
        return torch.linalg.solve(one + a, one - a, left=False)

    def _features(
        self,
        domain: str,
        embedded: Mapping[str, Tensor],
        batch: Labels,
        users: dict[str, Tensor],
        ends: dict[str, Tensor],
    ) -> Tensor:
        """What a domain's head reads, [B, k]. ends: of each domain, before which step its behaviours are read."""
        user, rows = users[domain], len(users[domain])
        steps, real = [], []
        for of in self.domains:
            said, there = self._memories(of, embedded, batch.histories[of], user, ends[of])
            steps.append(said.repeat_interleave(rows // len(said), 0))
            real.append(there.repeat_interleave(rows // len(there), 0))
        preference = self.attention[domain](torch.cat(steps, dim=1), torch.cat(real, dim=1))
        if self.source:
            x = self.orthogonal()
            user = user + (users["source"] @ x if domain == "target" else users["target"] @ x.T)
        parts = [preference, embedded[f"{domain}_item"], embedded[f"{domain}_category"], user]
        features: Tensor = getattr(self, f"{domain}_tower")(torch.cat(parts, dim=1))
        return features

    def _memories(
        self, of: str, embedded: Mapping[str, Tensor], history: History, user: Tensor, ends: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a domain's GRU says at each step before `ends` [n], read with some user's row: [n, steps, memory], and
        which steps there are."""
        place, real = history.before(ends, self.recent)
        items = torch.cat([embedded[f"{of}_history_item"], embedded[f"{of}_history_category"]], dim=1)
        if not place.numel():
            return user.new_zeros(len(ends), 0, self._memory), real
        filled = torch.cat([items, items.new_zeros(1, items.shape[1])])
        rows = filled.index_select(0, place.flatten()).view(*place.shape, -1)
        own = user[:: len(user) // len(ends)].unsqueeze(1).expand(-1, place.shape[1], -1)
        said, _ = self.memory[of](torch.cat([rows, own], dim=2))
        return said, real


class _Attention(nn.Module):
    """The mean of x [B, n, k] by softmax(v . tanh(W x + b)) over what is real [B, n]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seen, self.out = nn.Linear(width, width), nn.Linear(width, 1, bias=False)

    def shares(self, x: Tensor, real: Tensor) -> Tensor:
        """[B, n]; zeros where nothing is real."""
        score = self.out(self.seen(x).tanh()).squeeze(2)
        share: Tensor = score.masked_fill(~real, torch.finfo(score.dtype).min).softmax(1) * real
        return share

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        if not x.shape[1]:
            return x.new_zeros(len(x), x.shape[2])
        return (self.shares(x, real).unsqueeze(1) @ x).squeeze(1)


def _tower(width: int, hidden: Sequence[int]) -> tuple[nn.Sequential, nn.Linear]:
    layers = [[nn.Linear(a, b), nn.Sigmoid()] for a, b in itertools.pairwise([width, *hidden])]
    return nn.Sequential(nn.LayerNorm(width), *itertools.chain(*layers)), nn.Linear(hidden[-1], 1)
