"""The work of jobs/explain.py: one user's source behaviours on the screen and as HTML, or everybody's as Parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import numpy as np

from cdr_dist.bilevel.relative_weights import relative_weights
from cdr_dist.configuration import TrainConfig, from_yaml, to_yaml
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.keys import Keys
from cdr_dist.data.shards import verify
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.words import whole_number, words_of
from cdr_dist.embeddings.workers import through_shared_memory
from cdr_dist.errors import UserError
from cdr_dist.evaluation.explanation import Behaviour, Explanation, as_html, as_text
from cdr_dist.training.best import best_of_run
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.checks import build_updates
from cdr_dist.training.explain import Scorer, finite, last_row_of, typical
from cdr_dist.training.launch import alone, on_workers, quiet_libraries, with_workers
from cdr_dist.training.memory import check_memory_here
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.session import Session
from cdr_dist.training.weights_file import write_weights

OPTIONS = ("run", "user", "html", "out", "most", "workers")
SAMPLED_ROWS = 20_000
"""Training rows that one user's weights are relative to, unless most= says otherwise."""


def explanation_job(words: Sequence[str]) -> None:
    """Words: run= (needed); user=, with html=, or out=, with workers=; most= of either."""
    given = words_of(words, OPTIONS)
    if "run" not in given:
        raise UserError("run= is missing; see --help")
    if ("user" in given) == ("out" in given):
        raise UserError("give either user=KEY, for one user, or out=FILE.parquet, for all; see --help")
    wrong, right = ("workers", "out") if "user" in given else ("html", "user")
    if wrong in given:
        raise UserError(f"{wrong}= goes with {right}= alone")
    most = whole_number("most", given["most"], 1) if "most" in given else None
    workers = whole_number("workers", given["workers"], 0) if "workers" in given else None
    quiet_libraries()
    place = RunFolder(given["run"])
    config = place.config()
    storage.use(config.storage)
    _check_perceptron(config)
    step = best_step(place)
    if "user" in given:
        html = given.get("html") or place.file(f"explanations/{file_name(given['user'])}")
        found = explain_user(config, place, step, given["user"], SAMPLED_ROWS if most is None else most)
        storage.write_bytes(html, as_html(found).encode())
        print(as_text(found), f"as a page: {html}", sep="\n\n")
    else:
        counts = explain_all(config, place, step, storage.absolute(given["out"]), most or 0, workers)
        print(json.dumps({"run": given["run"], "step": step, "out": given["out"]} | counts, indent=1))


def _check_perceptron(config: TrainConfig) -> None:
    if not any(getattr(update, "learned", False) for cycle in build_updates(config) for update in cycle):
        raise UserError(f"recipe={config.recipe.name} has no perceptron: nothing to explain")


def file_name(user: str) -> str:
    """Of a user's page: the key where a file can be named so, else what tells it from others."""
    quoted = quote(user, safe="@+=, ")
    return f"{quoted if len(quoted) <= 200 else quoted[:150] + '-' + hashlib.sha256(user.encode()).hexdigest()}.html"


def explain_user(config: TrainConfig, place: RunFolder, step: int, user: str, most: int) -> Explanation:
    """In this process. most: training rows that weights are relative to. UserError: no such user, or nothing of it."""
    folder = dataset_of(config.data)
    manifest = read_manifest(folder)
    users = Keys(folder, manifest, "user")
    number = users.id_of(user)
    if number is None:
        near = ", ".join(users.near(user))
        raise UserError(f"user={user}: none of the {len(users):,} users of {folder}, such as {near}")
    verify(folder, manifest, how=config.trainer.verify)
    with alone(), best_of_run(config, folder, place, step) as session:
        stored = last_row_of(session, number)
        if stored is None:
            raise UserError(f"user={user}: has no training row, so the run never weighed a behaviour of it")
        if not stored.lists("source_candidates_item").lengths[0]:
            raise UserError(f"user={user}: has no source behaviour before its validation time: nothing to explain")
        return _explanation(session, place, step, user, stored, most)


