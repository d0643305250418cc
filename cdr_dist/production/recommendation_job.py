"""The work of jobs/recommend.py: a finished run -> the best items for every user, as Parquet."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cdr_dist.configuration import TrainConfig, from_yaml, to_yaml
from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.data.dataset import FIRST_ID, USERS, Manifest, read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.keys import Keys
from cdr_dist.data.shards import verify
from cdr_dist.embeddings.workers import through_shared_memory
from cdr_dist.errors import UserError
from cdr_dist.production.recommendation_options import RecommendOptions, options_from_words
from cdr_dist.training import lease
from cdr_dist.training.best import best_of_run, check_knows_targets
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.launch import on_workers, quiet_libraries, with_workers
from cdr_dist.training.memory import check_memory_here
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.start import check_fits

DONE, STARTED = "recommendations.json", "started.json"


def recommendation_job(words: Sequence[str], only_check: bool = False) -> None:
    options = options_from_words(list(words))
    quiet_libraries()
    if only_check:
        print(_checked(options))
        return
    found = recommend(options)
    print(told(found, options.out))


def recommend(options: RecommendOptions) -> dict[str, Any]:
    """What recommendations.json says; recommendations that are there already with the same options are kept.

    UserError: a run without a checkpoint, a dataset that does not fit it, an `out` that holds something else.
    """
    config, place, folder, manifest = _of_run(options)
    asked = _asked(options, place, manifest)
    done = _there(options.out, asked, manifest)
    if done is not None:
        return done
    users, items = (keys_in(getattr(options, name), name) for name in ("users", "items"))
    if items is not None:
        _check_items(items, options.items, folder, manifest)
    with lease.Lease(options.out) as held:
        with durable("recommend.begin"):
            storage.write_bytes(storage.join(options.out, STARTED), json.dumps(asked).encode())
        for name in storage.names(options.out):
            if name.startswith("part-") or (name.startswith(".") and name.endswith(".part")):
                storage.remove_file(storage.join(options.out, name))
        given = {
            "config": to_yaml(config),
            "folder": storage.absolute(folder),
            "run": place.uri,
            "options": asdict(options) | {"out": storage.absolute(options.out)},
            "users": None if users is None else users.to_pylist(),
            "items": None if items is None else items.to_pylist(),
        }
        found = on_workers(config, place, recommendation_worker, given)
        if users is not None:
            found["users_not_found"] = len(users) - found["users"]
        lease.check(storage.join(options.out, lease.FILE), held.token)
        done = {"asked": asked} | found
        with durable("recommend.done"):
            storage.write_bytes(storage.join(options.out, DONE), (json.dumps(done, indent=1) + "\n").encode())
            storage.remove_file(storage.join(options.out, STARTED))
    return done


def told(found: dict[str, Any], out: str) -> str:
    """The outcome in a few lines."""
    by = found["by"]
    lines = [
        f"{out}: up to {found['asked']['top']} items for {found['users']:,} users "
        f"({by['model']:,} by the model, {by['popularity']:,} by popularity)",
        f"{found['coverage']:.1%} of the {found['items']:,} items that may be recommended are in some list",
    ]
    if found["users_with_fewer"]:
        lines.append(f"{found['users_with_fewer']:,} users have fewer: their filters leave no more")
    if found.get("users_not_found"):
        lines.append(f"{found['users_not_found']:,} of the users asked for are not in the dataset")
    if "recall" in found:
        r = found["recall"]
        lines.append(
            f"{r['candidates']:,} candidates a user hold {r['recall']:.1%} of the best {found['asked']['top']} "
            f"of all items, of {r['users']} users (embeddings {r['embeddings']:.1%}, co-visited {r['covisited']:.1%}, "
            f"popular {r['popular']:.1%})"
        )
    return "\n".join(lines)


def _checked(options: RecommendOptions) -> str:
    config, place, folder, manifest = _of_run(options)
    if _there(options.out, _asked(options, place, manifest), manifest) is not None:
        return f"{options.out}: done already"
    users, items = (keys_in(getattr(options, name), name) for name in ("users", "items"))
    if items is not None:
        _check_items(items, options.items, folder, manifest)
    whom = manifest.examples(USERS) if users is None else len(users)
    return f"ok: {config.recipe.name} of {place.uri}, step {best_step(place)}; {whom:,} users"


def _of_run(options: RecommendOptions) -> tuple[TrainConfig, RunFolder, str, Manifest]:
    """The run's configuration with these workers, its folder, and the dataset whose users are served."""
    place = RunFolder(options.run)
    config = place.config()
    check_knows_targets(config, place)
    storage.use(config.storage)
    best_step(place)
    folder = dataset_of(options.data or config.data)
    manifest = read_manifest(folder)
    if options.data:
        check_fits(place, config, folder, manifest)
    if not manifest.examples(USERS):
        raise UserError(f"{folder}: holds no users to recommend to; prepare it again, into an empty folder")
    return with_workers(config, options.workers), place, folder, manifest


