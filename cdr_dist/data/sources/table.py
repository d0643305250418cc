"""format=table: csv, tsv (each plain or .gz) and Parquet, read as a stream from any place fsspec knows.

A tsv is taken as it stands, without quoting; a csv may quote fields with `"`. The first line names the columns.
Text columns arrive as text, so an id such as 0012 keeps its zeros; Parquet columns arrive in their own types.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as csv

from cdr_dist.data import storage
from cdr_dist.data.parquet_input import ParquetInput
from cdr_dist.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
KINDS: tuple[str, ...] = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
BLOCK_BYTES = 1 << 24
BATCH_ROWS = 1 << 18
HEADER_BYTES = 1 << 16


def is_text(uri: str) -> bool:
    return not uri.endswith(".parquet")


def domain_name(uri: str) -> str:
    """`logs/beauty.inter.tsv.gz` -> `beauty`: the file's name without the endings of its format."""
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    for ending in (".gz", ".csv", ".tsv", ".parquet", ".inter"):
        name = name.removesuffix(ending)
    return name


def files(uri: str, kinds: tuple[str, ...] = KINDS) -> list[str]:
    """The files of a log in order: one file, all in a folder, or all that match a pattern with `*`.

    UserError: nothing there, or a file whose ending is none of `kinds`.
    """
    if storage.is_folder(uri):
        uris = [file for file in storage.files(uri) if file.endswith(kinds)]
    elif "*" in uri:
        uris = storage.matching(uri)
    else:
        uris = [uri] if storage.exists(uri) else []
    if not uris:
        raise UserError(f"{uri}: not found")
    for one in uris:
        if not one.endswith(kinds):
            raise UserError(f"{one}: unknown kind of file; known endings: {', '.join(kinds)}")
    return uris


def column_names(uri: str) -> list[str]:
    """The columns of one file. UserError where it cannot be read or has no header."""
    if is_text(uri):
        return text_header(uri, _dialect(uri))
    with storage.naming(uri), storage.open_input(uri) as file:
        return list(ParquetInput(file).schema_arrow.names)


def text_header(uri: str, dialect: csv.ParseOptions) -> list[str]:
    """The fields of a text file's first line."""
    with storage.naming(uri), storage.open_input(uri) as file:
        head = decompressed(file, uri.endswith(".gz")).read(HEADER_BYTES)
        if not head:
            raise UserError(f"{uri}: is empty; its first line must name the columns")
        line = io.BytesIO(head.split(b"\n", 1)[0] + b"\n")
        return csv.read_csv(line, parse_options=dialect).column_names


def batches(uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The named columns, in file order. UserError naming the file where it is damaged, or stalls."""
    if is_text(uri):
        yield from text_batches(uri, columns, _dialect(uri))
        return
    with storage.naming(uri), storage.open_input(uri) as file:
        yield from ParquetInput(file).iter_batches(BATCH_ROWS, columns)


def text_batches(uri: str, columns: list[str], dialect: csv.ParseOptions) -> Iterator[pa.RecordBatch]:
    """The named columns of a text file, as text."""
    with storage.naming(uri), opened_text(uri) as file:
        yield from csv.open_csv(
            decompressed(file, uri.endswith(".gz")),
            read_options=csv.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),  # so that errors tell the row
            parse_options=dialect,
            convert_options=csv.ConvertOptions(
                include_columns=columns, column_types=dict.fromkeys(columns, pa.string())
            ),
        )


def opened_text(uri: str) -> io.BufferedReader:
    """Text is read from start to end, so in large requests."""
    return io.BufferedReader(storage.open_input(uri), BLOCK_BYTES)


def decompressed(file: Any, gzip: bool) -> Any:
    return pa.CompressedInputStream(file, "gzip") if gzip else file


def _dialect(uri: str) -> csv.ParseOptions:
    ending = next(e for e in SEPARATORS if uri.removesuffix(".gz").endswith(e))
    return csv.ParseOptions(delimiter=SEPARATORS[ending], quote_char='"' if ending == ".csv" else False)


def require_columns(uri: str, needed: dict[str, str]) -> None:
    """Checks that a file has columns; `needed` maps option -> column. UserError lists what was found."""
    require(uri, needed, column_names(uri))


def require(uri: str, needed: dict[str, str], found: list[str]) -> None:
    """As `require_columns`, of the columns that were found."""
    for option, column in needed.items():
        if column not in found:
            raise UserError(f"{uri}: no column '{column}' ({option}=); found: {', '.join(found)}")


def first_rows(stream: Iterator[pa.RecordBatch], uri: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each batch with the number of its first row: the line in a text file, the row in a Parquet file, from 1."""
    return numbered(stream, 2 if is_text(uri) else 1)


def numbered(stream: Iterator[pa.RecordBatch], first: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each batch with the number of its first row, counted from `first`."""
    for batch in stream:
        yield first, batch
        first += batch.num_rows
