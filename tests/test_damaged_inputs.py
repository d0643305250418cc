"""Seeded damage to whatever a job reads: it works as if nothing were, or one line.

CDR_DAMAGED=200 CDR_SEED=3 python -m pytest tests/test_damaged_inputs.py tries more of them, and others.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.training.evaluation_job import evaluation_job
from cdr_dist.training.job import train_job
from tests.crashes import job
from tests.datasets import rated, scratch
from tests.runs import newest, summary, words

INPUTS = int(os.environ.get("CDR_DAMAGED", "20"))
SEED = int(os.environ.get("CDR_SEED", "8"))
KINDS = ["shard", "vocabulary", "manifest", "configuration", "checkpoint", "evaluated", "metrics", "summary"]
KINDS += ["log", "Parquet log", "start vectors"]
STEPS = ("trainer.max_steps=6", "trainer.checkpoint_every=3", "evaluation.every=3", "trainer.keep=1")


def given(data, run, steps=6):
    return words(data, run, "recipe=biao", "upper.interval=2", *STEPS, f"trainer.max_steps={steps}")


@functools.cache
def undamaged():
    """A dataset, its logs, and a run on it -> their folder."""
    folder = scratch() / "undamaged"
    shutil.copytree(rated(), folder / "data")
    assert job("train", train_job, given(folder / "data", folder / "run")) == 0
    assert job("train", train_job, given(folder / "data", folder / "more", 9)) == 0
    (folder / "logs").mkdir()
    draw = random.Random(1)
    for domain in ("source", "target"):
        lines = [
            f"u{draw.randrange(40)},{domain[0]}{draw.randrange(30)},{t},{draw.randrange(1, 6)},c{draw.randrange(3)}"
            for t in range(900)
        ]
        log = folder / "logs" / f"{domain}.csv"
        log.write_text("user_id,item_id,timestamp,rating,category\n" + "\n".join(lines))
        pl.read_csv(log).write_parquet(log.with_suffix(".parquet"), row_group_size=200)
    keys = pl.read_parquet(folder / "data/vocab/user.parquet")["key"].to_list()
    vectors = [[draw.gauss(0, 1) for _ in range(12)] for _ in keys]
    start = pa.table({"id": keys, "vector": pa.array(vectors, pa.list_(pa.float32()))})
    pq.write_table(start, folder / "start.parquet", row_group_size=100)
    return folder


@functools.cache
def measured():
    """What `evaluate` says of the undamaged run."""
    screen = scratch() / "undamaged-screen"
    assert job("evaluate", evaluation_job, [f"run={undamaged() / 'run'}"], screen=screen) == 0
    return told_by(screen)


def told_by(screen):
    """step and metrics that `evaluate` has printed."""
    text = screen.read_text()
    found = json.loads(text[text.index("{") :])
    return found["step"], found["metrics"]


def prepared(logs, out, kind="csv"):
    return [f"source={logs}/source.{kind}", f"target={logs}/target.{kind}", f"out={out}"]


def one_of(checkpoint, draw):
    """A file of a checkpoint: half of the time the one with nearly all of it, the tables' rows."""
    files = sorted(checkpoint.iterdir())
    return draw.choice([*files, *[f for f in files if f.suffix == ".bin"] * (len(files) - 1)])


def damaged(path, draw):
    """Damages a file -> what was done."""
    content = bytearray(path.read_bytes())
    at, kind = draw.randrange(len(content)), draw.choice(["flip", "cut", "zeros", "noise", "remove", "swap", "empty"])
    span = slice(at, at + draw.randrange(1, 400))
    if kind == "flip":
        content[at] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zeros":
        content[span] = bytes(len(content[span]))
    elif kind == "noise":
        content[span] = draw.randbytes(len(content[span]))
    elif kind == "swap":
        content = content[at:] + content[:at]
    elif kind == "empty":
        content.clear()
    path.unlink()
    if kind != "remove":
        path.write_bytes(content)
    return f"{kind} of {path.name} at {at}"


def rewritten(path, draw):
    """Changes one value of a JSON file to another that parses -> what was done."""
    raw = json.loads(path.read_text())
    node, names = raw, []
    while isinstance(node, dict | list) and len(node):
        holder, name = node, draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node, names = node[name], [*names, name]
    value = draw.choice([None, -1, "", 10**9, [], {}, "../../etc", 0.5, True])
    holder[name] = value
    path.write_text(json.dumps(raw))
    return f"{names} = {value!r}"


