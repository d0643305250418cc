"""Reading the Parquet shards of one split, by row group, local or from an object store."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, Shard
from cdr_dist.data.lanes import Piece
from cdr_dist.errors import UserError

CHECKSUM_LIMIT_BYTES = 1 << 30
"""Datasets up to this size are verified by checksum at every start; larger ones by size, unless asked."""


class ShardReader:
    """Row groups of a split as Arrow tables with the given columns; the last few decoded ones are kept."""

    def __init__(self, folder: str, manifest: Manifest, split: str, columns: Sequence[str], keep: int = 4) -> None:
        self._folder, self._columns, self._keep = folder, list(columns), keep
        self._place = [(shard, i) for shard in manifest.shards[split] for i in range(len(shard.row_groups))]
        self.row_groups = tuple(n for shard in manifest.shards[split] for n in shard.row_groups)
        self._files: OrderedDict[str, pq.ParquetFile] = OrderedDict()
        self._decoded: OrderedDict[int, pa.Table] = OrderedDict()

    def read(self, piece: Piece) -> pa.Table:
        return self._row_group(piece.row_group).slice(piece.start, piece.rows)

    def _row_group(self, index: int) -> pa.Table:
        if index in self._decoded:
            self._decoded.move_to_end(index)
            return self._decoded[index]
        shard, within = self._place[index]
        uri = storage.join(self._folder, shard.path)
        with storage.naming(uri):
            table = self._open(shard).read_row_group(within, columns=self._columns, use_threads=False)
        if table.num_rows != shard.row_groups[within]:
            raise UserError(f"{uri}: row group {within} holds {table.num_rows} rows, not {shard.row_groups[within]}")
        self._decoded[index] = table
        while len(self._decoded) > self._keep:
            self._decoded.popitem(last=False)
        return table

    def _open(self, shard: Shard) -> pq.ParquetFile:
        if shard.path not in self._files:
            file = storage.open_input(storage.join(self._folder, shard.path))
            self._files[shard.path] = pq.ParquetFile(file, pre_buffer=True)
            while len(self._files) > 16:
                self._files.popitem(last=False)[1].close()
        return self._files[shard.path]


def verify(folder: str, manifest: Manifest, part: int = 0, parts: int = 1, how: str = "auto") -> None:
    """Checks the shards and vocabularies part, part + parts, … against the manifest; UserError names the first bad one.

    how: checksum, size, or auto (checksum up to 1 GiB in all). Workers share the files out among themselves.
    """
    files = [s for shards in manifest.shards.values() for s in shards] + list(manifest.vocab.values())
    if how == "auto":
        how = "checksum" if sum(f.bytes for f in files) <= CHECKSUM_LIMIT_BYTES else "size"
    for file in files[part::parts]:
        uri = storage.join(folder, file.path)
        if how == "checksum":
            content = storage.read_bytes(uri)
            size, same = len(content), storage.sha256(content) == file.sha256
        else:
            size, same = storage.size(uri), True
        if size != file.bytes:
            raise UserError(f"{uri}: {size} bytes, the manifest says {file.bytes}; the file is truncated or replaced")
        if not same:
            raise UserError(f"{uri}: its checksum differs from the manifest's; the file is damaged or replaced")
