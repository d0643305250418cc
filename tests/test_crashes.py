"""Killed right before and right after every effect that lasts, also while it recovers: nothing is lost or doubled."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path

import pytest

from cdr_dist.crash_points import EFFECTS
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.data.shards import verify
from cdr_dist.training.job import train_job
from tests.crashes import KILLED, job
from tests.datasets import rated, scratch
from tests.runs import same_run, steps_of, train, words

ROOT = Path(__file__).parents[1]
TRAINING = [e for e in EFFECTS if e.startswith(("run.", "checkpoint."))]


def given(run, *more):
    return words(
        rated(),
        run,
        "recipe=biao",
        "upper.interval=4",
        "trainer.max_steps=12",
        "trainer.checkpoint_every=3",
        "trainer.keep=1",
        "trainer.log_every=4",
        "evaluation.every=6",
        *more,
    )


@functools.cache
def undisturbed():
    run = scratch() / "crash-undisturbed"
    assert job("train", train_job, given(run)) == 0
    return run


def recovers(run, screen):
    assert job("train", train_job, given(run), screen=screen) == 0, screen.read_text()
    assert "Traceback" not in screen.read_text()
    same_run(undisturbed(), run)


def test_every_effect_has_a_name_and_every_name_an_effect():
    named = re.compile(r'durable\(\s*"([a-z_.]+)"')
    listed = re.compile(r'\("((?:run|checkpoint|prepare)\.[a-z_]+)",')
    sources = [p.read_text() for p in (ROOT / "cdr_dist").rglob("*.py") if p.name != "crash_points.py"]
    found = {name for text in sources for name in [*named.findall(text), *listed.findall(text)]}
    assert found == set(EFFECTS)


@pytest.mark.parametrize("effect", TRAINING)
def test_killed_before_an_effect_and_after_it_while_it_recovers(effect, tmp_path):
    run, screen = tmp_path / "run", tmp_path / "screen"
    finished = effect in ("run.summary", "run.release")  # another start has nothing to do, nor to clear away
    count = 2 if effect.startswith(("checkpoint.", "run.line")) and "drop" not in effect else 1
    assert job("train", train_job, given(run), f"{effect}:before:{count}", screen) == KILLED
    second = job("train", train_job, given(run), f"{effect}:after:1", screen)
    assert second == (0 if effect == "run.release" else KILLED), screen.read_text()
    recovers(run, screen)
    left = [p.name for p in run.rglob("*") if p.name.startswith(".") or p.name == "lease.json"]
    assert left == [] or finished


LOGS = {"source": "s", "target": "t"}


@functools.cache
def logs():
    folder = scratch() / "crash-logs"
    folder.mkdir()
    for name, letter in LOGS.items():
        rows = (f"u{i * 7 % 40},{letter}{i * i % 31},{i},{1 + i * 3 % 5},c{i * i % 31 % 3}" for i in range(900))
        (folder / f"{name}.csv").write_text("user_id,item_id,timestamp,rating,category\n" + "\n".join(rows) + "\n")
    return folder


@functools.cache
def dataset():
    """The checksum of a dataset that nothing disturbed."""
    assert job("prepare", prepare_job, preparing(scratch() / "crash-out")) == 0
    return read_manifest(str(scratch() / "crash-out")).checksum


def preparing(out):
    return [f"source={logs()}/source.csv", f"target={logs()}/target.csv", f"out={out}", "partitions=3"]


PREPARING = [e for e in EFFECTS if e.startswith("prepare.") and e != "prepare.moved_file"]


@pytest.mark.parametrize("effect", PREPARING)
def test_prepare_killed_before_an_effect_and_after_it_starts_again(effect, tmp_path):
    out, screen = tmp_path / "out", tmp_path / "screen"
    count = {"prepare.spill": 5, "prepare.vocabulary": 3, "prepare.shard": 2}.get(effect, 1)
    moved = effect == "prepare.clear"  # it is found in order, and nothing else is looked at
    assert job("prepare", prepare_job, preparing(out), f"{effect}:before:{count}", screen) == KILLED
    second = job("prepare", prepare_job, preparing(out), f"{effect}:after:{count}", screen)
    assert second == (0 if moved else KILLED), screen.read_text()
    assert job("prepare", prepare_job, preparing(out), screen=screen) == 0, screen.read_text()
    manifest = read_manifest(str(out))
    assert manifest.checksum == dataset()
    verify(str(out), manifest, how="checksum")
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["out", "screen"] or moved or effect == "prepare.move"


@pytest.mark.parametrize(("point", "rank"), [("checkpoint.barrier:before:2", 1), ("checkpoint.complete:after:2", 0)])
def test_one_of_two_workers_dies_at_a_checkpoint(point, rank, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"process ended|Connection reset|Connection closed"):
        train(given(run), 2, within=functools.partial(dying_at, point, rank))
    assert steps_of(run) == (3 if rank else 6)
    train(given(run), 2)
    train(given(tmp_path / "whole"), 2)
    same_run(tmp_path / "whole", run)


class dying_at:  # noqa: N801 - a context manager, used like a function
    """In a worker: dies at the point if it has this rank."""

    def __init__(self, point, rank):
        self._told = {"CDR_CRASH": point, "CDR_CRASH_RANK": str(rank)}

    def __enter__(self):
        import torch.distributed as dist

        os.environ.update(self._told, RANK=str(dist.get_rank()))

    def __exit__(self, *_):
        for name in (*self._told, "RANK"):
            os.environ.pop(name, None)
