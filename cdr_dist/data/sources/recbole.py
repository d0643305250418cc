"""format=recbole: the atomic files of RecBole, `.inter` and `.item`, each plain or .gz.

Tabs between fields, no quoting. The first line names every column with its type: `user_id:token`, `timestamp:float`,
`categories:token_seq` (items of a sequence with a space between them). A column's name here is the one without type.
All columns arrive as text, sequences as they stand; a float such as 1318896000.0 may be a timestamp.
Source: https://recbole.io/docs/user_guide/data/atomic_files.html
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.csv as csv

from cdr_dist.data.sources import table
from cdr_dist.data.sources.table import first_rows
from cdr_dist.errors import UserError, nearest

__all__ = ["KINDS", "batches", "column_names", "domain_name", "files", "first_rows", "is_text", "require_columns"]

KINDS: tuple[str, ...] = (".inter", ".inter.gz", ".item", ".item.gz")
TYPES = ("token", "token_seq", "float", "float_seq")
DIALECT = csv.ParseOptions(delimiter="\t", quote_char=False)


def is_text(uri: str) -> bool:
    return True


def domain_name(uri: str) -> str:
    """`ml-1m/ml-1m.inter.gz` -> `ml-1m`."""
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gz").removesuffix(".inter").removesuffix(".item")


def files(uri: str) -> list[str]:
    """As `table.files`; in a folder, which holds a domain's items as well, the `.inter` files."""
    found = table.files(uri, KINDS)
    logs = [file for file in found if file.removesuffix(".gz").endswith(".inter")]
    return logs or found


def column_names(uri: str) -> list[str]:
    """The columns of one file, without types. UserError: unreadable, or a header that is not RecBole's."""
    return list(_header(uri))


def batches(uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The named columns as text, in file order. UserError naming the file where it is damaged, or stalls."""
    typed = _header(uri)
    for batch in table.text_batches(uri, [typed[name] for name in columns], DIALECT):
        yield batch.rename_columns(columns)


def require_columns(uri: str, needed: dict[str, str]) -> None:
    """Checks that a file has columns; `needed` maps option -> column. UserError lists what was found."""
    table.require(uri, needed, column_names(uri))


def _header(uri: str) -> dict[str, str]:
    """Name -> as the header has it, with its type."""
    found: dict[str, str] = {}
    for field in table.text_header(uri, DIALECT):
        name, colon, kind = field.strip().rpartition(":")
        if not colon or not name:
            raise UserError(
                f"{uri}: column '{field}' has no type; RecBole's header reads user_id:token, rating:float, …"
            )
        if kind not in TYPES:
            raise UserError(f"{uri}: column '{name}' has the unknown type '{kind}'; {nearest(kind, list(TYPES))}")
        if name in found:
            raise UserError(f"{uri}: two columns are named '{name}'")
        found[name] = field
    return found
