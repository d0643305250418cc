"""The work of jobs/train.py: words in, a line with the result out."""

from __future__ import annotations

import sys

import psutil

from cdr_dist.configuration import TrainConfig, from_words
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.shards import verify
from cdr_dist.errors import UserError
from cdr_dist.training.launch import quiet_libraries, train
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.session import build_model, check_dataset, table_specs
from cdr_dist.training.worker import phases_of


def train_job(words: list[str], check: bool = False) -> None:
    config = from_words(words)
    if check:
        print(check_run(config))
        return
    place = RunFolder(config.run)
    done = place.summary()
    summary = train(config, dataset_of(config.data))
    if done is not None and done["steps"] == summary["steps"]:
        print(f"{place.path}: already finished ({summary['steps']} steps)", file=sys.stderr)
    test = summary["metrics"]["test"]
    print(
        f"{summary['recipe']}: test AUC {test['auc']:.4f}, logloss {test['logloss']:.4f}, best step "
        f"{summary['best']['step']} of {summary['steps']}; {place.path}"
    )


def check_run(config: TrainConfig) -> str:
    """Everything that can be found before anything starts; a line that says what would be trained."""
    quiet_libraries()
    folder = dataset_of(config.data)
    manifest = read_manifest(folder)
    check_dataset(config, manifest)
    verify(folder, manifest, how=config.trainer.verify)
    phases_of(config)
    place = RunFolder(config.run)
    if place.path.exists() and any(place.path.iterdir()):
        place.check(config)
    needed = table_bytes(config, manifest)
    free = psutil.virtual_memory().available
    if config.trainer.device == "cpu" and needed > free and config.trainer.workers < 2:
        raise UserError(f"the tables need {needed / 2**30:.1f} GiB, this machine has {free / 2**30:.1f} GiB free")
    return (
        f"ok: {config.recipe.name} on {config.data}: {manifest.examples('train')} training rows, "
        f"tables {needed / 2**20:.1f} MiB over {max(config.trainer.workers, 1)} worker(s)"
    )


def table_bytes(config: TrainConfig, manifest: Manifest) -> int:
    """Rows and fused optimiser state, all workers together."""
    state = {"rowwise_adagrad": 4, "sgd": 0}
    total = 0
    for spec in table_specs(config, manifest, build_model(config)):
        per_row = state.get(config.tables.optimiser, 4 * spec.width * (2 if config.tables.optimiser == "adam" else 1))
        total += spec.padded_rows * (4 * spec.width + per_row)
    return total
