"""Reading the Parquet shards of one split, by row group, local or from an object store."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, Shard
from cdr_dist.data.lanes import Piece
from cdr_dist.data.parquet_input import ParquetInput
from cdr_dist.data.read_ahead import ReadAhead
from cdr_dist.data.replicas import Replicas
from cdr_dist.errors import UserError

CHECKSUM_LIMIT_BYTES = 1 << 30
"""Datasets up to this size are verified by checksum at every start; larger ones by size, unless asked."""
FOOTERS_KEPT = 64


class ShardReader:
    """Row groups of a split as Arrow tables with the given columns; the last few decoded ones are kept."""

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        split: str,
        columns: Sequence[str],
        keep: int = 4,
        replicas: Replicas | None = None,
    ) -> None:
        self._columns, self._keep = list(columns), keep
        self._replicas = Replicas(folder, manifest) if replicas is None else replicas
        self._place = [(shard, i) for shard in manifest.shards[split] for i in range(len(shard.row_groups))]
        self.row_groups = tuple(n for shard in manifest.shards[split] for n in shard.row_groups)
        self._footers = _Footers()
        self._decoded: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        # Local files cost decoding only, for which the stream's own thread is enough: more threads slow training down.
        self._ahead = ReadAhead(self._fetch, storage.options().ahead_mib << 20 if self._replicas.remote else 0)

    def read(self, piece: Piece) -> pa.Table:
        return self._row_group(piece.row_group).slice(piece.start, piece.rows)

    def plan(self, who: Hashable, row_groups: Sequence[int]) -> None:
        """Announces the row groups that `who` will read next, in order: they are fetched ahead."""
        self._ahead.plan(who, [index for index in row_groups if index not in self._decoded])

    def _row_group(self, index: int) -> pa.Table:
        with self._lock:  # streams may share a reader; what one waits for the next may want, too
            if index in self._decoded:
                self._decoded.move_to_end(index)
                return self._decoded[index]
            table = self._decoded[index] = self._ahead.get(index)
            while len(self._decoded) > self._keep:
                self._decoded.popitem(last=False)
            return table

    def _fetch(self, index: int) -> pa.Table:
        shard, within = self._place[index]
        return self._replicas.read(shard.path, lambda uri: self._decoded_from(uri, shard, within))

    def _decoded_from(self, uri: str, shard: Shard, within: int) -> pa.Table:
        """Every try opens the file anew: one that failed stays failed."""

        def decode(file: Any) -> pa.Table:
            try:
                known = self._footers.get(uri)
                opened = ParquetInput(file, known, checksums=True)
                table = opened.read_row_group(within, self._columns)
                self._footers.put(uri, opened.metadata)
            except Exception:
                self._footers.forget(uri)
                raise
            return table

        table = storage.decoded(uri, shard.bytes, decode)
        if table.num_rows != shard.row_groups[within]:
            raise UserError(f"{uri}: row group {within} holds {table.num_rows} rows, not {shard.row_groups[within]}")
        return table


class _Footers:
    """The shards' metadata that was read last; threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    def get(self, uri: str) -> pq.FileMetaData | None:
        with self._lock:
            return self._found.get(uri)

    def put(self, uri: str, footer: pq.FileMetaData) -> None:
        with self._lock:
            self._found[uri] = footer
            while len(self._found) > FOOTERS_KEPT:
                self._found.popitem(last=False)

    def forget(self, uri: str) -> None:
        with self._lock:
            self._found.pop(uri, None)


def verify(folder: str, manifest: Manifest, part: int = 0, parts: int = 1, how: str = "auto") -> None:
    """Checks the shards and vocabularies part, part + parts, … against the manifest; UserError names the first bad one.

    how: checksum, size, or auto (checksum up to 1 GiB in all). Workers share the files out among themselves. Shards are
    checked where this process will read them.
    """
    shards = [s for shards in manifest.shards.values() for s in shards]
    files = shards + list(manifest.vocab.values())
    if how == "auto":
        how = "checksum" if sum(f.bytes for f in files) <= CHECKSUM_LIMIT_BYTES else "size"
    replicas = Replicas(folder, manifest)
    for number, file in list(enumerate(files))[part::parts]:
        if number < len(shards):
            replicas.read(file.path, lambda uri, file=file: _verify(uri, file, how))  # type: ignore[misc]
        else:
            _verify(storage.join(folder, file.path), file, how)


def _verify(uri: str, file: Shard, how: str) -> None:
    if how == "checksum":
        content = storage.read_bytes(uri)
        size, same = len(content), storage.sha256(content) == file.sha256
    else:
        size, same = storage.size(uri), True
    if size != file.bytes:
        raise UserError(f"{uri}: {size} bytes, the manifest says {file.bytes}; the file is truncated or replaced")
    if not same:
        raise UserError(f"{uri}: its checksum differs from the manifest's; the file is damaged or replaced")
