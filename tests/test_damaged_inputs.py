"""Seeded damage to logs, shards, manifests, configurations and checkpoints: it works as if nothing were, or one line.

CDR_DAMAGED=200 CDR_SEED=3 python -m pytest tests/test_damaged_inputs.py tries more of them, and others.
"""

from __future__ import annotations

import functools
import json
import os
import random
import shutil

import pytest
from cdr_dist.data.prepare_job import prepare_job

from cdr_dist.data.dataset import read_manifest
from cdr_dist.training.evaluation_job import evaluation_job
from cdr_dist.training.job import train_job
from tests.crashes import job
from tests.datasets import rated, scratch
from tests.runs import newest, summary, words

INPUTS = int(os.environ.get("CDR_DAMAGED", "20"))
SEED = int(os.environ.get("CDR_SEED", "8"))
KINDS = ["shard", "vocabulary", "manifest", "configuration", "checkpoint", "log"]
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
        (folder / "logs" / f"{domain}.csv").write_text("user_id,item_id,timestamp,rating,category\n" + "\n".join(lines))
    assert job("prepare", prepare_job, prepared(folder / "logs", folder / "prepared")) == 0
    return folder


def prepared(logs, out):
    return [f"source={logs}/source.csv", f"target={logs}/target.csv", f"out={out}"]


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
    draw, kind = random.Random(f"{SEED} {number}"), KINDS[number % len(KINDS)]
    shutil.copytree(undamaged(), tmp_path / "d")
    folder, screen = tmp_path / "d", tmp_path / "screen"
    data, run = folder / "data", folder / "run"
    if kind == "log":
        told = damaged(folder / "logs" / draw.choice(["source.csv", "target.csv"]), draw)
        code = job("prepare", prepare_job, prepared(folder / "logs", folder / "again"), screen=screen)
        # A log has no checksum: a changed one is another log. What is written is whole.
        same = code != 0 or read_manifest(str(folder / "again")).counts["users"] > 0
    elif kind == "configuration":
        told = damaged(run / "config.yaml", draw)
        code = job("train", train_job, given(data, run, 9), screen=screen)
        same = code != 0 or summary(run)["parameters_sha256"] == summary(folder / "more")["parameters_sha256"]
    elif kind == "checkpoint":
        told = damaged(draw.choice(sorted(newest(run).iterdir())), draw)
        if draw.random() < 0.5:
            code = job("evaluate", evaluation_job, [f"run={run}"], screen=screen)
            same = True
        else:
            code = job("train", train_job, given(data, run, 9), screen=screen)
            same = code != 0 or summary(run)["parameters_sha256"] == summary(folder / "more")["parameters_sha256"]
    else:
        files = {"shard": [*data.glob("*/part-*")], "vocabulary": [*data.glob("vocab/*")]}
        if kind == "manifest":
            change = draw.choice([damaged, rewritten])
            told = change(data / "manifest.json", draw)
        else:
            told = damaged(draw.choice(sorted(files[kind])), draw)
        code = job("train", train_job, given(data, folder / "new"), screen=screen)
        same = code != 0 or summary(folder / "new")["parameters_sha256"] == summary(run)["parameters_sha256"]
    shown = screen.read_text()
    assert code in (0, 2), f"{told}: exit code {code}\n{shown}"
    assert "Traceback" not in shown, f"{told}\n{shown}"
    assert code == 0 or len(_own(shown)) == 1, f"{told}\n{shown}"
    assert same, f"{told}: went on with damaged data"


def _own(shown):
    """The lines of a screen that are not a run's progress."""
    return [line for line in shown.splitlines() if " seed 8  step " not in line and line.strip()]