def _explanation(
    session: Session, place: RunFolder, step: int, user: str, stored: StoredRows, most: int
) -> Explanation:
    perceptron, manifest = session.perceptron, session.manifest
    assert perceptron is not None
    found = finite(Scorer(session)(stored))
    if perceptron.options.normalisation == "sigmoid":
        log_mean, about = 0.0, "weight = 2 gamma sigmoid(score)"
    else:
        relative_to = typical(session, most)
        log_mean = relative_to.value
        mass = {"softmax": "exp(score)", "softplus": "softplus(score)"}[perceptron.options.normalisation]
        about = f"weight = gamma {mass} / its mean over {relative_to.behaviours:,} behaviours"
        rows = manifest.examples("train")
        about += f" (a sample: {most:,} of {rows:,} training rows)" if most < rows else " (all of the dataset)"
    gamma = float(perceptron.gamma.detach())
    about += f", gamma = {gamma:.3f}: that of a typical behaviour. In joint training all would weigh "
    about += f"{session.config.upper.gamma0:g}."
    weight = relative_weights(perceptron, found.score, log_mean).tolist()
    item, category = (_keys(session, name, getattr(found, name[7:])) for name in ("source_item", "source_category"))
    there = perceptron.options.parts
    parts = [
        of.tolist() if name in there else [None] * len(found)
        for name, of in (("global", found.global_part), ("user", found.local_part))
    ]
    columns = (item, category, found.label.tolist(), found.timestamp.tolist(), *parts, found.score.tolist(), weight)
    return Explanation(
        user=user,
        run=place.uri,
        step=step,
        domains={"source": manifest.source_domain, "target": manifest.target_domain},
        behaviours=[Behaviour(*row) for row in zip(*columns, strict=True)],
        histories={d: _history(session, stored, d) for d in ("source", "target")},
        typical=gamma,
        about=about,
    )


def _history(session: Session, stored: StoredRows, domain: str) -> list[tuple[str, str]]:
    """(item, category) of as many of the row's history as the perceptron sees, oldest first."""
    items, _ = stored.lists(f"{domain}_history_item").of(np.zeros(1, dtype=np.int64))
    items = items[-session.config.batch.history_length :].astype(np.int64)
    categories = session.builder.category_of[domain][items]
    return list(
        zip(_keys(session, f"{domain}_item", items), _keys(session, f"{domain}_category", categories), strict=True)
    )


def _keys(session: Session, name: str, ids: Any) -> list[str]:
    return Keys(session.folder, session.manifest, name).of(np.asarray(ids, dtype=np.int64)).to_pylist()


def explain_all(
    config: TrainConfig, place: RunFolder, step: int, out: str, most: int = 0, workers: int | None = None
) -> dict[str, Any]:
    """Writes every behaviour's weight to a Parquet file; what `write_weights` counts. workers: None for the run's."""
    config = with_workers(config, workers)
    folder = storage.absolute(dataset_of(config.data))
    given = {"config": to_yaml(config), "folder": folder, "run": place.uri, "step": step, "out": out, "most": most}
    found: dict[str, Any] = on_workers(config, place, explanation_worker, given)
    return found


def explanation_worker(given: dict[str, Any]) -> Any:
    """What every worker runs; torch.distributed is initialised. Worker 0 returns the counts."""
    quiet_libraries()
    config, folder = from_yaml(given["config"]), given["folder"]
    storage.use(config.storage)
    through_shared_memory(config.trainer.shared_memory)
    memory = check_memory_here(config, read_manifest(folder))
    with best_of_run(config, folder, RunFolder(given["run"]), given["step"], memory) as session:
        verify(folder, session.manifest, session.rank, session.workers, config.trainer.verify)
        return write_weights(session, given["out"], given["most"])
