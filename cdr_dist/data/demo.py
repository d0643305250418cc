"""The demo datasets: planted logs, prepared like anybody's, with the truth and the shape they were made by beside them.

The folder appears as a whole or not at all. It grows in `FOLDER.unfinished`, under a lock that ends with its process:
what a killed writer left is cleared away by the next one, and a second process waits and then uses what is there.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cdr_dist.data import storage
from cdr_dist.data.dataset import SCHEMA_VERSION, Manifest, read_manifest
from cdr_dist.data.planted_sequences import PlantedSequences, planted_sequences
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.synthetic import Planted, PlantedLogs, planted_logs
from cdr_dist.data.truth import FILE
from cdr_dist.errors import UserError

DEMO, DEMO_SEQUENCES = "demo", "demo_sequences"
FOLDER = "runs/demo-data"
"""Relative to the current directory, as run folders are."""
Shape = Planted | PlantedSequences
DEMOS: dict[str, tuple[str, Shape]] = {
    DEMO: (FOLDER, Planted()),
    DEMO_SEQUENCES: ("runs/demo-sequences-data", PlantedSequences()),
    "demo_sequences_tenth": ("runs/demo-sequences-tenth-data", PlantedSequences(train_share=0.1)),
    "demo_classes": ("runs/demo-classes-data", PlantedSequences(classes=4, target_behaviours=1)),
}
"""What `data=` may name -> its folder and what is planted there."""
SHAPE_FILE = "planted.json"
GENERATOR = 3
"""Goes up when the same shape makes other logs."""


def dataset_of(data: str) -> str:
    """The dataset folder that `data=` names; a demo is written on first use."""
    if data in DEMOS:
        write_planted(DEMOS[data][1], folder_of(data))
    return folder_of(data)


def folder_of(data: str) -> str:
    """As `dataset_of`, where nothing need be written yet."""
    return str(Path(DEMOS[data][0]).absolute()) if data in DEMOS else data


def is_written(data: str = DEMO) -> bool:
    """Whether a demo is there, made as this program makes it."""
    folder, shape = DEMOS[data]
    return _holds(Path(folder), shape)


def write_planted(shape: Shape, folder: str) -> Manifest:
    """Logs of the given shape as a dataset in a local folder, with truth.parquet and planted.json beside the shards.

    What is there is kept if it was made by the same shape, else written anew. UserError: the folder holds something
    that is not planted data.
    """
    out = Path(folder).absolute()
    if not _holds(out, shape):
        with _lock(out):
            if not _holds(out, shape):
                _check_replaceable(out)
                print(f"writing planted data to {folder}", file=sys.stderr, flush=True)
                _write(shape, out)
    return read_manifest(str(out))


def _made(shape: Shape) -> tuple[PlantedLogs, dict[str, Any]]:
    """The logs, and how they are prepared."""
    if isinstance(shape, Planted):
        return planted_logs(shape), {}
    split = {"split": "user", "valid_share": 0.1, "test_share": 0.2, "sequences": shape.longest}
    kept = {"train_share": shape.train_share, "classes": shape.classes}
    return planted_sequences(shape), split | kept | {
        "labels": "sampled",
        "eval_negatives": min(99, shape.classes - 1) if shape.classes else 99,
    }


def _write(shape: Shape, out: Path) -> None:
    # The same place at every start, since the manifest tells where the logs were: a demo that is written anew is then
    # the same dataset to the runs that were trained on it.
    scratch = out.with_name(f"{out.name}.unfinished")
    storage.remove_folder(str(scratch))
    scratch.mkdir()
    try:
        logs, options = _made(shape)
        logs.source.write_parquet(scratch / "source.parquet")
        logs.target.write_parquet(scratch / "target.parquet")
        new = scratch / "dataset"
        prepare(
            PrepareOptions(
                source=str(scratch / "source.parquet"),
                target=str(scratch / "target.parquet"),
                source_domain="planted-source",
                target_domain="planted-target",
                out=str(new),
                seed=shape.seed,
                **options,
            )
        )
        logs.truth.write_parquet(new / FILE)
        (new / SHAPE_FILE).write_text(json.dumps(_recorded(shape), indent=1) + "\n")
        if out.exists():
            out.rename(scratch / "replaced")
        new.rename(out)
    finally:
        storage.remove_folder(str(scratch))


def _recorded(shape: Shape) -> dict[str, object]:
    """What decides the bytes of the dataset."""
    return {"generator": GENERATOR, "schema": SCHEMA_VERSION} | asdict(shape)


def _holds(folder: Path, shape: Shape) -> bool:
    try:
        return json.loads((folder / SHAPE_FILE).read_text()) == _recorded(shape)
    except (OSError, ValueError):
        return False


def _check_replaceable(folder: Path) -> None:
    """Nobody's own files are removed: only an empty folder, or one with a dataset's manifest and planted truth."""
    if storage.is_empty(str(folder)) or (folder / FILE).exists():
        return
    raise UserError(f"{folder}: holds something that is not planted data; move it away")


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(f"{out.name}.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
