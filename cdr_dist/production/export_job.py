"""The work of jobs/export.py: a finished run as files that other programs read without cdr_dist.

OUT/tables/NAME/part-00000.parquet …     id, key, vector; a part of each worker
OUT/vocab/{source,target}_item.parquet   id, key, category and declared columns of the items, by value id
OUT/scorer.pt2                           the dense part, by torch.export
OUT/export.json                          what goes into it; written last
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cdr_dist.configuration import from_yaml, to_yaml
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.feature_names import USER, is_bag, of_history, vocabulary_of
from cdr_dist.data.keys import Keys
from cdr_dist.data.shards import verify
from cdr_dist.data.words import check, described, fields_of, option, values_of
from cdr_dist.training.best import best_of_run, check_knows_targets
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.launch import on_workers, quiet_libraries, with_workers
from cdr_dist.training.memory import check_memory_here
from cdr_dist.training.run_folder import RunFolder

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

DONE = "export.json"
ROWS = 1 << 16
"""Of a row group."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export, and where."""

    run: str = option("", "folder of the finished run, local or a URI")
    out: str = option("", "folder of the export, local or a URI; must be empty")
    workers: int | None = option(None, "workers; empty: as many as trained the run; 0: in this process")

    def __post_init__(self) -> None:
        for name in ("run", "out"):
            check(bool(getattr(self, name)), f"{name}= is missing; see --help")
        check(self.workers is None or self.workers >= 0, f"workers={self.workers}: must be 0 or more")


def describe_options() -> str:
    return "\n".join(described(fields_of(ExportOptions), ("run", "out")))


def export_job(words: Sequence[str]) -> None:
    options = ExportOptions(**values_of(list(words), fields_of(ExportOptions)))
    quiet_libraries()
    place = RunFolder(options.run)
    config = place.config()
    check_knows_targets(config, place)
    storage.use(config.storage)
    step = best_step(place)
    config = with_workers(config, options.workers)
    _check_free(options.out)
    folder, out = storage.absolute(dataset_of(config.data)), storage.absolute(options.out)
    given = {"config": to_yaml(config), "folder": folder, "run": place.uri, "step": step, "out": out}
    found = on_workers(config, place, export_worker, given)
    storage.write_bytes(storage.join(options.out, DONE), (json.dumps(found, indent=1) + "\n").encode())
    rows = ", ".join(f"{name} {of['rows']:,}" for name, of in found["tables"].items())
    print(f"{options.out}: step {step} of {options.run}; tables of rows: {rows}; scorer.pt2")


def _check_free(out: str) -> None:
    """What a killed export left is written over."""
    if not storage.is_empty(out):
        names = set(storage.names(out))
        check(bool(names) and names <= {"tables", "vocab", "scorer.pt2"}, f"{out}: is not empty; choose another out=")
        for name in ("tables", "vocab"):
            storage.remove_folder(storage.join(out, name))


def export_worker(given: dict[str, Any]) -> dict[str, Any] | None:
    """What every worker runs; torch.distributed is initialised. Worker 0 returns export.json's content."""
    from cdr_dist.production.scorer import exported, features_of

    quiet_libraries()
    config, folder, out = from_yaml(given["config"]), given["folder"], given["out"]
    storage.use(config.storage)
    place, memory = RunFolder(given["run"]), check_memory_here(config, read_manifest(folder))
    with best_of_run(config, folder, place, given["step"], memory) as session:
        verify(folder, session.manifest, session.rank, session.workers, config.trainer.verify)
        longest, width = config.batch.history_length, config.tables.width
        model = session.model.cpu()
        read = {name: session.features[name] for name in features_of(model, width, longest)}
        program = exported(model, width, longest) if session.rank == 0 else None
        tables = {name: _write_table(session, name, out) for name in session.tables.specs if name in read.values()}
        if program is None:
            return None
        keyed = {vocabulary_of(f) for f in read} & {"source_item", "target_item"}
        if any(name.startswith(f"{USER}_") for name in read):  # whose vocabulary says which values a user has
            keyed.add(USER)
        for name in sorted(keyed):
            path = session.manifest.vocab[name].path
            storage.write_bytes(storage.join(out, path), storage.read_bytes(storage.join(folder, path)))
        file = io.BytesIO()
        torch.export.save(program, file)
        storage.write_bytes(storage.join(out, "scorer.pt2"), file.getvalue())
        features = {
            name: {
                "table": table,
                "vocabulary": vocabulary_of(name),
                "shape": ["rows", longest, width] if of_history(name) else ["rows", width],
                "values": "sum" if is_bag(name) else "one",
            }
            for name, table in read.items()
        }
        domains = sorted({name.partition("_")[0] for name in features if of_history(name)})
        return {
            "schema": 1,
            "run": place.uri,
            "step": given["step"],
            "torch": torch.__version__,
            "features": features,
            "lengths": {domain: ["rows"] for domain in domains},
            "tables": tables,
        }


def _write_table(session: Session, name: str, out: str) -> dict[str, Any]:
    """This worker's rows -> what all workers' are. Padding rows behind the vocabulary are left out."""
    vocabularies = sorted({vocabulary_of(f) for f, table in session.features.items() if table == name})
    rows = max(session.manifest.rows[v] for v in vocabularies)
    keys = Keys(session.folder, session.manifest, vocabularies[0]) if len(vocabularies) == 1 else None
    first, shard = session.tables.shards()[name]
    width = shard.shape[1]
    schema = pa.schema([("id", pa.int32()), ("key", pa.string()), ("vector", pa.list_(pa.float32(), width))])
    uri = storage.join(out, f"tables/{name}/part-{session.rank:05d}.parquet")
    with (
        storage.open_output(uri) as file,
        pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=False, write_page_checksum=True) as writer,
    ):
        for start in range(0, max(0, min(rows - first, len(shard))), ROWS):
            vectors = shard[start : min(start + ROWS, rows - first)].float().cpu().numpy()
            ids = first + start + np.arange(len(vectors))
            key = pa.nulls(len(ids), pa.string()) if keys is None else keys.of(ids)
            flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
            writer.write_table(pa.table([pa.array(ids.astype(np.int32)), key, flat], schema=schema))
    return {"rows": rows, "width": width, "vocabularies": vocabularies}
