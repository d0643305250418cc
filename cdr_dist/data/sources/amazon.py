"""format=amazon: the review data of Amazon as it is downloaded, the releases of 2014 and of 2018.

    reviews    a record a line: reviewerID, asin, overall, unixReviewTime -> user_id, item_id, rating, timestamp
    metadata   a record a line: asin, categories (2014) or category (2018), title, brand
               -> item_id, category, title, brand, categories
    ratings    `ratings_NAME.csv` of 2014, without a header: user, item, rating, timestamp

A record is JSON or, as in the metadata of 2014, a Python literal, which is read and never run. Gzip is told by a file's
first bytes, reviews from metadata by the first record's keys. Everything a line must have is checked here.

The category is the second level of the first path, as in BIAO's released preprocessing, and `others` where there is
none; `categories` are the levels of all paths, each once, with `|` between them.

One core of an AMD EPYC reads, from .gz, about 100,000 reviews, 55,000 items in JSON and 26,000 items as literals a
second (generated lines of 940 and 1,280 characters; `ast.literal_eval` alone would read 8,000).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from cdr_dist.data.sources import table
from cdr_dist.data.sources.records import lines, record_of, shown
from cdr_dist.errors import UserError

KINDS: tuple[str, ...] = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
REVIEWS = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("rating", pa.float64()), ("timestamp", pa.int64())]
)
METADATA = pa.schema([(name, pa.string()) for name in ("item_id", "category", "title", "brand", "categories")])
OTHERS = "others"
BATCH_ROWS = 1 << 16

Values = tuple[Any, ...]
"""Of one line, in the order of its schema."""


def is_text(uri: str) -> bool:
    return True


def domain_name(uri: str) -> str:
    """`reviews_Books_5.json.gz` -> `Books`."""
    name = uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gz")
    return re.sub(r"^(reviews|ratings|meta)_|(_5)?\.(jsonl?|csv)$", "", name)


def files(uri: str) -> list[str]:
    """As `table.files`, of the endings `KINDS`."""
    return table.files(uri, KINDS)


def column_names(uri: str) -> list[str]:
    """The columns of one file. UserError: unreadable, empty, or neither reviews nor metadata."""
    return list(_schema(uri).names)


def batches(uri: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The named columns, in file order. UserError naming the file, and the line where one is to blame."""
    schema = _schema(uri)
    values_of = _rated if _is_ratings(uri) else _review if schema is REVIEWS else _item
    rows: list[Values] = []
    for number, line in lines(uri):
        try:
            rows.append(values_of(line))
        except UserError as error:
            raise UserError(f"{uri}: line {number}: {error}") from None
        if len(rows) == BATCH_ROWS:
            yield _batch(rows, schema).select(columns)
            rows = []
    if rows:
        yield _batch(rows, schema).select(columns)


def _batch(rows: list[Values], schema: pa.Schema) -> pa.RecordBatch:
    columns = zip(*rows, strict=True)
    return pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def require_columns(uri: str, needed: dict[str, str]) -> None:
    """Checks that a file has columns; `needed` maps option -> column. UserError lists what was found."""
    table.require(uri, needed, column_names(uri))


def first_rows(stream: Iterator[pa.RecordBatch], uri: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Each batch with the number of its first record in the file, from 1."""
    first = 1
    for batch in stream:
        yield first, batch
        first += batch.num_rows


def _is_ratings(uri: str) -> bool:
    return uri.endswith((".csv", ".csv.gz"))


def _schema(uri: str) -> pa.Schema:
    if _is_ratings(uri):
        if not uri.rsplit("/", 1)[-1].startswith("ratings_"):
            raise UserError(
                f"{uri}: is not named ratings_….csv, so its order may be user, item (2014) or item, user (2018); "
                "name the columns in a first line and use format=table"
            )
        return REVIEWS
    number, line = next(lines(uri), (0, ""))
    if not line:
        raise UserError(f"{uri}: is empty; its lines must be reviews or items")
    try:
        record = record_of(line)
    except UserError as error:
        raise UserError(f"{uri}: line {number}: {error}") from None
    if not record.keys().isdisjoint(("reviewerID", "overall", "unixReviewTime")):
        return REVIEWS
    if "asin" in record:
        return METADATA
    found = ", ".join(map(str, list(record)[:8])) or "nothing"
    raise UserError(f"{uri}: line {number}: neither a review (reviewerID) nor an item (asin); found: {found}")


def _rated(line: str) -> Values:
    fields = line.split(",")
    if len(fields) != 4:
        raise UserError(f"{len(fields)} fields; user,item,rating,timestamp are 4")
    user, item, rating, timestamp = fields
    return _id(user, "user"), _id(item, "item"), _rating(rating, "rating"), _timestamp(timestamp, "timestamp")


def _review(line: str) -> Values:
    record = record_of(line)
    try:
        return (
            _id(record["reviewerID"], "reviewerID"),
            _id(record["asin"], "asin"),
            _rating(record["overall"], "overall"),
            _timestamp(record["unixReviewTime"], "unixReviewTime"),
        )
    except KeyError as error:
        raise UserError(f"no {error}") from None


def _item(line: str) -> Values:
    record = record_of(line)
    if "asin" not in record:
        raise UserError("no 'asin'")
    paths = _paths(record)
    first = paths[0] if paths else []
    levels = dict.fromkeys(level.replace("|", "/") for path in paths for level in path if level)
    return (
        _id(record["asin"], "asin"),
        (first[1] if len(first) > 1 else None) or OTHERS,
        _text(record.get("title"), "title"),
        _text(record.get("brand"), "brand"),
        "|".join(levels) or None,
    )


def _paths(record: dict[str, Any]) -> list[list[str | None]]:
    """The category paths, the first level of each first: `categories` has several, `category` is one."""
    key = "categories" if record.get("categories") else "category"
    given = record.get(key) or []
    if not isinstance(given, list):
        raise UserError(f"{key} {shown(given)} is not a list")
    paths = given if given and isinstance(given[0], list) else [given]
    if not all(isinstance(path, list) for path in paths):
        raise UserError(f"{key} {shown(given)} is not a list of lists")
    return [[_text(level, key) for level in path] for path in paths]


def _id(value: Any, key: str) -> str:
    if type(value) is int:
        return str(value)
    if type(value) is not str:
        raise UserError(f"{key} {shown(value)} is not an id")
    if not value:
        raise UserError(f"{key} is empty")
    if not value.isascii() and _mended(value) != value:
        raise UserError(f"{key} {shown(value)} is not Unicode text")
    return value


def _rating(value: Any, key: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{key} {shown(value)} is not a number")
    return number


def _timestamp(value: Any, key: str) -> int:
    try:
        whole = int(value)
        if isinstance(value, bool) or not -(2**63) <= whole < 2**63 or (isinstance(value, float) and whole != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{key} {shown(value)} is not a whole number") from None
    return whole


def _text(value: Any, key: str) -> str | None:
    """None for what says nothing: null, NaN, an empty text."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key} {shown(value)} is not text")
    return value if value.isascii() else _mended(value)


def _mended(text: str) -> str:
    """Surrogates in pairs are characters; U+FFFD stands for a single one, which no file can hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
