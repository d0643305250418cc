"""The planted truth of synthetic data, beside the dataset as truth.parquet.

It says which source categories help, or which users' target behaviours are what pre-training on the source expects.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest
from cdr_dist.errors import UserError

KINDS = ("helpful", "neutral", "harmful")
KINDS_OF_USERS = ("aligned", "contrary")
FILE = "truth.parquet"
"""Columns: category (string, of the source domain), kind (one of KINDS); or user_id, kind (one of KINDS_OF_USERS)."""


def of_categories(folder: str) -> bool:
    """Whether the truth is there, and one of categories."""
    return storage.exists(storage.join(folder, FILE)) and "category" in _read(folder)


def kinds_of_users(folder: str) -> dict[str, str]:
    """Key of a user -> one of KINDS_OF_USERS. UserError: no such truth."""
    uri = storage.join(folder, FILE)
    truth = _read(folder) if storage.exists(uri) else {}
    if "user_id" not in truth:
        raise UserError(
            f"{uri}: no kinds of users; this needs data with planted sequences, such as data=demo_sequences"
        )
    return dict(zip(truth["user_id"], truth["kind"], strict=True))


def kind_of_user(folder: str, manifest: Manifest) -> NDArray[np.float32]:
    """0 for contrary users, 1 for aligned ones and those unknown: [users] by id. UserError: no such truth."""
    kinds, vocab = kinds_of_users(folder), _vocabulary(folder, manifest, "user")
    found = np.ones(manifest.rows["user"], dtype=np.float32)
    found[vocab["id"]] = [kinds.get(key) != "contrary" for key in vocab["key"]]
    return found


def _vocabulary(folder: str, manifest: Manifest, name: str) -> dict[str, list]:
    return pq.read_table(
        pa.BufferReader(storage.read_bytes(storage.join(folder, manifest.vocab[name].path)))
    ).to_pydict()


def _read(folder: str) -> dict[str, list[str]]:
    return pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(folder, FILE)))).to_pydict()


def usefulness_by_category(folder: str, manifest: Manifest) -> list[str]:
    """The kind of every source category id, '' for padding, unknown and categories without one."""
    uri = storage.join(folder, FILE)
    if not of_categories(folder):
        raise UserError(f"{uri}: no kinds of categories; this recipe needs data with planted truth, such as data=demo")
    truth = _read(folder)
    kind = dict(zip(truth["category"], truth["kind"], strict=True))
    vocab = _vocabulary(folder, manifest, "source_category")
    found = [""] * manifest.rows["source_category"]
    for number, name in zip(vocab["id"], vocab["key"], strict=True):
        found[number] = kind.get(name, "")
    return found
