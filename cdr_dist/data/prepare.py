"""Prepare: the logs of two domains -> a dataset folder.

    scatter   every log file into user partitions (scratch)
    order     every partition: by user and time; splits; what occurs
    number    the vocabularies of all partitions
    build     every partition's examples, into the buckets of the shuffle (scratch)
    write     every shard; the manifest last

The dataset appears at `out` as a whole or not at all: it grows in a folder beside it, `OUT.unfinished-…`, which also
holds the scratch files and is removed at the end, after a failure too; one of a killed job by the next job. The same
options over the same logs give the same bytes, whatever the number of partitions and workers.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import polars as pl

from cdr_dist.crash_points import durable
from cdr_dist.data import examples, forgotten, holder, interactions, partitions, shuffle, spill, storage, vocabularies
from cdr_dist.data.dataset import (
    FIRST_ID,
    FOLDERS,
    LEFT_OUT,
    POSITIVES,
    SEQUENCES,
    SPLITS,
    UNKNOWN_SOURCE,
    USERS,
    Manifest,
    Shard,
    read_manifest,
)
from cdr_dist.data.earlier import Numbered
from cdr_dist.data.feature_names import USER
from cdr_dist.data.keys import keys_of_users
from cdr_dist.data.partitions import Partition, PartitionCounts
from cdr_dist.data.prepare_inputs import Inputs, inputs_of
from cdr_dist.data.prepare_options import PrepareOptions, options_from_words
from cdr_dist.data.tasks import run_tasks
from cdr_dist.data.vocabularies import Items
from cdr_dist.errors import UserError

__all__ = ["PrepareOptions", "check", "options_from_words", "prepare"]

log = logging.getLogger(__name__)

MUCH_UNKNOWN = 0.05
"""Share of source behaviours of unknown items from which on a warning says so; training refuses as much by default."""


def check(options: PrepareOptions) -> Manifest | None:
    """Checks inputs, columns and the output folder; writes nothing. Returns the dataset that is there already.

    UserError: a missing or unreadable input, a missing column, an output folder that cannot be used.
    """
    inputs = inputs_of(options)
    return _existing(options, inputs)


def prepare(options: PrepareOptions) -> Manifest:
    """Writes the dataset and returns its manifest; one that is there already with the same options is kept.

    UserError: as `check`, and what reading the logs brings up.
    """
    inputs = inputs_of(options)
    there = _existing(options, inputs)
    work = _work_folder(options, inputs)
    _clear_left(options.out, keep="" if there else work)
    if there is not None:
        log.info("%s is there already, with the same options", options.out)
        return there
    try:
        with durable("prepare.begin"):
            storage.check_writable(work, options.out, json.dumps(holder.me()).encode())
        manifest = _prepare(options, inputs, work)
        with durable("prepare.move"):
            storage.move_folder(storage.join(work, "dataset"), options.out.rstrip("/"), last="manifest.json")
    except BaseException:
        with suppress(UserError), durable("prepare.give_up"):  # what went wrong first counts
            storage.remove_folder(work, tries=1)
        raise
    with durable("prepare.clear"):
        storage.remove_folder(work)
    return manifest


def _recorded(options: PrepareOptions, inputs: Inputs) -> dict[str, Any]:
    """What the manifest says of the options: those that decide the content, and the size of the logs."""
    found = options.content() | {f"{role}_bytes": size for role, size in inputs.bytes.items()}
    return found | ({"extends_checksum": inputs.earlier.manifest.checksum} if inputs.earlier else {})


def _existing(options: PrepareOptions, inputs: Inputs) -> Manifest | None:
    if storage.is_empty(options.out):
        return None
    if not storage.exists(storage.join(options.out, "manifest.json")):
        if not storage.is_local(options.out) and storage.names(_work_folder(options, inputs)):
            return None  # killed while it moved the dataset, file by file: the same names get the same bytes again
        raise UserError(f"{options.out}: exists and is not a dataset; choose another out=")
    manifest = read_manifest(options.out)
    wanted = _recorded(options, inputs)
    differ = [name for name in wanted if manifest.options.get(name) != wanted[name]]
    if inputs.earlier and inputs.earlier.manifest.is_or_was(manifest.options.get("extends_checksum", "")):
        differ = [name for name in differ if name != "extends_checksum"]
    if differ:
        what = "; ".join(f"{name} {manifest.options.get(name)}, now {wanted[name]}" for name in differ)
        raise UserError(f"{options.out}: holds a dataset of other options ({what}); choose another out=")
    left_out = forgotten.of(options)
    if left_out.users and any(left_out.among(keys.to_pylist()) for keys in keys_of_users(options.out, manifest)):
        raise UserError(
            f"{options.out}: holds users that are to be forgotten; python jobs/forget.py data={options.out}"
        )
    return manifest


def _work_folder(options: PrepareOptions, inputs: Inputs) -> str:
    """Named by the options: what a killed run left is found, and overwritten, by the same run started again."""
    name = storage.sha256(json.dumps(_recorded(options, inputs), sort_keys=True).encode())[:12]
    return f"{options.out.rstrip('/')}.unfinished-{name}"


def _clear_left(out: str, keep: str) -> None:
    """Removes the work folders beside `out` of jobs that are gone, but for `keep`, which is begun anew.

    One of a job on another host may still be in use, and stays. UserError: another job works in `keep`.
    """
    for folder in _beside(out):
        same = folder.removeprefix("./") == keep.removeprefix("./")
        held = _held(folder)
        if same and held == "here":
            raise UserError(f"{folder}: another job prepares this dataset; wait for its end or stop it")
        if not same and not held:
            with suppress(UserError), durable("prepare.sweep"):
                storage.remove_folder(folder, tries=1)


def _beside(out: str) -> list[str]:
    """The work folders of an output folder."""
    above, _, name = out.rstrip("/").rpartition("/")
    above = above or ("/" if out.startswith("/") else ".")
    try:
        return [storage.join(above, left) for left in storage.names(above) if left.startswith(f"{name}.unfinished-")]
    except storage.StorageError:
        return []  # what stands beside `out` may be nobody's to see


def left_beside(out: str) -> list[str]:
    """The work folders of jobs that are gone. UserError: one of a job that may still run."""
    found = _beside(out)
    for folder in found:
        if where := _held(folder):
            raise UserError(f"{folder}: a job may still prepare this dataset ({where}); end it, or remove the folder")
    return found


def _held(work: str) -> str:
    """Where the job of a work folder may still be: here, elsewhere, or nowhere ("")."""
    try:
        said = holder.read(storage.read_bytes(storage.join(work, storage.STARTED)))
    except storage.NotFoundError:
        begins = any(name.startswith(f".{storage.STARTED}.") for name in storage.names(work))
        return "elsewhere" if begins else ""  # being begun, or half removed
    except storage.StorageError:
        return "elsewhere"
    if said is None or not holder.is_here(said):
        return "elsewhere"
    return "here" if holder.lives(said) else ""


def _prepare(options: PrepareOptions, inputs: Inputs, work: str) -> Manifest:
    with _stage("read the logs"):
        parts = _scatter(options, inputs, work)
    with _stage("ordered and split"):
        counted = run_tasks(partitions.order, parts, options.workers)
        _check_counts(options, counted)
    with _stage("numbered"):
        users, items, users_before = _number(options, inputs, parts)
    with _stage("built the examples"):
        builds, buckets = _builds(parts, counted, users, users_before, items, work)
        built = run_tasks(examples.build, builds, options.workers)
    with _stage("wrote the shards"):
        folder = storage.join(work, "dataset")
        written = _write_shards(folder, buckets, built, options.workers)
        vocab, rows = _write_vocabularies(folder, options, inputs, users, users_before, items)
        manifest = _manifest(options, inputs, counted, built, written, vocab, rows)
        _warn_of_unknown(manifest)
        if options.sequences:
            _warn_of_empty(built)
        with durable("prepare.manifest"):
            if (left_out := forgotten.of(options)).users:
                forgotten.write(folder, left_out)
            storage.write_bytes(storage.join(folder, "manifest.json"), manifest.to_json().encode())
    return manifest


@contextmanager
def _stage(name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.info("%s: %.1f s", name, time.perf_counter() - start)


def _scatter(options: PrepareOptions, inputs: Inputs, work: str) -> list[Partition]:
    logs = [
        partitions.Log(
            uri,
            role,
            bool(domain.item_file),
            domain.prefix,
            domain.value,
            inputs.partitions,
            storage.join(work, "interactions", role, f"{domain.prefix.rstrip(':')}{number:05d}"),
            options,
        )
        for role, domains in inputs.domains.items()
        for domain in domains
        for number, uri in enumerate(domain.files)
    ]
    scattered = []
    found: Counter[tuple[str, str]] = Counter()
    for log_file, (files, rows) in zip(logs, run_tasks(partitions.scatter, logs, options.workers), strict=True):
        scattered.append(files)
        found[log_file.role, log_file.domain] += rows
    for role, domains in inputs.domains.items():
        for domain in domains:
            if options.by_value(role) and not found[role, domain.value]:
                interactions.check_domain(domain.files, options, role, domain.value)
    n_source = sum(log.role == "source" for log in logs)
    source, target = (list(chain.from_iterable(part)) for part in (scattered[:n_source], scattered[n_source:]))
    ordered = storage.join(work, "ordered")
    return [Partition(number, source, target, ordered, options) for number in range(inputs.partitions)]


def _check_counts(options: PrepareOptions, counted: list[PartitionCounts]) -> None:
    if not sum(c.users for c in counted):
        where = "in both logs" if options.users == "both" else "in the target log"
        short, unknown = (sum(c.left_out[why] for c in counted) for why in ("short_targets", "unknown_targets"))
        if short:
            where += f" has a target behaviour with least_history={options.least_history} source behaviours before it"
        elif unknown:
            where += " has a target behaviour of a known item"
        raise UserError(f"no user {where} ({options.source}, {options.target}): nothing to prepare")
    rows = _sum([c.splits for c in counted])
    if options.split == "leave_last" and not rows[2]:
        raise UserError("no user has 3 target behaviours, which split=leave_last needs: training, validation and test")
    if not rows[0] and options.split == "time":
        raise UserError(f"no target behaviour before valid_from={options.valid_from}: nothing to train on")
    for split, number in zip(SPLITS, rows, strict=True):
        wanted = options.split in ("instance", "user") and (getattr(options, f"{split}_share", 1.0) > 0)
        if wanted and not number:
            raise UserError(
                f"split={options.split}: of {sum(rows)} examples none is {split}; change the shares or seed="
            )
    positives = sum(_sum([c.positives for c in counted]))
    if not positives:
        raise UserError(f"threshold={options.threshold}: no rating of {options.target} is above it: nothing to learn")
    if options.labels == "rating" and positives == sum(rows):
        log.warning(
            "threshold=%s: every rating of %s is above it; see labels=sampled", options.threshold, options.target
        )


def _sum(lists: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*lists, strict=True)]


def _number(
    options: PrepareOptions, inputs: Inputs, parts: list[Partition]
) -> tuple[pl.DataFrame, dict[str, Items], Numbered]:
    """The users of these logs, the items of each role, and the users of the dataset that is extended."""
    earlier, items = inputs.earlier, {}
    for role, domains in inputs.domains.items():
        files = [interactions.read_items(d.item_file, options, role, d.prefix) for d in domains if d.item_file]
        described = pl.concat(files) if files else None
        items[role] = vocabularies.merge_items(parts, role, described, earlier)
    before = earlier.numbered("user") if earlier else Numbered.nothing()
    before = Numbered(forgotten.of(options).left_out_of(before.keys, "key"), before.rows)
    return vocabularies.merge_users(parts, before), items, before


def _builds(
    parts: list[Partition],
    counted: list[PartitionCounts],
    users: pl.DataFrame,
    users_before: Numbered,
    items: dict[str, Items],
    work: str,
) -> tuple[list[examples.Build], shuffle.Buckets]:
    options = parts[0].options
    user_ids = vocabularies.spill_users(storage.join(work, "ids", "users.arrow"), users, len(parts))
    cold_ids = vocabularies.spill_cold(storage.join(work, "ids", "cold.arrow"), parts, users_before)
    item_ids = {}
    for role, of_role in items.items():
        columns = of_role.items.select("item_id", "known", "id", "category_id", "count")
        rows = columns.to_arrow(compat_level=pl.CompatLevel.oldest())
        item_ids[role] = spill.write_all(storage.join(work, "ids", f"{role}.arrow"), rows)
    rows = [
        *_sum([c.splits for c in counted]),
        users.height + sum(c.cold_users for c in counted),
        *_sum([c.sequences for c in counted]),
    ]
    buckets = shuffle.Buckets.for_rows(options.seed, rows, options.rows_per_shard)
    target_items, scratch = items["target"].known.height, storage.join(work, "examples")
    return [examples.Build(p, user_ids, cold_ids, item_ids, target_items, buckets, scratch) for p in parts], buckets


def _write_shards(
    folder: str, buckets: shuffle.Buckets, built: list[examples.Built], workers: int
) -> dict[str, list[Shard]]:
    of = dict.fromkeys(SPLITS, "files") | {USERS: "user_files"} | dict.fromkeys(SEQUENCES, "sequence_files")
    files = {name: [file for one in built for file in getattr(one, kind)] for name, kind in of.items()}
    tasks = [
        shuffle.ShardTask(folder, split, number, buckets, files[name])
        for split, name in enumerate(FOLDERS)
        for number in range(buckets.shards[split])
    ]
    written: dict[str, list[Shard]] = {name: [] for name in FOLDERS}
    for task, shard in zip(tasks, run_tasks(shuffle.write_shard, tasks, workers), strict=True):
        written[FOLDERS[task.split]].append(shard)
    return written


def _write_vocabularies(
    folder: str,
    options: PrepareOptions,
    inputs: Inputs,
    users: pl.DataFrame,
    users_before: Numbered,
    items: dict[str, Items],
) -> tuple[dict[str, Shard], dict[str, int]]:
    """The files, and of each the rows of its table: ids whose key is gone count, too."""
    files: dict[str, Shard] = {}
    rows: dict[str, int] = {}

    def write(name: str, keys: pl.DataFrame, *more: Any) -> None:
        files[name] = vocabularies.write_vocabulary(folder, name, keys, *more)
        rows[name] = int(keys.select(pl.col("id").max().fill_null(FIRST_ID - 1)).item()) + 1

    known = users.filter(pl.col("id") >= FIRST_ID).select(key="user_id", id="id")
    every = pl.concat([users_before.keys.join(known, on="key", how="anti"), known])
    described = vocabularies.describe_users(every, options, inputs.earlier)
    write(USER, described.keys, "key", described.values)
    rows[USER] = max(rows[USER], users_before.rows)
    for column, values in described.values.items():
        write(f"{USER}_{column}", values, "key")
    for role, of_role in items.items():
        write(f"{role}_item", of_role.known, "item_id", of_role.values)
        for column, values in (of_role.values | {"category": of_role.categories}).items():
            write(f"{role}_{column}", values, "key")
    return files, rows


def _manifest(
    options: PrepareOptions,
    inputs: Inputs,
    counted: list[PartitionCounts],
    built: list[examples.Built],
    written: dict[str, list[Shard]],
    vocab: dict[str, Shard],
    table_rows: dict[str, int],
) -> Manifest:
    rows = _sum([b.rows for b in built])

    def shares(of: str) -> list[float]:
        return [part / max(1, all_) for part, all_ in zip(_sum([getattr(b, of) for b in built]), rows, strict=True)]

    user, item = shares("unseen_user"), shares("unseen_item")
    return Manifest(
        source_domain="+".join(domain.name for domain in inputs.domains["source"]),
        target_domain=inputs.domains["target"][0].name,
        seed=options.seed,
        label=options.labels,
        eval_negatives=options.stored_negatives,
        rows=table_rows,
        counts={
            "users": sum(c.users for c in counted),
            "cold_users": sum(c.cold_users for c in counted),
            "source_items": vocab["source_item"].rows,
            "source_behaviours": sum(c.source_behaviours for c in counted),
            "target_items": vocab["target_item"].rows,
            "target_behaviours": sum(c.target_behaviours for c in counted),
            **{why: sum(c.left_out[why] for c in counted) for why in LEFT_OUT},
            **{f"{role}_log_users": sum(getattr(c, f"{role}_log_users") for c in counted) for role in inputs.domains},
            **dict(zip(POSITIVES, _sum([c.positives for c in counted]), strict=True)),
        },
        unseen={split: {"user": user[i], "item": item[i]} for i, split in enumerate(SPLITS) if split != "train"},
        unknown=dict(zip(SPLITS, shares("unknown"), strict=True)) | _unknown_source(built),
        shards=written,
        vocab=vocab,
        sources=[domain.name for domain in inputs.domains["source"]],
        features={
            of: list(options.features_of(of)) for of in (*inputs.domains, USER) if of != USER or options.user_file
        },
        options=_recorded(options, inputs),
    )


def _unknown_source(built: list[examples.Built]) -> dict[str, float]:
    """Shares of positive source behaviours whose item is unknown: of users with examples, and in sequences."""
    unknown, all_ = _sum([b.unknown_source for b in built]), _sum([b.source for b in built])
    return {name: n / max(1, of) for name, n, of in zip(UNKNOWN_SOURCE, unknown, all_, strict=True)}


def _warn_of_empty(built: list[examples.Built]) -> None:
    """Such an example tells a model that reads source sequences nothing of its user."""
    empty, all_ = (sum(_sum([getattr(b, of) for b in built])) for of in ("empty", "rows"))
    if empty:
        told = "%s of %s examples have no positive source behaviour before them; least_history=1 leaves them out"
        log.warning(told, f"{empty:,}", f"{all_:,}")


def _warn_of_unknown(manifest: Manifest) -> None:
    for name in UNKNOWN_SOURCE:
        if manifest.unknown[name] > MUCH_UNKNOWN:
            log.warning("%s: %.1f%% of the source behaviours are of unknown items", name, 100 * manifest.unknown[name])
