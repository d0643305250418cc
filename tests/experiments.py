"""Runs that never took place, for tests of experiments: summaries, scores and weights as if they had."""

from __future__ import annotations

import os
import signal
import zlib
from pathlib import Path

import numpy as np
import polars as pl

from cdr_dist.evaluation.experiment_tables import Findings, Run
from cdr_dist.training.experiment_runs import Ended, Room

LEVEL = {"target_only": 0.70, "source_features": 0.71, "joint": 0.715, "biao": 0.73, "oracle": 0.735}


def summary(valid, test, seed=8, seconds=1.0):
    metrics = {"valid": {"auc": valid, "logloss": 0.5}, "test": {"auc": test, "logloss": 0.6}}
    return {
        "recipe": "r",
        "model": "m",
        "seed": seed,
        "data": {"name": "d"},
        "metrics": metrics,
        "best": {"step": 1, "metric": "auc", "value": valid},
        "throughput": {"train_s": seconds},
    }


def run(folder, data, model, method, seed, failure="", level=None):
    """A run with scores and, of biao, weights."""
    random = np.random.default_rng([zlib.crc32(f"{data}{model}{method}".encode()), seed])
    if failure:
        return Run(data, model, method, seed, None, failure)
    auc = (level or LEVEL[method]) + 0.004 * random.standard_normal() - 0.01 * (model == "minet")
    place = folder / f"{data}-{model}-{method}-{seed}"
    place.mkdir()
    label = np.tile([0.0, 1.0], 100)
    score = label * (auc - 0.5) * 3 + np.random.default_rng(seed).standard_normal(200)
    pl.DataFrame({"user": np.repeat(np.arange(50), 4), "label": label, "score": score}).write_parquet(place / "scores")
    weights = lengths = ""
    if method == "biao":
        weights = str(place / "weights")
        weight = 1 + 0.4 * np.sin(np.arange(24)) + 0.05 * random.standard_normal(24)
        pl.DataFrame({"category": np.arange(24), "behaviours": 20 + np.arange(24), "weight": weight}).write_parquet(
            weights
        )
        lengths = str(place / "lengths")
        difference = np.arange(-20, 20)
        by_length = {"difference": difference, "behaviours": 5 + np.abs(difference), "weight": 1 + 0.01 * difference}
        pl.DataFrame(by_length).write_parquet(lengths)
    return Run(data, model, method, seed, summary(auc, auc, seed), "", str(place / "scores"), weights, lengths)


def findings(folder, failed=(), seeds=3, methods=tuple(LEVEL)[:4], data=("books-toys", "mine"), **more):
    """failed: (data, model, method, seed) of runs that did not come through."""
    runs = [
        run(folder, d, m, method, seed, "tables.lr=0: must be above 0 <b>" if (d, m, method, seed) in failed else "")
        for d in data
        for m in ("conet", "minet")
        for method in methods
        for seed in range(8, 8 + seeds)
    ]
    return Findings("table1", runs, title="A title", **more)


def answer(words):
    """What a run does in the tests of processes; by its recipe it ends well, is killed, or cannot be."""
    given = dict(word.partition("=")[::2] for word in words)
    Path(given["run"]).mkdir(parents=True, exist_ok=True)
    if given["recipe"] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if given["recipe"] == "mistaken":
        return Ended(None, "recipe: cannot be", True)
    return Ended(summary(0.7, 0.6, int(given["seed"])) | {"process": os.getpid()})


class Here:
    """Places that answer at once, in this process, the last one that was started first."""

    def __init__(self, run, forwards=False):
        self._run, self._forwards, self.started, self._waiting = run, forwards, [], []

    def room(self):
        return Room(1, 2**30)

    def start(self, number, words):
        self.started.append(words)
        self._waiting.append((number, words))

    def next(self):
        number, words = self._waiting.pop(0 if self._forwards else -1)
        given = dict(word.partition("=")[::2] for word in words)
        Path(given["run"]).mkdir(parents=True, exist_ok=True)
        return number, self._run(given)

    def close(self):
        pass
