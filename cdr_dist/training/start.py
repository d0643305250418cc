"""What a new run starts from, checked before anything starts: given vectors, and the parameters of an earlier run."""

from __future__ import annotations

import io
from typing import Any

import polars as pl

from cdr_dist.configuration import TrainConfig, whole_model
from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.feature_names import vocabulary_of
from cdr_dist.errors import UserError
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.checks import build_model
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.start_vectors import check_start_files


def check_start(config: TrainConfig, folder: str, manifest: Manifest) -> None:
    """UserError: a file or an earlier run that is not there or does not fit."""
    check_start_files(config, manifest)
    first = config.recipe.phases[0]
    if first.start == "pretrained" and not config.warm_start.run:
        raise UserError(
            f"recipe={config.recipe.name}: fine-tunes a pre-trained run; name it, warm_start.run=FOLDER "
            "(python jobs/train.py recipe=pretrain model=nextitnet makes one)"
        )
    if config.warm_start.run:
        if first.start == "pretrained":
            _check_pretrained(RunFolder(config.warm_start.run))
        check_fits(RunFolder(config.warm_start.run), config, folder, manifest)


def _check_pretrained(place: RunFolder) -> None:
    before = place.config()
    if before.recipe.transfer or not (before.recipe.pretrain or before.recipe.source):
        earlier = before.warm_start.run if before.recipe.transfer else ""
        other = f"; it began with {earlier}, which may be one" if earlier else ""
        raise UserError(
            f"{place.uri}: is no pre-trained run but one of recipe={before.recipe.name}; "
            f"warm_start.run= names one of recipe=pretrain{other}"
        )


def check_fits(place: RunFolder, config: TrainConfig, folder: str, manifest: Manifest) -> None:
    """UserError: the earlier run is of another model, or its dataset gave an id to another key."""
    before = place.config()
    best_step(place)
    model = build_model(config)
    for what, old, new in _to_agree(before, config, model):
        if old != new:
            raise UserError(f"{place.uri}: does not fit: {what} is {_shown(old)} there, {_shown(new)} here")
    earlier_folder = dataset_of(before.data)
    if earlier_folder == folder:
        return
    try:
        earlier = read_manifest(earlier_folder)
    except UserError as error:
        raise UserError(f"{place.uri}: nobody can tell what its rows stand for: {error}") from error
    if earlier.checksum != manifest.checksum:
        shared = {*earlier.vocab} & {*manifest.vocab}
        if hasattr(model, "architecture"):
            shared &= vocabularies_of(build_model(before)) & vocabularies_of(model)
        for name in sorted(shared):
            _check_ids(name, earlier_folder, earlier, folder, manifest)


def _to_agree(before: TrainConfig, config: TrainConfig, model: Any) -> list[tuple[str, Any, Any]]:
    """What the two runs must have in common: the whole model, or what it says its architecture is."""
    width = ("tables.width", before.tables.width, config.tables.width)
    target = ("model", before.model["_target_"], config.model["_target_"])
    if target[1] != target[2]:
        return [target]
    if not hasattr(model, "architecture"):
        recipe = ("the recipe's source", before.recipe.source, config.recipe.source)
        return [("model", whole_model(before.model), whole_model(config.model)), width, recipe]
    old, new = build_model(before).architecture(), model.architecture()
    return [width, *((f"model.{name}", old[name], new[name]) for name in new)]


def vocabularies_of(model: Any) -> set[str]:
    """Those whose ids a model's tables take."""
    spec = model.spec()
    return {vocabulary_of(feature) for feature in (*spec.features, *spec.sequences)}


def _shown(value: Any) -> str:
    return str(dict(value)) if hasattr(value, "items") else str(value)


def _check_ids(name: str, earlier_folder: str, earlier: Manifest, folder: str, manifest: Manifest) -> None:
    """Every key that both know has one id, and every id that both know one key; a key may be gone."""
    old, new = _keys(earlier_folder, earlier, name), _keys(folder, manifest, name)
    moved = old.join(new, on="key").filter(pl.col("id") != pl.col("id_right"))
    if not moved.is_empty():
        key, was, now = moved.row(0)
    else:
        given_on = old.join(new, on="id").filter(pl.col("key") != pl.col("key_right"))
        if given_on.is_empty():
            return
        was, now, key = given_on.select("key", "key_right", "id").row(0)
    raise UserError(
        f"{folder}: {name} {key} was {was} in {earlier_folder} and is {now} now: "
        f"prepare it with extends={earlier_folder}"
    )


def _keys(folder: str, manifest: Manifest, name: str) -> pl.DataFrame:
    uri = storage.join(folder, manifest.vocab[name].path)
    return pl.read_parquet(io.BytesIO(storage.read_bytes(uri)), columns=["key", "id"])
