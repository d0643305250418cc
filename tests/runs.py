"""Runs of the training job for tests: on any number of gloo workers, ended where a test wants, and read back whole."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import torch

from cdr_dist.configuration import as_config, compose_words
from cdr_dist.training import checkpoint
from cdr_dist.training.lower import Lower
from cdr_dist.training.next_item import NextItem
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.upper import Upper
from cdr_dist.training.worker import work
from tests.problem import replaced
from tests.processes import on_workers

SMALL = [
    "batch.size=64",
    "batch.history_length=6",
    "upper.interval=7",
    "upper.dev=reordered",
    "upper.optimiser=sgd",  # Adam would make steps of lr out of rounding errors
    "upper.lr=0.01",
    "upper.source_draws=2",
    "dense.lr=0.001",
    "trainer.workers=0",
    "trainer.report=false",  # a second or two a run; tests of the page turn it on
    "trainer.max_steps=40",
]
"""19 steps an epoch of datasets.rated(); the last one is short."""
SEQUENTIAL = (
    "model=nextitnet",
    "model.dilations=[1,4]",
    "tables.width=8",
    "batch.size=32",
    "batch.sequences=24",
    "batch.history_length=8",
    "softmax.negatives=12",
    "trainer.epochs=1",
    "trainer.max_steps=0",
    "evaluation.full_ks=[5]",
    "evaluation.metric=full_mrr@5",
)
"""A small encoder on datasets.sequenced()."""
KILLED = "killed"


class Killed(BaseException):
    """Stands for SIGKILL within the process: nothing of the run can catch it."""


def words(dataset, run, *more):
    """Later words win over SMALL's."""
    chosen = {}
    for word in [*SMALL, *more, f"data={dataset}", f"run={run}"]:
        chosen[word.partition("=")[0]] = word
    return list(chosen.values())


def config_of(given):
    """What from_words gives; words that differ in nothing but their folders are composed once a process."""
    folders = dict(word.split("=", 1) for word in given if word.startswith(("data=", "run=")))
    config = as_config(_composed(tuple(word for word in given if not word.startswith(("data=", "run=")))))
    return dataclasses.replace(config, **folders)


@functools.cache
def _composed(given):
    return compose_words(given)


def train(given, workers=1, killed_after=None, in_upper=False, within=None):
    """What the driver does, with gloo workers in place of Ray's -> every worker's answer.

    killed_after: lower updates after which the run dies: before the next one, or (in_upper) at the end of the next
    upper update. within: a function that breaks something; called on every worker, it returns a context manager.
    """
    config = config_of(given)
    RunFolder(config.run).open(config)
    return on_workers(workers, _worker, given, killed_after, in_upper, within)


def _worker(rank, given, killed_after, in_upper, within):
    config = config_of(given)
    with within() if within else contextlib.nullcontext(), dying(killed_after, in_upper):
        try:
            return work(config, config.data, config.run)
        except Killed:
            return KILLED


@contextlib.contextmanager
def dying(after, in_upper=False):
    if after is None:
        yield
        return
    with contextlib.ExitStack() as broken:
        for holder in [Upper] if in_upper else [Lower, NextItem]:
            broken.enter_context(replaced(holder, "run", _dies(holder.run, after, in_upper)))
        yield


def _dies(run, after, in_upper):
    def dies(self, stop_wanted):
        due = self._session.passes["lower"] >= after
        if due and not in_upper:
            raise Killed
        values = run(self, stop_wanted)
        if due:
            raise Killed
        return values

    return dies


def newest(run):
    """The folder of the newest complete checkpoint."""
    return Path(checkpoint.newest(str(Path(run) / "checkpoints")).uri)


def steps_of(run):
    """The step of the newest complete checkpoint; 0 where there is none."""
    found = checkpoint.newest(str(Path(run) / "checkpoints"))
    return found.step if found else 0


def summary(run):
    return json.loads((Path(run) / "summary.json").read_text())


def lines(run, *splits):
    """The lines of metrics.jsonl without their times."""
    found = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found if line["split"] in splits]


def tensors(run, folder=None):
    """Every tensor of a checkpoint (the newest) by name: unsharded tables and their optimiser state, all dense ones."""
    folder = folder or newest(run)
    tables, places = {}, {}
    for index in sorted(folder.glob("rows-*.json")):
        raw = json.loads(index.read_text())
        values = np.fromfile(folder / raw["file"], dtype="<f4")
        for s in raw["sections"]:
            rows = values[s["offset"] // 4 :][: s["rows"] * s["width"]].reshape(s["rows"], s["width"])
            name = f"{s['table']}.{s['part']}"
            places.setdefault(name, []).append((s["first"], torch.from_numpy(rows)))
    for name, parts in places.items():
        parts.sort(key=lambda part: part[0])
        assert [first for first, _ in parts] == [sum(len(r) for _, r in parts[:i]) for i in range(len(parts))], name
        tables[name] = torch.cat([rows for _, rows in parts])
    return dict(_flat({"tables": tables, "dense": torch.load(folder / "dense.pt", weights_only=True)}))


def _flat(node, prefix=""):
    for name, value in node.items() if isinstance(node, dict) else enumerate(node):
        if isinstance(value, dict | list):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value


def same_run(a, b):
    """Asserts that two finished runs are one and the same: every bit, every choice, every line."""
    left, right = summary(a), summary(b)
    assert left["parameters_sha256"] == right["parameters_sha256"]
    for key in ("steps", "upper_steps", "best", "metrics", "backward_passes"):
        assert left[key] == right[key], key
    assert lines(a, "upper", "valid") == lines(b, "upper", "valid")
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    assert not [name for name in x if not torch.equal(x[name], y[name])]


def distances(a, b):
    """Relative L2 distance of every tensor of two runs' newest checkpoints.

    Relative to 0.1 at least: what is learned from nothing but rounding errors (the bias of gamma_1, which a softmax
    takes out as long as gamma_2 is a constant) has no digits to compare.
    """
    x, y = tensors(a), tensors(b)
    assert x.keys() == y.keys()
    return {n: float((x[n].double() - y[n].double()).norm() / x[n].double().norm().clamp(min=0.1)) for n in x}
