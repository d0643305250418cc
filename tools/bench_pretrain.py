"""Pre-training NextItNet on two workers, from the stream, against a plain loop of dense PyTorch on as many threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.models.causal import DILATIONS, KERNEL
from tests.processes import on_workers
from tools.bench_case import Build, Case, Run, peak_rss_gb
from tools.bench_data import Shape, written
from tools.bench_training import Training

WORKERS = 2
LENGTH, NEGATIVES = 50, 1000


def cases(quick: bool, data: str) -> dict[str, Build]:
    if quick:
        return {"tiny": partial(case, 300, 8, 8, (1, 4), 2)}
    return {
        f"{items} items x 128, batch {batch}": partial(case, items, 128, batch, DILATIONS, 4)
        for items, batch in ((944_000, 128), (20_000, 128))
    }


def case(items: int, width: int, batch: int, dilations: Sequence[int], steps: int, held: ExitStack) -> Case:
    folder = written(held, Shape(64, 64, items, 64, history=0, sequences=batch * (steps + 1), length=LENGTH))
    negatives, few = min(NEGATIVES, items), max(1, steps // 2)
    words = [
        "recipe=pretrain",
        "model=nextitnet",
        f"model.dilations=[{','.join(map(str, dilations))}]",
        f"tables.width={width}",
        f"batch.size={batch}",
        f"batch.history_length={LENGTH}",
        f"softmax.negatives={negatives}",
    ]
    plain = _Plain(items + FIRST_ID, width, dilations)
    baseline = partial(_plain_steps, plain, torch.optim.Adam(plain.parameters(), lr=1e-3, fused=True), batch, few)
    of_position = 2 * len(dilations) * 2 * KERNEL * width * width + 2 * negatives * width
    flops = 3 * of_position * batch * (LENGTH - 1) / WORKERS
    return Case(1.0, partial(_ours, folder, words, steps), baseline, "step", (steps, few), flops, rounds=3)


def _ours(folder: str, words: Sequence[str], steps: int) -> Run:
    found = on_workers(WORKERS, _worker, folder, words, steps, timeout=1200)
    return Run(*(max(values) for values in zip(*found, strict=True)))


def _worker(rank: int, folder: str, words: Sequence[str], steps: int) -> tuple[float, float]:
    with ExitStack() as held:
        training = Training(held, folder, words)
        training.steps(1)
        dist.barrier()
        return training.seconds(steps), peak_rss_gb()


class _Plain(nn.Module):
    """What one writes from the paper: nn.Embedding, nn.Conv1d, a softmax among the item and shared negatives."""

    def __init__(self, rows: int, width: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.items, self.out = nn.Embedding(rows, width, padding_idx=0), nn.Embedding(rows, width)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, KERNEL, dilation=d) for first in dilations for d in (first, 2 * first)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.convolutions)

    def forward(self, ids: Tensor, negatives: Tensor) -> Tensor:
        x = self.items(ids)
        for i in range(0, len(self.convolutions), 2):
            y = x
            for convolution, norm in zip(self.convolutions[i : i + 2], self.norms[i : i + 2], strict=True):
                reach = (KERNEL - 1) * convolution.dilation[0]
                y = norm(convolution(functional.pad(y.transpose(1, 2), (reach, 0))).transpose(1, 2)).relu()
            x = x + y
        hidden, coming = x[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        own = (hidden * self.out(coming)).sum(1, keepdim=True)
        logits = torch.cat([own, hidden @ self.out(negatives).T], dim=1)
        return functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64))


def _plain_steps(model: _Plain, optimiser: Any, batch: int, steps: int) -> Run:
    """On as many threads as ours has workers."""
    torch.set_num_threads(WORKERS)
    rows = len(model.items.weight)
    ids, negatives = (torch.randint(FIRST_ID, rows, of) for of in ((batch, LENGTH), (min(NEGATIVES, rows - 2),)))
    start = time.perf_counter()
    for _ in range(steps):
        model(ids, negatives).backward()
        optimiser.step()
        optimiser.zero_grad()
    seconds = time.perf_counter() - start
    torch.set_num_threads(1)
    return Run(seconds, peak_rss_gb())
