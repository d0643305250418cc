"""The formats of raw logs by name. A new one is a module or an object with the functions of `Source`, named here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa

from cdr_dist.data.sources import amazon, coldrec, recbole, table, windows
from cdr_dist.errors import UserError, nearest


class Source(Protocol):
    """How the files of a format are found and read. Whatever is wrong with one is a UserError that names it."""

    def is_text(self, uri: str) -> bool:
        """Whether its rows are lines."""

    def domain_name(self, uri: str) -> str:
        """The name of a domain whose log stands there."""

    def files(self, uri: str) -> list[str]:
        """The files of a log in order: one file, all in a folder, or all that match a pattern with `*`."""

    def column_names(self, uri: str) -> list[str]:
        """Of one file."""

    def require_columns(self, uri: str, needed: dict[str, str]) -> None:
        """Checks that a file has columns; `needed` maps option -> column."""

    def batches(self, uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The named columns of one file, in file order, of bounded size."""

    def first_rows(self, stream: Iterator[pa.RecordBatch], uri: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each batch with the number of its first row, as messages name it."""


SOURCES: dict[str, Source] = {
    "table": table,
    "amazon": amazon,
    "recbole": recbole,
    "coldrec": coldrec.SOURCE,
    "windows": windows.SOURCE,
}


def of(format: str) -> Source:
    """UserError: an unknown format."""
    if format not in SOURCES:
        raise UserError(f"format={format}: {nearest(format, list(SOURCES))}")
    return SOURCES[format]
