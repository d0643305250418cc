"""How finished runs on planted sequences rank for aligned and contrary users: HR@5 and MRR@5 among stored negatives.

    python tools/by_kind.py runs/experiments/uaf_table2/runs/demo_sequences/nextitnet/*/seed-*

A row for every folder above the runs: the mean over its runs, ± the standard deviation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cdr_dist.data.demo import dataset_of
from cdr_dist.data.truth import kinds_of_users
from cdr_dist.evaluation.metrics import gains_at_ranks
from cdr_dist.evaluation.table import markdown
from cdr_dist.jobs import run_job
from cdr_dist.training.run_folder import SCORES, RunFolder

K = 5
Gains = dict[str, float]
"""kind, metric -> value."""


def gains(scores: pl.DataFrame, kinds: pl.DataFrame) -> Gains:
    """scores: user, example, label, score. kinds: user (id), kind."""
    positives = scores.filter(pl.col("label") > 0).select("user", "example", own="score")
    others = scores.filter(pl.col("label") == 0).join(positives.select("example", "own"), on="example")
    counted = others.group_by("example").agg(
        above=(pl.col("score") > pl.col("own")).sum(), tied=1 + (pl.col("score") == pl.col("own")).sum()
    )
    rows = positives.join(counted, on="example").join(kinds, on="user")
    found = {}
    for (kind,), of in rows.sort("example").group_by("kind"):
        values = gains_at_ranks(*(of[name].to_numpy().astype(np.int64) for name in ("above", "tied")), [K])
        found |= {f"{kind} {metric}@{K}": values[f"{metric}@{K}"] for metric in ("hr", "mrr")}
    return found


def of_run(folder: str) -> Gains:
    data = dataset_of(RunFolder(folder).config().data)
    users = pl.read_parquet(Path(data, "vocab", "user.parquet")).select("key", user=pl.col("id").cast(pl.Int64))
    kinds = kinds_of_users(data)
    known = users.filter(pl.col("key").is_in(list(kinds)))
    kind = known.with_columns(kind=pl.Series([kinds[key] for key in known["key"]])).drop("key")
    scores = pl.read_parquet(Path(folder, SCORES)).with_columns(pl.col("user").cast(pl.Int64))
    return gains(scores, kind)


def rows(folders: Sequence[str]) -> Iterator[list[str]]:
    found: dict[str, list[Gains]] = {}
    for folder in folders:
        if not RunFolder(folder).config().recipe.target:  # a run of sequences alone ranks no target item
            continue
        found.setdefault(Path(folder).absolute().parent.name, []).append(of_run(folder))
    for name, of in found.items():
        columns = [[gain[column] for gain in of] for column in COLUMNS]
        sd = [f" ± {np.std(column, ddof=1):.4f}" if len(of) > 1 else "" for column in columns]
        yield [name, str(len(of)), *(f"{np.mean(c):.4f}{s}" for c, s in zip(columns, sd, strict=True))]


COLUMNS = [f"{kind} {metric}@{K}" for kind in ("aligned", "contrary") for metric in ("hr", "mrr")]


def main(words: list[str]) -> None:
    print(markdown(["method", "runs", *COLUMNS], list(rows(words))))


if __name__ == "__main__":
    sys.exit(run_job("by_kind", __doc__, main))
