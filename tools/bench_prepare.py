"""Raw logs to a dataset: ours against polars on one thread, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions
from tools.bench_case import ONE_THREAD, Build, Case, Run, peak_rss_gb
from tools.bench_data import scratch
from tools.bench_prepare_polars import polars

PIECE_ROWS = 4_000_000
"""Rows of one log file."""
SOURCE_SHARE = 0.8
PER_USER = 50
"""Interactions of a user in both domains."""


def cases(quick: bool, data: str) -> dict[str, Build]:
    sizes = [5000] if quick else [1_000_000, 5_000_000, 20_000_000]
    return {f"{rows} interactions": partial(case, rows) for rows in sizes}


def case(rows: int, held: ExitStack) -> Case:
    logs = Path(scratch(held))
    write_logs(logs, rows)
    ours, baseline = (partial(_in_a_process, side, logs, held) for side in ("ours", "polars"))
    millions = rows / 1e6
    rounds = 3 if rows <= 1_000_000 else 1
    return Case(0.5, ours, baseline, unit="1M interactions", units=(millions, millions), rounds=rounds)


def write_logs(folder: Path, rows: int) -> None:
    """Parquet logs of both domains in the order of nothing: items with a long tail, a category each."""
    random = np.random.default_rng(8)
    users = max(1, rows // PER_USER)
    for domain, share, items in (("source", SOURCE_SHARE, 200_000), ("target", 1 - SOURCE_SHARE, 60_000)):
        (folder / domain).mkdir(parents=True)
        left = round(rows * share)
        for number in range(-(-left // PIECE_ROWS)):
            n = min(PIECE_ROWS, left - number * PIECE_ROWS)
            item = (items * random.random(n) ** 3).astype(np.int64)
            frame = pl.DataFrame(
                {
                    "user": random.integers(0, users, n),
                    "item": item,
                    "timestamp": random.integers(1_300_000_000, 1_400_000_000, n),
                    "rating": random.integers(1, 6, n).astype(np.float64),
                    "category": item % 300,
                }
            )
            frame = frame.select(
                pl.format("user{}", "user").alias("user_id"),
                pl.format(domain + "{}", "item").alias("item_id"),
                "timestamp",
                "rating",
                pl.format("category{}", "category").alias("category"),
            )
            frame.write_parquet(folder / domain / f"part-{number:03d}.parquet")


def _in_a_process(side: str, logs: Path, held: ExitStack) -> Run:
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench_prepare", side, str(logs), f"{scratch(held)}/out"],
        cwd=Path(__file__).resolve().parent.parent,
        env=os.environ | ONE_THREAD | {"ARROW_IO_THREADS": "1"},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Run(**json.loads(done.stdout))


def ours(logs: Path, out: Path) -> None:
    prepare(PrepareOptions(source=str(logs / "source"), target=str(logs / "target"), out=str(out)))


def main(side: str, logs: str, out: str) -> None:
    start = time.perf_counter()
    {"ours": ours, "polars": polars}[side](Path(logs), Path(out))
    done = Run(time.perf_counter() - start, peak_rss_gb(), _page_bytes(logs) + _page_bytes(out))
    print(json.dumps(asdict(done)))


def _page_bytes(folder: str) -> int:
    """Of all Parquet files, encoded but not compressed."""
    found = (pq.read_metadata(file) for file in Path(folder).rglob("*.parquet"))
    return sum(m.row_group(i).total_byte_size for m in found for i in range(m.num_row_groups))


if __name__ == "__main__":
    main(*sys.argv[1:])
