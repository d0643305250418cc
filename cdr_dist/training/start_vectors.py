"""Tables that start from given vectors: a Parquet file of keys and vectors, of which every worker takes its own rows.

A worker holds the keys of its own rows of one table, and one row group of the file: of each row group it reads the
column `id`, and the column `vector` only where a key is its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import polars as pl
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from cdr_dist.configuration import STARTS, TrainConfig
from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest
from cdr_dist.data.parquet_input import ParquetInput
from cdr_dist.errors import UserError, nearest
from cdr_dist.training.checks import build_model

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

ID, VECTOR = "id", "vector"


LARGEST = 1e6
"""Larger values, which a damaged file may hold, make a model diverge at once."""


def check_start_files(config: TrainConfig, manifest: Manifest) -> None:
    """UserError: a table that the model does not have, a file that is not there or has other columns."""
    features = build_model(config).spec().features
    for table, uri in config.tables.start.items():
        _vocabulary(table, features)
        _columns(uri, _open(uri), config.tables.width)


def start_from_vectors(session: Session) -> dict[str, int]:
    """Writes the given vectors into the tables -> how many rows of each table they were. All workers call it.

    UserError, on all of them: a vector of another width, not finite or beyond LARGEST, a key twice, none of its keys.
    """
    found = {}
    for table, uri in session.config.tables.start.items():
        vocabulary = _vocabulary(table, session.features)
        filled, error = 0, ""
        try:
            first, shard = session.tables.shards()[table]
            filled = _fill(uri, shard, _own_keys(session, vocabulary, first, len(shard)))
        except UserError as mistake:  # the other workers wait for this one's word
            error = str(mistake)
        answers = [(error, filled)] * session.workers
        if session.workers > 1:
            dist.all_gather_object(answers, (error, filled))
        if error := next((e for e, _ in answers if e), ""):
            raise UserError(error)
        found[table] = sum(rows for _, rows in answers)
        if not found[table]:
            raise UserError(f"{uri}: none of its keys is in the vocabulary {vocabulary} of {session.folder}")
    return found


def _vocabulary(table: str, features: dict[str, str]) -> str:
    """The vocabulary that numbers the table's rows: that of its one feature."""
    reading = [feature for feature, its in features.items() if its == table]
    if not reading:
        raise UserError(f"{STARTS}{table}: no such table; {nearest(table, sorted(set(features.values())))}")
    if len(reading) > 1:
        raise UserError(f"{STARTS}{table}: its rows have several vocabularies ({', '.join(reading)}), so no one key")
    return reading[0]


def _open(uri: str) -> ParquetInput:
    with storage.naming(uri):
        return ParquetInput(storage.open_input(uri), checksums=True)


def _columns(uri: str, file: ParquetInput, width: int) -> None:
    schema = file.schema_arrow
    for name in (ID, VECTOR):
        if name not in schema.names:
            raise UserError(f"{uri}: has no column {name}; needed: {ID} (the key) and {VECTOR} (a list of numbers)")
    key, vector = schema.field(ID).type, schema.field(VECTOR).type
    if not (pa.types.is_string(key) or pa.types.is_large_string(key) or pa.types.is_integer(key)):
        raise UserError(f"{uri}: column {ID} holds {key}, not text or whole numbers")
    lists = pa.types.is_list(vector) or pa.types.is_large_list(vector) or pa.types.is_fixed_size_list(vector)
    if not lists or not pa.types.is_floating(vector.value_type):
        raise UserError(f"{uri}: column {VECTOR} holds {vector}, not lists of floating-point numbers")
    if pa.types.is_fixed_size_list(vector) and vector.list_size != width:
        raise UserError(f"{uri}: vectors of {vector.list_size} values, tables.width={width}")


def _own_keys(session: Session, vocabulary: str, first: int, rows: int) -> pl.DataFrame:
    """The keys (key, row) of the rows `first` .. `first + rows - 1` of a table; row counts from `first`."""
    uri = storage.join(session.folder, session.manifest.vocab[vocabulary].path)
    file, parts = _open(uri), [pl.DataFrame(schema={"key": pl.String, "row": pl.Int64})]
    for group in range(file.num_row_groups):
        known = file.metadata.row_group(group).column(0).statistics  # of id, the first column
        if known is not None and known.has_min_max and (known.max < first or known.min >= first + rows):
            continue
        with storage.naming(uri):
            table = pl.DataFrame(pl.from_arrow(file.read_row_group(group, columns=["id", "key"])))
        row = pl.col("id").cast(pl.Int64) - first
        parts.append(table.select("key", row=row).filter(pl.col("row").is_between(0, rows - 1)))
    return pl.concat(parts)


def _fill(uri: str, shard: Tensor, own: pl.DataFrame) -> int:
    """Writes the vectors of the own keys into the shard -> how many."""
    file, width = _open(uri), shard.shape[1]
    _columns(uri, file, width)
    filled = np.zeros(len(shard), dtype=bool)
    for group in range(file.num_row_groups):
        with storage.naming(uri):
            keys = pl.DataFrame(pl.from_arrow(file.read_row_group(group, columns=[ID])))
        found = keys.select(key=pl.col(ID).cast(pl.String)).with_row_index("at").join(own, on="key", how="inner")
        if found.is_empty():
            continue
        row = found["row"].to_numpy().copy()  # torch wants it writable
        twice = filled[row] | ~found["row"].is_first_distinct().to_numpy()
        if twice.any():
            raise UserError(f"{uri}: key '{found['key'][int(twice.argmax())]}' occurs twice")
        filled[row] = True
        with storage.naming(uri):
            vectors = file.read_row_group(group, columns=[VECTOR]).column(VECTOR).combine_chunks()
        values = _values(uri, vectors.take(found["at"].to_arrow()), found["key"], width)
        shard[torch.from_numpy(row).to(shard.device)] = torch.from_numpy(values).to(shard.device)
    return int(filled.sum())


def _values(uri: str, vectors: pa.Array, keys: pl.Series, width: int) -> np.ndarray:
    """Vectors of the given keys -> float32 [n, width]."""
    lengths = pl.Series(pa.array(vectors).value_lengths()).fill_null(0).to_numpy()
    if (wrong := lengths != width).any():
        at = int(wrong.argmax())
        raise UserError(f"{uri}: the vector of key '{keys[at]}' has {lengths[at]} values, tables.width={width}")
    values = vectors.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    if (wrong := ~np.isfinite(values).all(axis=1)).any():
        raise UserError(f"{uri}: the vector of key '{keys[int(wrong.argmax())]}' holds a value that is not finite")
    if (wrong := (np.abs(values) > LARGEST).any(axis=1)).any():
        raise UserError(
            f"{uri}: the vector of key '{keys[int(wrong.argmax())]}' holds a value beyond {LARGEST:g}: "
            "scale the vectors, or copy the file again if it is damaged"
        )
    return values
