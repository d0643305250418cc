"""Sequences to pre-train on: every source user's positive behaviours, cut into windows.

Window w of a user holds the behaviours from w (longest - 1) on, `longest` at most: two that follow one another share an
item, so that every step from one item to the next is in exactly one window. A user of one behaviour has none.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdr_dist.data import hashing
from cdr_dist.data.behaviours import Behaviours, Ints, Slices
from cdr_dist.data.dataset import SEQUENCE_SCHEMA
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.splits import by_share


def window_counts(behaviours: Ints, longest: int) -> Ints:
    """How many windows so many behaviours make; none with longest=0."""
    return np.maximum(-(-(behaviours - 1) // (longest - 1)), 0) if longest else np.zeros_like(behaviours)


def window_ids(users: NDArray[np.uint64], number: Ints) -> Ints:
    """example_id of the windows of these numbers. users: `hashing.of_keys` of their keys."""
    return (hashing.mix(hashing.key("sequences"), users, number) >> np.uint64(1)).astype(np.int64)


def split_of_users(users: NDArray[np.uint64], options: PrepareOptions) -> NDArray[np.int8]:
    """Which of sequences_{train,valid,test} a user's windows are in: [n] hashes of keys -> [n] 0, 1 or 2."""
    drawn = hashing.uniform(hashing.mix(hashing.key(options.seed, "sequences"), users))
    return by_share(drawn, options.sequences_valid_share, options.sequences_test_share)


def sequence_rows(
    keys: pa.Array, ids: NDArray[np.int32], source: Behaviours, options: PrepareOptions
) -> tuple[pa.Table, NDArray[np.int8]]:
    """SEQUENCE_SCHEMA of n users, and the split of each row. keys, ids: [n]; items by vocabulary id."""
    users, positives, longest = hashing.of_keys(keys), source.where(source.label > 0), options.sequences
    windows = window_counts(positives.of_user, longest)
    owner = np.repeat(np.arange(len(ids)), windows)
    number = np.arange(len(owner)) - (np.cumsum(windows) - windows)[owner]
    first = number * (longest - 1)
    starts = positives.starts[owner] + first
    slices = Slices(starts, np.minimum(starts + longest, positives.starts[owner + 1]))
    columns = {
        "example_id": window_ids(users[owner], number),
        "user": ids[owner],
        "source_history_item": slices.of(positives.item.astype(np.int32)),
        "source_history_first": first.astype(np.int32),
    }
    return pa.table(columns, schema=SEQUENCE_SCHEMA), split_of_users(users, options)[owner]


def in_sequences(source: Behaviours, longest: int) -> NDArray[np.bool_]:
    """Which behaviours are in a window."""
    liked = source.label > 0
    return liked & (window_counts(source.where(liked).of_user, longest) > 0)[source.user]
