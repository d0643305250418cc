"""Formats without a header in which a line is a user: all their behaviours in order, of several domains.

A user is named by file and line, as `training.tsv.gz:17`; a behaviour's time is its place in the line. Everything a
line must have is checked here. Gzip is told by a file's first bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from cdr_dist.data.sources import table
from cdr_dist.data.sources.records import lines
from cdr_dist.errors import UserError

COLUMNS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("domain", pa.string())]
)
BATCH_ROWS = 1 << 16

Behaviours = tuple[list[str], list[str]]
"""Items and domains of a line, in order."""


@dataclass(frozen=True)
class UserLines:
    """behaviours_of: what a line says; UserError, without the place, where it is malformed."""

    kinds: tuple[str, ...]  # endings of its files' names
    layout: str  # of a line, for messages
    behaviours_of: Callable[[str], Behaviours]

    def is_text(self, uri: str) -> bool:
        return True

    def domain_name(self, uri: str) -> str:
        """`logs/ml.csv.gz` -> `ml`."""
        name = uri.rstrip("/").rsplit("/", 1)[-1]
        return name.removesuffix(next((kind for kind in sorted(self.kinds, key=len)[::-1] if name.endswith(kind)), ""))

    def files(self, uri: str) -> list[str]:
        """As `table.files`, of the endings `kinds`."""
        return table.files(uri, self.kinds)

    def column_names(self, uri: str) -> list[str]:
        """`COLUMNS`. UserError: unreadable, empty, or a first line of another layout."""
        for number, line in lines(uri):
            self._read(uri, number, line)
            return list(COLUMNS.names)
        raise UserError(f"{uri}: is empty; a line reads {self.layout}")

    def require_columns(self, uri: str, needed: dict[str, str]) -> None:
        """Checks that a file has columns; `needed` maps option -> column. UserError lists what there is."""
        table.require(uri, needed, self.column_names(uri))

    def batches(self, uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The named columns, in file order. UserError naming the file and the line."""
        name = uri.rsplit("/", 1)[-1]
        found: list[list[str] | list[int]] = [[], [], [], []]
        for number, line in lines(uri):
            items, domains = self._read(uri, number, line)
            for column, values in zip(
                found, ([f"{name}:{number}"] * len(items), items, range(len(items)), domains), strict=True
            ):
                column.extend(values)  # type: ignore[arg-type]
            if len(found[0]) >= BATCH_ROWS:
                yield _batch(found).select(columns)
                found = [[], [], [], []]
        if found[0]:
            yield _batch(found).select(columns)

    def first_rows(self, stream: Iterator[pa.RecordBatch], uri: str) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each batch with the number of its first behaviour in the file, from 1: no message names one."""
        return table.numbered(stream, 1)

    def _read(self, uri: str, number: int, line: str) -> Behaviours:
        try:
            return self.behaviours_of(line)
        except UserError as error:
            raise UserError(f"{uri}: line {number}: {error}; a line reads {self.layout}") from None


def _batch(columns: list[list[str] | list[int]]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, COLUMNS, strict=True)], schema=COLUMNS)
