"""Spill files: rows sorted into buckets on scratch storage, so that one bucket can be read without the others.

A spill file is one Arrow IPC file whose record batch number b holds the rows of bucket b, in their given order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from cdr_dist.crash_points import durable
from cdr_dist.data import storage

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def write(uri: str, table: pa.Table, bucket: np.ndarray, buckets: int) -> str:
    """Writes a table; `bucket` gives each row's bucket, 0..buckets-1. Returns the uri."""
    if (bucket[1:] < bucket[:-1]).any():
        order = np.argsort(bucket, kind="stable")
        bucket, table = bucket[order], table.take(pa.array(order))
    ends, rows = np.searchsorted(bucket, np.arange(buckets + 1)), table.combine_chunks()
    with (
        durable("prepare.spill"),
        storage.open_output(uri, durable=False) as file,
        pa.ipc.new_file(file, table.schema, options=_OPTIONS) as writer,
    ):
        for start, end in itertools.pairwise(ends):
            batches = rows.slice(start, end - start).to_batches()
            writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema))
    return uri


def read(uris: Sequence[str], bucket: int) -> pa.Table:
    """The rows of one bucket of all files, file after file."""
    batches = []
    for uri in uris:
        with storage.open_input(uri) as file:
            batches.append(pa.ipc.open_file(file).get_batch(bucket))
    return pa.Table.from_batches(batches)


def write_all(uri: str, table: pa.Table) -> str:
    """Writes a table as one bucket."""
    return write(uri, table, np.zeros(table.num_rows, dtype=np.int64), 1)
