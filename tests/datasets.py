"""Small datasets with planted truth, written once a session and shared by the tests; nobody writes into them."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import polars as pl

from cdr_dist.data.dataset import checksum_of
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions, options_from_words
from cdr_dist.data.synthetic import Planted, planted_logs
from cdr_dist.data.truth import FILE

USERS = 300
SHAPE = Planted(users=USERS, target_behaviours=6, source_behaviours=10, target_items=80, source_items=150, seed=8)


@functools.cache
def scratch() -> Path:
    """A folder for the session; made on first use, because workers import this, too, and are killed at the end."""
    made = Path(tempfile.mkdtemp(prefix="cdr-tests-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@functools.cache
def rated() -> Path:
    """1,200 training rows in 4 shards, stored labels; 300 rows each of validation and test; truth.parquet."""
    return _written("rated", labels="rating")


@functools.cache
def sampled() -> Path:
    """The same logs as implicit feedback: training negatives are drawn, 5 negatives a row are stored."""
    return _written("sampled", labels="sampled", eval_negatives=5)


@functools.cache
def sequenced() -> Path:
    """The same as sequences to pre-train on, and (source sequence -> target item) instances split by user."""
    return _written("sequenced", labels="sampled", eval_negatives=5, sequences=8, history_length=8, split="user")


def copied(dataset: Path, into: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(dataset, into / dataset.name))


def edited(dataset: Path, **values: object) -> Path:
    """A copy's manifest as if it had been written with these top-level entries; None removes one."""
    path = dataset / "manifest.json"
    raw = {n: value for n, value in (json.loads(path.read_text()) | values).items() if value is not None}
    path.write_text(json.dumps(raw | {"checksum": checksum_of(raw)}))
    return dataset


def _written(name: str, **options) -> Path:
    out, raw = scratch() / name, scratch() / f"{name}-logs"
    raw.mkdir()
    logs = planted_logs(SHAPE)
    for domain in ("source", "target"):
        getattr(logs, domain).write_parquet(raw / f"{domain}.parquet")
    prepare(
        PrepareOptions(
            source=str(raw / "source.parquet"),
            target=str(raw / "target.parquet"),
            out=str(out),
            rows_per_shard=USERS,
            seed=8,
            **options,
        )
    )
    logs.truth.write_parquet(out / FILE)
    return out


def rows_of(dataset: Path, split: str) -> pl.DataFrame:
    """Every stored row of a split."""
    return pl.read_parquet(sorted((dataset / split).glob("*.parquet")))


@functools.cache
def described() -> Path:
    """`rated` with item files that name a brand and a title of some words for most items, and a user file that names
    a region and up to two hobbies of five in six users."""
    out, raw = scratch() / "described", scratch() / "described-logs"
    raw.mkdir()
    logs = planted_logs(SHAPE)
    for domain in ("source", "target"):
        log = getattr(logs, domain)
        log.write_parquet(raw / f"{domain}.parquet")
        items = log.select("item_id", "category").unique("item_id").sort("item_id").with_row_index("n")
        words = [" ".join(f"W{n * k % 7}" for k in range(1, 1 + n % 4)) for n in items["n"]]
        brands = [f"brand {n % 5}" if n % 6 else None for n in items["n"]]
        items = items.drop("n").with_columns(brand=pl.Series(brands, dtype=pl.String), title=pl.Series(words))
        items.write_parquet(raw / f"{domain}_items.parquet")
    users = logs.target.select("user_id").unique().sort("user_id").with_row_index("n").filter(pl.col("n") % 6 > 0)
    users = users.with_columns(region="region " + (pl.col("n") % 4).cast(pl.String))
    users = users.with_columns(hobbies=pl.concat_str("h" + (pl.col("n") % 3).cast(pl.String), pl.lit("|chess")))
    users.drop("n").write_parquet(raw / "users.parquet")
    prepare(
        options_from_words(
            [f"{role}={raw}/{role}.parquet" for role in ("source", "target")]
            + [f"{role}_items={raw}/{role}_items.parquet" for role in ("source", "target")]
            + [f"out={out}", f"rows_per_shard={USERS}", "item_columns.features=brand,title:words"]
            + [f"user_file={raw}/users.parquet", "user_columns.features=region,hobbies:|"]
        )
    )
    return out
