"""The demo dataset: planted logs, prepared like anybody's, with the truth beside them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.synthetic import Planted, planted_logs
from cdr_dist.data.truth import FILE

DEMO = "demo"
FOLDER = "runs/demo-data"


def dataset_of(data: str) -> str:
    """The dataset folder that `data=` names; the demo is written on first use."""
    if data != DEMO:
        return data
    folder = Path(FOLDER).absolute()
    if not is_written():
        write_planted(Planted(), str(folder))
    return str(folder)


def is_written() -> bool:
    """Whether the demo is there; its truth is written last."""
    return (Path(FOLDER) / FILE).exists()


def write_planted(shape: Planted, folder: str) -> Manifest:
    """Writes logs of the given shape, prepares them into `folder` and puts truth.parquet beside the shards."""
    logs = planted_logs(shape)
    with tempfile.TemporaryDirectory(prefix="cdr-planted-") as scratch:
        for name in ("source", "target"):
            getattr(logs, name).write_parquet(os.path.join(scratch, f"{name}.parquet"))
        manifest = prepare(
            PrepareOptions(
                source=os.path.join(scratch, "source.parquet"),
                target=os.path.join(scratch, "target.parquet"),
                source_domain="planted-source",
                target_domain="planted-target",
                out=folder,
                seed=shape.seed,
            )
        )
        truth = os.path.join(scratch, FILE)
        logs.truth.write_parquet(truth)
        storage.write_bytes(storage.join(folder, FILE), Path(truth).read_bytes())
    return manifest
