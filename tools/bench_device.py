"""The product's own work on a GPU against the same on all cores of its machine; without a GPU only --quick runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from cdr_dist.errors import UserError
from cdr_dist.training.full_ranking import full_ranking
from tools.bench_case import Build, Case
from tools.bench_data import Shape, scratch, written
from tools.bench_evaluate import generated
from tools.bench_training import Training


def cases(quick: bool, data: str) -> dict[str, Build]:
    if not quick and not torch.cuda.is_available():
        raise UserError("device: this machine has no CUDA device")
    found: dict[str, Build] = {
        f"{recipe}, batch {batch}, width {width}": partial(steps_case, quick, recipe, batch, width)
        for recipe in ("joint", "biao")
        for batch, width in (((64, 8),) if quick else ((2048, 12), (2048, 64), (16384, 12), (16384, 64)))
    }
    items = 300 if quick else 944_000
    return found | {
        f"pre-training, {items} items": partial(pretrain_case, quick, items),
        "full ranking, K 10": partial(ranking_case, quick),
    }


def steps_case(quick: bool, recipe: str, batch: int, width: int, held: ExitStack) -> Case:
    """CoNet with histories of 30 on average, an upper step in 20; batches are held in memory."""
    users = 300 if quick else 200_000
    folder = written(held, Shape(4 * batch, users, 5 * users, users, history=30))
    words = [f"recipe={recipe}", f"batch.size={batch}", f"tables.width={width}", "upper.interval=20"]
    return _case(held, folder, words, lambda training: training.steps(20), "step", 20, resident=3)


def pretrain_case(quick: bool, items: int, held: ExitStack) -> Case:
    """NextItNet of eight blocks with 1,000 shared negatives, sequences of 50."""
    batch, width, steps = (8, 8, 2) if quick else (128, 128, 8)
    folder = written(held, Shape(64, 64, items, 64, history=0, sequences=batch * 2 * steps, length=50))
    words = [
        "recipe=pretrain",
        "model=nextitnet",
        "model.dilations=[1,4,1,4]",
        f"tables.width={width}",
        f"batch.size={batch}",
        f"batch.sequences={batch}",
        "batch.history_length=50",
        f"softmax.negatives={min(1000, items)}",
    ]
    return _case(held, folder, words, lambda training: training.steps(steps), "step", steps)


def ranking_case(quick: bool, held: ExitStack) -> Case:
    """Every user's test row among all items, matrix factorisation as it starts."""
    users, items, width = (60, 40, 8) if quick else (100_000, 20_000, 128)
    folder = generated(f"{scratch(held)}/data", users, items)
    words = ["model=mf", "recipe=target_only", f"tables.width={width}", "evaluation.batch_size=16384"]
    unit = f"{users} x {items} pairs"
    return _case(held, folder, words, lambda training: full_ranking(training.session, "test", (10,)), unit)


def _case(
    held: ExitStack,
    folder: str,
    words: list[str],
    work: Callable[[Training], Any],
    unit: str,
    units: int = 1,
    resident: int = 0,
) -> Case:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    there = Training(held, folder, [*words, f"trainer.device={device}"], resident)
    here = Training(held, folder, [*words, "trainer.device=cpu"], resident)

    def ours() -> None:
        work(there)
        if device == "cuda":
            torch.cuda.synchronize()

    def baseline() -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        work(here)
        torch.set_num_threads(1)

    return Case(1.0, ours, baseline, unit=unit, units=(units, units), rounds=3)
