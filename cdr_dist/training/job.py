"""The work of jobs/train.py: words in, a line with the result out."""

from __future__ import annotations

import os
import sys

from cdr_dist.configuration import TrainConfig, from_words
from cdr_dist.data import storage
from cdr_dist.data.demo import DEMOS, dataset_of, is_written
from cdr_dist.data.shards import verify
from cdr_dist.training.checkpoint import newest
from cdr_dist.training.checks import build_updates, check_before_start, check_updates
from cdr_dist.training.launch import cluster, quiet_libraries, train
from cdr_dist.training.memory import check_memory, check_memory_of_cluster
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.start import check_start


def train_job(words: list[str], check: bool = False) -> None:
    config = from_words(words)
    storage.use(config.storage)
    if check:
        print(check_run(config))
        return
    place = RunFolder(config.run)
    place.check(config)  # before the demo data is written
    before = place.summary()
    summary = train(config, dataset_of(config.data))
    if before == summary:
        print(f"{place.uri}: already finished ({summary['steps']} steps)", file=sys.stderr)
    test, best = summary["metrics"]["test"], summary["best"]
    shown = [name for name in dict.fromkeys([best["metric"], "auc", "logloss"]) if name in test]
    values = ", ".join(f"{'AUC' if name == 'auc' else name} {test[name]:.4f}" for name in shown)
    print(f"{summary['recipe']}: test {values}, best step {best['step']} of {summary['steps']}; {place.uri}")


def check_run(config: TrainConfig) -> str:
    """Everything that can be found before anything starts; a line that says what would be trained."""
    quiet_libraries()
    place = RunFolder(config.run)
    place.check(config)
    if config.data in DEMOS and not is_written(config.data):
        build_updates(config)
        return f"ok: {config.recipe.name} on {config.data}, which is written on first use"
    folder = dataset_of(config.data)
    manifest = check_before_start(config, folder)
    check_updates(config, folder)
    if newest(place.checkpoints) is None:
        check_start(config, folder, manifest)
    verify(folder, manifest, how=config.trainer.verify)
    needed = check_memory(config, manifest)
    if config.trainer.workers and os.environ.get("RAY_ADDRESS"):
        with cluster(config.trainer.workers):
            check_memory_of_cluster(config, manifest)
    return (
        f"ok: {config.recipe.name} on {config.data}: {manifest.examples('train')} training rows; each of "
        f"{max(config.trainer.workers, 1)} worker(s) needs {needed}"
    )
