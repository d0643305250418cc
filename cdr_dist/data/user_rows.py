"""What is known of every user at the end of the logs: the latest histories, which a recommendation starts from.

Users who have no examples (of one domain's log alone, with users=both) have a row, too, without an id of their own.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cdr_dist.data import hashing
from cdr_dist.data.behaviours import Behaviours, Slices, most_recent
from cdr_dist.data.dataset import UNKNOWN, USER_SCHEMA


def user_rows(
    keys: pa.Array, ids: NDArray[np.int32], target: Behaviours, source: Behaviours, history_length: int
) -> pa.Table:
    """USER_SCHEMA of n users: keys and ids [n], and their behaviours, of items by vocabulary id."""
    histories, first = {}, np.zeros(0, dtype=np.int64)
    for role, of in (("target", target), ("source", source)):
        positives = of.where(of.label > 0)
        latest = most_recent(positives.starts[:-1], positives.starts[1:], history_length)
        histories[f"{role}_history_item"] = latest.of(positives.item.astype(np.int32))
        first = latest.starts - positives.starts[:-1]
    last = most_recent(source.starts[:-1], source.starts[1:], 1)
    kept = source.label > 0
    before = np.cumsum(kept) - kept - source.where(kept).starts[source.user]
    columns = histories | {
        "user_id": keys,
        "example_id": (hashing.of_keys(keys) >> np.uint64(1)).astype(np.int64),
        "user": ids,
        "source_history_first": first.astype(np.int32),
        "source_candidates_item": last.of(source.item.astype(np.int32)),
        "source_candidates_label": last.of(source.label.astype(np.float32)),
        "source_candidates_before": last.of(before.astype(np.int32)),
        "seen_item": _seen(target),
    }
    return pa.table([columns[name] for name in USER_SCHEMA.names], schema=USER_SCHEMA)


def _seen(target: Behaviours) -> pa.ListArray:
    """Of each user the known items, once."""
    known = target.item > UNKNOWN
    pairs = np.unique(np.stack([target.user[known], target.item[known]]), axis=1)
    starts = np.searchsorted(pairs[0], np.arange(target.users + 1))
    return Slices(starts[:-1], starts[1:]).of(pairs[1].astype(np.int32))
