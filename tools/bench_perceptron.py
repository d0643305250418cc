"""Weights of a batch: our jagged, shared, factored attention against the padded one as released."""

from __future__ import annotations

import itertools
import math
from contextlib import ExitStack
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import HISTORIES, BehaviouralPerceptron, PerceptronInput
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.histories import History
from cdr_dist.data.lists import Lists
from tools.bench_case import Build, Case
from tools.bench_flops import perceptron_flops

ITEMS = 6000


class Padded(nn.Module):
    """Eq. (3)-(7) over histories padded to N: every position is the concatenation of e_i and E_s."""

    def __init__(self, width: int, options: PerceptronOptions) -> None:
        super().__init__()
        self.heads, self.width, inner = options.heads, width, options.heads * width
        make = lambda: nn.ModuleDict({p: nn.Linear(4 * width, inner, bias=False) for p in ("query", "key", "value")})  # noqa: E731
        self.attention = nn.ModuleDict({d: make() for d in HISTORIES})
        self.global_mlp = nn.Linear(2 * width, 1)
        sizes = [2 * inner, *options.local_hidden]
        hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.local_mlp = nn.Sequential(*hidden, nn.Linear(sizes[-1], 1))

    def forward(self, tables: dict[str, Tensor], source: Tensor, histories: dict[str, Tensor]) -> Tensor:
        """tables: domain -> [items, 2 width]; source [B, 2 width]; histories: domain -> [B, N] ids, 0 pads."""
        interests = []
        for domain, ids in histories.items():
            history = tables[domain][ids]
            x = torch.cat([history, source.unsqueeze(1).expand(-1, ids.shape[1], -1)], dim=2)
            split = lambda y, shape=ids.shape: y.view(*shape, self.heads, self.width).transpose(1, 2)  # noqa: E731
            q, k, v = (split(self.attention[domain][part](x)) for part in ("query", "key", "value"))
            shares = (q @ k.transpose(2, 3) / math.sqrt(self.width)).softmax(-1)
            out = (shares @ v).transpose(1, 2).flatten(2) * (ids != 0).unsqueeze(2)
            interests.append(out.mean(1))
        return self.global_mlp(source).squeeze(1) * self.local_mlp(torch.cat(interests, dim=1)).squeeze(1)


def cases(quick: bool, data: str) -> dict[str, Build]:
    sizes = [(16, 4, 5, 1)] if quick else [(64, 12, 20, 1), (1024, 64, 50, 1), (1024, 64, 50, 8)]
    return {
        f"batch {rows} width {width} N {n}" + (f", {draws} a history" if draws > 1 else ""): (
            partial(case, rows, width, n, draws, data)
        )
        for rows, width, n, draws in sizes
    }


def case(rows: int, width: int, longest: int, draws: int, data: str, _: ExitStack) -> Case:
    """rows: source behaviours of the batch, `draws` of them to a history."""
    options = PerceptronOptions()
    histories = _histories(rows // draws, longest, data)
    random = torch.Generator().manual_seed(8)
    size = 1 + max(int(ids.max()) for lists in histories.values() for ids in lists if len(ids))
    tables = {d: torch.randn(size, 2 * width, generator=random) for d in HISTORIES}
    source = torch.randn(rows, 2 * width, generator=random)

    # As a batch holds them: both sides find their ids made.
    found = {d: _history(histories[d], size) for d in HISTORIES}
    ours = BehaviouralPerceptron(width, options)

    @torch.no_grad()
    def jagged_forward() -> Tensor:
        return ours(
            PerceptronInput(
                item=source,
                history={d: tables[d].index_select(0, found[d].item) for d in HISTORIES},
                position={d: found[d].position for d in HISTORIES},
                lengths={d: found[d].lengths for d in HISTORIES},
            )
        )

    padded = {
        d: torch.stack(
            [torch.from_numpy(np.pad(ids, (0, longest - len(ids)))) for ids in histories[d]]
        ).repeat_interleave(draws, 0)
        for d in HISTORIES
    }
    baseline = Padded(width, options)

    @torch.no_grad()
    def padded_forward() -> Tensor:
        return baseline(tables, source, padded)

    target = 5.0 if width >= 64 else 2.0
    return Case(target, jagged_forward, padded_forward, flops=perceptron_flops(ours, found, rows))


def _history(lists: list[np.ndarray], items: int) -> History:
    of = Lists.jagged(np.concatenate(lists), np.array([len(of) for of in lists]))
    return History.of_steps(of, [len(lists)], int(of.lengths.max()), np.zeros(items, np.int32))[0]


def _histories(rows: int, longest: int, data: str) -> dict[str, list[np.ndarray]]:
    """Domain -> `rows` lists of ids: of a dataset's training rows, or lengths and items with long tails."""
    random = np.random.default_rng(8)
    if data:
        manifest = read_manifest(data)
        shards = [
            pq.read_table(f"{data}/{s.path}", columns=[f"{d}_history_item" for d in HISTORIES])
            for s in manifest.shards["train"]
        ]
        table = pa.concat_tables(shards)
        chosen = table.take(random.choice(len(table), rows))
        return {
            d: [np.asarray(ids[-longest:], dtype=np.int64) for ids in chosen[f"{d}_history_item"].to_pylist()]
            for d in HISTORIES
        }
    lengths = np.minimum(random.geometric(0.12, size=(2, rows)), longest)
    share = 1 / np.arange(1, ITEMS + 1)
    return {
        d: [1 + random.choice(ITEMS, n, p=share / share.sum()) for n in of]
        for d, of in zip(HISTORIES, lengths, strict=True)
    }