@pytest.mark.parametrize("number", range(INPUTS))
def test_damage_is_named_or_harmless(number, tmp_path):
    told, code, same, shown = tried(KINDS[number % len(KINDS)], random.Random(f"{SEED} {number}"), tmp_path)
    assert code in (0, 2), f"{told}: exit code {code}\n{shown}"
    assert "Traceback" not in shown, f"{told}\n{shown}"
    if code:
        (line,) = _own(shown)
        assert str(tmp_path) in line, f"{told}\n{line}"
    assert same, f"{told}: went on with damaged data"


@pytest.mark.parametrize("kind", KINDS)
def test_without_damage_the_same_jobs_succeed(kind, tmp_path, monkeypatch):
    for damage in ("damaged", "rewritten"):
        monkeypatch.setitem(globals(), damage, lambda path, draw: "nothing")
    _, code, same, shown = tried(kind, random.Random(SEED), tmp_path)
    assert code == 0, shown
    assert same


def tried(kind, draw, tmp_path):
    """Damages a file of that kind and runs a job that reads it -> what was done, exit code, right or not, screen."""
    shutil.copytree(undamaged(), tmp_path / "d")
    folder, screen = tmp_path / "d", tmp_path / "screen"
    data, run = folder / "data", folder / "run"
    here = undamaged() / "data"  # as the run's configuration says: on a copy no run goes on

    def ends_as(run, whole):
        return summary(run)["parameters_sha256"] == summary(folder / whole)["parameters_sha256"]

    if kind in ("log", "Parquet log"):
        ending = "csv" if kind == "log" else "parquet"
        told = damaged(folder / "logs" / f"{draw.choice(['source', 'target'])}.{ending}", draw)
        code = job("prepare", prepare_job, prepared(folder / "logs", folder / "again", ending), screen=screen)
        # A log has no checksum: a changed one is another log. What is written is whole.
        same = code != 0 or read_manifest(str(folder / "again")).counts["users"] > 0
    elif kind == "start vectors":
        told = damaged(folder / "start.parquet", draw)
        start = [*given(data, folder / "new"), f"tables.start.user={folder}/start.parquet"]
        code = job("train", train_job, start, screen=screen)
        same = code != 0 or summary(folder / "new")["started"]["user"] > 0  # as of a log
    elif kind == "evaluated":
        told = damaged(one_of(run / f"checkpoints/step-{measured()[0]:08d}", draw), draw)
        code = job("evaluate", evaluation_job, [f"run={run}"], screen=screen)
        # Without its mark a checkpoint is none, and the one before is measured.
        other = "remove of COMPLETE" in told and code == 0 and told_by(screen)[0] != measured()[0]
        same = code != 0 or other or told_by(screen) == measured()
    elif kind in ("configuration", "checkpoint", "metrics", "summary"):
        file = {"configuration": "config.yaml", "metrics": "metrics.jsonl", "summary": "summary.json"}.get(kind)
        change = damaged if kind != "summary" else draw.choice([damaged, rewritten])
        told = change(run / file if file else one_of(newest(run), draw), draw)
        going_on = kind != "summary" or draw.random() < 0.5  # else the finished run is asked for what it knows
        code = job("train", train_job, given(here, run, 9 if going_on else 6), screen=screen)
        same = code != 0 or not going_on or ends_as(run, "more")
    else:
        files = {"shard": [*data.glob("*/part-*")], "vocabulary": [*data.glob("vocab/*")]}
        if kind == "manifest":
            change = draw.choice([damaged, rewritten])
            told = change(data / "manifest.json", draw)
        else:
            told = damaged(draw.choice(sorted(files[kind])), draw)
        code = job("train", train_job, given(data, folder / "new"), screen=screen)
        same = code != 0 or ends_as(folder / "new", "run")
    return told, code, same, screen.read_text()


def _own(shown):
    """The lines of a screen that are not a run's progress."""
    return [line for line in shown.splitlines() if " seed 8  step " not in line and line.strip()]


def test_a_bit_that_flips_in_a_page_is_named_where_only_sizes_are_looked_at(tmp_path):
    """Larger datasets than a gibibyte are not read whole at the start; every page has a checksum of its own."""
    data, screen = Path(shutil.copytree(rated(), tmp_path / "data")), tmp_path / "screen"
    shard = sorted(data.glob("train/part-*"))[1]
    column = pq.ParquetFile(shard).metadata.row_group(0).column(1)
    assert column.path_in_schema == "user"
    assert "ZSTD" in column.compression
    content = bytearray(shard.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 4  # of the values, behind the page's head
    shard.write_bytes(content)
    assert job("train", train_job, [*given(data, tmp_path / "run"), "trainer.verify=size"], screen=screen) == 2
    (line,) = _own(screen.read_text())
    assert str(shard) in line
    assert re.search("CRC|checksum", line), line