def _asked(options: RecommendOptions, place: RunFolder, manifest: Manifest) -> dict[str, Any]:
    files = {
        f"{name}_sha256": storage.sha256(storage.read_bytes(getattr(options, name)))
        for name in ("users", "items")
        if getattr(options, name)
    }
    run = storage.absolute(place.uri)
    return options.content() | {"run": run, "step": best_step(place), "dataset": manifest.checksum} | files


def _there(out: str, asked: dict[str, Any], manifest: Manifest) -> dict[str, Any] | None:
    """What is there already; UserError: something else is."""
    ours = {DONE, STARTED, lease.FILE}
    names = storage.names(out) if storage.is_folder(out) or not storage.exists(out) else None
    if names is None or any(n not in ours and not n.startswith((".", "part-")) for n in names):
        raise UserError(f"{out}: holds something that is not recommendations; choose another out=")
    if DONE not in names:
        if any(n.startswith("part-") for n in names) and STARTED not in names:
            raise UserError(f"{out}: holds parts of something else; choose another out=")
        return None
    uri = storage.join(out, DONE)
    try:
        done: dict[str, Any] = json.loads(storage.read_bytes(uri))
        before = done["asked"]
        differ = [n for n in {**before, **asked} if before.get(n) != asked.get(n)]
        if manifest.is_or_was(before.get("dataset", "")):
            differ = [n for n in differ if n != "dataset"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{uri}: damaged; choose another out=") from error
    if differ:
        what = "; ".join(f"{n} {before.get(n)}, now {asked.get(n)}" for n in differ)
        raise UserError(f"{out}: holds other recommendations ({what}); choose another out=")
    return done


def keys_in(uri: str, of: str) -> pa.Array | None:
    """The keys in a file: one a line, or a Parquet file's column user_id or item_id. None where no file is named."""
    if not uri:
        return None
    column = f"{of.removesuffix('s')}_id"
    content = storage.read_bytes(uri)
    if uri.endswith(".parquet"):
        try:
            keys = (
                pq.read_table(io.BytesIO(content), columns=[column]).column(column).combine_chunks().cast(pa.string())
            )
        except (pa.ArrowException, KeyError, OSError) as error:
            raise UserError(f"{of}={uri}: no Parquet file with a column {column}") from error
    else:
        try:
            lines = content.decode().splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{of}={uri}: is no text; one key a line is wanted, or a .parquet file") from error
        keys = pa.array([line for line in lines if line], pa.string())
    keys = keys.drop_null().unique()
    if not len(keys):
        raise UserError(f"{of}={uri}: holds no keys")
    return keys


def _check_items(items: pa.Array, uri: str, folder: str, manifest: Manifest) -> None:
    unknown = Keys(folder, manifest, "target_item").ids_of(items) < FIRST_ID
    if unknown.all():
        raise UserError(
            f"items={uri}: none of the {len(items):,} keys is a target item of {folder}, such as {items[0]}"
        )
    if unknown.any():
        first = items[int(np.flatnonzero(unknown)[0])]
        print(
            f"items={uri}: {int(unknown.sum()):,} of {len(items):,} keys are no items of it: {first}, …",
            file=sys.stderr,
        )


def recommendation_worker(given: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs; torch.distributed is initialised. Worker 0 returns what was found."""
    from cdr_dist.production.recommend import Recommender
    from cdr_dist.production.trained import Trained

    quiet_libraries()
    config, folder, options = from_yaml(given["config"]), given["folder"], RecommendOptions(**given["options"])
    storage.use(config.storage)
    through_shared_memory(config.trainer.shared_memory)
    place = RunFolder(given["run"])
    memory = check_memory_here(config, read_manifest(folder))
    with best_of_run(config, folder, place, best_step(place), memory, grown=bool(options.data)) as session:
        verify(folder, session.manifest, session.rank, session.workers, config.trainer.verify)
        trained = Trained.read(session, dataset_of(config.data))
        allowed: NDArray[np.bool_] = np.ones_like(trained.items) if options.new_items else trained.items.copy()
        if given["items"] is not None:
            ids = Keys(folder, session.manifest, "target_item").ids_of(pa.array(given["items"], pa.string()))
            listed = np.zeros_like(allowed)
            listed[ids[ids >= FIRST_ID]] = True
            allowed &= listed
        users = None if given["users"] is None else pa.array(given["users"], pa.string())
        recommender = Recommender(session, options, trained, allowed, users)
        found = recommender.write(options.out)
        if recommender.candidates is not None:
            found["recall"] = {"candidates": recommender.candidates.most} | recommender.recall()
        return None if session.rank else found
