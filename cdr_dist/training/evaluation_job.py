"""The work of jobs/evaluate.py: a run's best checkpoint, measured again in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence

from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.shards import verify
from cdr_dist.data.words import words_of
from cdr_dist.errors import UserError
from cdr_dist.training.best import best_of_run, check_knows_targets
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.launch import alone, quiet_libraries
from cdr_dist.training.next_item import NextItem
from cdr_dist.training.options import EXCLUDED, one_of
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.split_metrics import split_metrics
from cdr_dist.training.start import check_fits

OPTIONS = ("run", "split", "data", "scores", "full_ks", "full_exclude")


def evaluation_job(words: Sequence[str]) -> None:
    """Words: run= (needed), split= (test), data= (another dataset), scores= (a Parquet file of every row's score),
    full_ks=, full_exclude=. Prints JSON."""
    given = {"split": "test"} | words_of(words, OPTIONS)
    if "run" not in given:
        raise UserError("run= is missing; see --help")
    one_of("split", given["split"], ("valid", "test"))
    one_of("full_exclude", given.get("full_exclude", EXCLUDED[0]), EXCLUDED)
    ks = _ks(given["full_ks"]) if "full_ks" in given else None
    quiet_libraries()
    exclude = given.get("full_exclude")
    step, found = evaluate_run(given["run"], given["split"], given.get("scores"), ks, given.get("data"), exclude)
    said = {name: given[name] for name in ("run", "data") if name in given}
    print(json.dumps(said | {"step": step, "split": given["split"], "metrics": found}, indent=1))


def _ks(given: str) -> list[int]:
    try:
        found = [int(k) for k in given.strip("[]").split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise UserError(f"full_ks={given}: numbers of 1 or more are wanted, as in full_ks=10,50")
    return found


def evaluate_run(
    run: str,
    split: str,
    scores: str | None = None,
    full_ks: Sequence[int] | None = None,
    data: str | None = None,
    full_exclude: str | None = None,
) -> tuple[int, dict[str, float | None]]:
    """(step of the best checkpoint, its metrics on a split), whatever number of workers wrote it.

    A pre-trained run has `nll` alone. full_ks, full_exclude: instead of the run's own. data: a dataset that the run's
    own was extended to; the rows of keys that the run does not know are as a warm start makes them.
    """
    place = RunFolder(run)
    config = place.config()
    if scores or full_ks or full_exclude:
        check_knows_targets(config, place)
    if full_exclude is not None:
        config.evaluation.full_exclude = full_exclude
    step = best_step(place)
    folder = dataset_of(data or config.data)
    manifest = read_manifest(folder)
    if data:
        check_fits(place, config, folder, manifest)
    verify(folder, manifest, how=config.trainer.verify)
    with alone(), best_of_run(config, folder, place, step, grown=data is not None) as session:
        if config.recipe.target:
            found = split_metrics(session, split, config.evaluation.full_ks if full_ks is None else full_ks, scores)
        else:
            pretraining = NextItem()
            pretraining.bind(session)
            found = pretraining.measure(split)
    return step, {name: value if value == value else None for name, value in found.items()}
