"""The planted truth of synthetic data: which source categories help, beside the dataset as truth.parquet."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest
from cdr_dist.errors import UserError

KINDS = ("helpful", "neutral", "harmful")
FILE = "truth.parquet"
"""Columns: category (string, of the source domain), kind (one of KINDS)."""


def usefulness_by_category(folder: str, manifest: Manifest) -> list[str]:
    """The kind of every source category id, '' for padding, unknown and categories without one."""
    uri = storage.join(folder, FILE)
    if not storage.exists(uri):
        raise UserError(f"{uri}: not found; this recipe needs data with planted truth, such as data=demo")
    truth = pq.read_table(pa.BufferReader(storage.read_bytes(uri))).to_pydict()
    kind = dict(zip(truth["category"], truth["kind"], strict=True))
    vocab_uri = storage.join(folder, manifest.vocab["source_category"].path)
    vocab = pq.read_table(pa.BufferReader(storage.read_bytes(vocab_uri))).to_pydict()
    found = [""] * manifest.rows["source_category"]
    for number, name in zip(vocab["id"], vocab["key"], strict=True):
        found[number] = kind.get(name, "")
    return found
