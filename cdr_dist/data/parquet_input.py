"""Parquet files read by the thread that asks, in few requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cdr_dist.data.storage import InputFile

BATCH_ROWS = 1 << 18


class ParquetInput(pq.ParquetFile):
    """A Parquet file whose row groups are fetched by the thread that asks for them, in as few requests as they need.

    Arrow's own threads, which pyarrow lets fetch ahead, call Python for each read: one that is still within it when the
    interpreter goes down aborts the process.

    file: an InputFile, or a native one of Arrow, which is read as it is.
    """

    def __init__(self, file: Any, metadata: pq.FileMetaData | None = None, checksums: bool = False) -> None:
        super().__init__(file, metadata=metadata, pre_buffer=False, page_checksum_verification=checksums)
        self._file = file

    def read_row_group(self, i: int, columns: Sequence[str] | None = None) -> pa.Table:  # type: ignore[override]
        """columns: None is all of them."""
        self._fetch(i, columns)
        return super().read_row_group(i, columns=columns, use_threads=False)

    def iter_batches(  # type: ignore[override]
        self, batch_size: int = BATCH_ROWS, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """In file order; one row group's bytes are held at a time."""
        for group in range(self.num_row_groups):
            self._fetch(group, columns)
            yield from super().iter_batches(batch_size, [group], columns, use_threads=False)

    def _fetch(self, row_group: int, columns: Sequence[str] | None) -> None:
        if isinstance(self._file, InputFile):
            self._file.fetch(_spans(self.metadata.row_group(row_group), columns))


def _spans(group: pq.RowGroupMetaData, columns: Sequence[str] | None) -> Iterator[tuple[int, int]]:
    """First byte and the one after the last of every chunk that reading the columns takes, lists' elements too."""
    for number in range(group.num_columns):
        chunk = group.column(number)
        if columns is None or any(f"{chunk.path_in_schema}.".startswith(f"{column}.") for column in columns):
            pages = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
            yield min(pages), min(pages) + chunk.total_compressed_size
