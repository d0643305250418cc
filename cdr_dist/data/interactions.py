"""Interactions: one row for one behaviour, checked and typed, from the batches of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa

from cdr_dist.data import forgotten
from cdr_dist.data.feature_names import USER
from cdr_dist.data.prepare_options import Columns, PrepareOptions
from cdr_dist.data.sources import formats
from cdr_dist.data.sources.formats import Source
from cdr_dist.errors import UserError

SCHEMA = {
    "user_id": pl.String,
    "item_id": pl.String,  # null: an unknown item
    "timestamp": pl.Int64,  # seconds, or any whole number that orders
    "label": pl.Float32,
    "category": pl.String,  # null where the log names none
}


def needed_columns(options: PrepareOptions, role: str, found: list[str], has_item_file: bool) -> dict[str, str]:
    """`option -> column` of a domain's log. The default category column is left out where the log does not have it."""
    columns = options.columns_of(role)
    names = ["user", "item", "timestamp"] + (["rating"] if options.labels == "rating" else [])
    optional = columns["category"][1] == Columns().category and columns["category"][1] not in found
    if not has_item_file and not optional:
        names.append("category")
    domain = {columns["domain"][0]: options.domain_column(role)} if options.domain_column(role) else {}
    return dict(columns[name] for name in names) | domain


def read(
    uri: str, options: PrepareOptions, role: str, has_item_file: bool, prefix: str = "", domain: str = ""
) -> Iterator[pl.DataFrame]:
    """The interactions (`SCHEMA`) of a file of a domain's log, in file order; duplicates are kept, each is a behaviour.

    prefix: of items and categories, where several domains share a role. domain: whose rows are read, where the log has
    a column for it; the others are passed over, whatever is in them.
    UserError: unreadable file, missing column, an empty id, a rating or timestamp that is not a number.
    """
    source = formats.of(options.format)
    needed = needed_columns(options, role, source.column_names(uri), has_item_file)
    source.require_columns(uri, needed)
    left_out, classes = forgotten.of(options), options.classes if role == "target" else 0
    for first, batch in source.first_rows(source.batches(uri, sorted(set(needed.values()))), uri):
        raw, place = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch]))), _Place(source, uri, first)
        if domain:
            own = (raw[options.domain_column(role)].cast(pl.String) == domain).fill_null(False)
            raw, place = raw.filter(own), _Place(source, uri, first, own.arg_true())
        rows = _within(_typed(raw, needed, options, place, classes), options)
        rows = left_out.left_out_of(rows, "user_id")
        yield rows.with_columns(_prefixed(prefix, rows[name]) for name in ("item_id", "category")) if prefix else rows


def _within(rows: pl.DataFrame, options: PrepareOptions) -> pl.DataFrame:
    """Those from `since` on and before `until`."""
    if options.since is not None:
        rows = rows.filter(pl.col("timestamp") >= options.since)
    if options.until is not None:
        rows = rows.filter(pl.col("timestamp") < options.until)
    return rows


class _Place:
    """Says where in a file the row at an index of the current batch stands."""

    def __init__(self, source: Source, uri: str, first: int, chosen: pl.Series | None = None) -> None:
        """chosen: the rows of the batch that are looked at; all of them if None."""
        self.uri, self.first, self._chosen = uri, first, chosen
        self._unit = "line" if source.is_text(uri) else "row"

    def error(self, bad: pl.Series, message: str, values: pl.Series | None = None) -> UserError:
        index = int(bad.arg_max() or 0)
        shown = "" if values is None or values[index] in (None, "") else f" '{values[index]}'"
        row = self.first + (index if self._chosen is None else int(self._chosen[index]))
        return UserError(f"{self.uri}: {self._unit} {row}: " + message.format(shown or " (empty)"))


def _typed(
    raw: pl.DataFrame, needed: dict[str, str], options: PrepareOptions, place: _Place, classes: int
) -> pl.DataFrame:
    columns = {option.rpartition(".")[2]: raw[name] for option, name in needed.items()}
    ratings = _ratings(columns["rating"], place) if "rating" in columns else None
    labels = pl.repeat(1.0, raw.height, eager=True) if ratings is None else (ratings > options.threshold)
    categories = columns.get("category", pl.repeat(None, raw.height, dtype=pl.String, eager=True))
    items = _null_where(_ids(columns["item"], "item", place), options.unknown)
    if classes:
        _check_classes(items, classes, place)
    return pl.DataFrame(
        {
            "user_id": _ids(columns["user"], "user", place),
            "item_id": items,
            "timestamp": _timestamps(columns["timestamp"], place),
            "label": labels.cast(pl.Float32),
            "category": _null_where(categories.cast(pl.String), ""),
        },
        schema=SCHEMA,
    )


def _null_where(text: pl.Series, nothing: str) -> pl.Series:
    return pl.select(pl.when(text != nothing).then(text)).to_series()


def _check_classes(items: pl.Series, classes: int, place: _Place) -> None:
    bad = ~items.is_in([str(number) for number in range(classes)])
    if bad.any():
        message = "item{} is no class: classes=" + f"{classes} wants whole numbers 0 to {classes - 1}"
        raise place.error(bad, message, items)


def _ids(values: pl.Series, what: str, place: _Place) -> pl.Series:
    if values.dtype.is_float():
        raise UserError(f"{place.uri}: column '{values.name}' holds fractions; a {what}'s id is text or a whole number")
    ids = values.cast(pl.String)
    empty = ids.is_null() | (ids == "").fill_null(True)
    if empty.any():
        raise place.error(empty, f"the {what} is empty")
    return ids


def _timestamps(values: pl.Series, place: _Place) -> pl.Series:
    if values.dtype.is_temporal():
        values = values.cast(pl.Datetime("us")).dt.epoch("s")
    whole = values.cast(pl.Int64, strict=False)
    if values.dtype.is_float():
        whole = _whole_floats(values)
    elif whole.has_nulls():  # 1318896000.0 is a whole number as well
        whole = pl.select(pl.coalesce(whole, _whole_floats(values))).to_series()
    if whole.has_nulls():
        raise place.error(whole.is_null(), "timestamp{} is not a whole number", values)
    return whole


def _whole_floats(values: pl.Series) -> pl.Series:
    """Int64, null where the value is no number, has a fraction or is too large to be exact."""
    numbers = values.cast(pl.Float64, strict=False)
    exact = (numbers.floor() == numbers) & (numbers.abs() < 2**53)
    return pl.select(pl.when(exact).then(numbers)).to_series().cast(pl.Int64)


def _ratings(values: pl.Series, place: _Place) -> pl.Series:
    numbers = values.cast(pl.Float64, strict=False)
    bad = ~numbers.is_finite().fill_null(False)
    if bad.any():
        raise place.error(bad, "rating{} is not a number", values)
    return numbers


def check_domain(files: list[str], options: PrepareOptions, role: str, domain: str) -> None:
    """UserError where no row of the files is of the domain: it lists the domains found most often."""
    column, source = options.domain_column(role), formats.of(options.format)
    found: Counter[str] = Counter()
    for uri in files:
        for batch in source.batches(uri, [column]):
            found.update(batch.column(0).cast(pa.string()).to_pylist())
    if domain not in found:
        most = ", ".join(f"{name} ({rows:,} rows)" for name, rows in found.most_common(8))
        raise UserError(
            f"{getattr(options, role)}: no row's {column} is '{domain}' ({role}_domain=); found most often: {most}"
        )


def user_bucket(user_ids: pl.Series, buckets: int) -> np.ndarray:
    """The partition of each user, 0..buckets-1: equal for equal ids, on every worker of one run."""
    return (user_ids.hash(seed=0) % buckets).to_numpy().astype(np.int64)


def check_item_file(uri: str, options: PrepareOptions, role: str) -> None:
    """UserError: missing, unreadable, not one file, or without the columns."""
    source = formats.of(options.format)
    if source.files(uri) != [uri]:
        raise UserError(f"{uri}: the items of a domain stand in one file")
    source.require_columns(uri, _item_columns(options, role))


def _item_columns(options: PrepareOptions, role: str) -> dict[str, str]:
    """`option -> column` of a domain's item file."""
    columns = options.columns_of(role, "item_columns")
    features = {f"{columns['features'][0]}, {name}": name for name in options.features_of(role)}
    return dict([columns["item"], columns["category"]]) | features


def read_items(uri: str, options: PrepareOptions, role: str, prefix: str = "") -> pl.DataFrame:
    """`item_id, category` of an item file, and a list of texts for each declared column; of an item listed twice, the
    first line counts.

    UserError: unreadable file, an empty item id.
    """
    (item, category), features = list(_item_columns(options, role).values())[:2], options.features_of(role)
    named = {"item_id": item, "category": category}
    found = _described(uri, options, named, features)
    return found.with_columns(_prefixed(prefix, found[name]) for name in named) if prefix else found


def check_user_file(options: PrepareOptions) -> None:
    """UserError: missing, unreadable, not one file, or without the columns."""
    source, uri = formats.of(options.format), options.user_file
    if source.files(uri) != [uri]:
        raise UserError(f"{uri}: the users stand in one file")
    features = {f"user_columns.features, {name}": name for name in options.features_of(USER)}
    source.require_columns(uri, {"user_columns.user": options.user_columns.user} | features)


def read_users(options: PrepareOptions) -> pl.DataFrame:
    """`user_id` and a list of texts for each declared column; of a user listed twice, the first line counts."""
    return _described(
        options.user_file, options, {"user_id": options.user_columns.user}, options.features_of(USER), "user"
    )


def _described(
    uri: str, options: PrepareOptions, named: dict[str, str], features: dict[str, str], what: str = "item"
) -> pl.DataFrame:
    """named: our name -> column; the first is the id's. UserError: unreadable file, an empty id."""
    key, *others = named
    schema: dict[str, pl.DataType | type[pl.DataType]] = dict.fromkeys(named, pl.String())
    parts = [pl.DataFrame(schema=schema | dict.fromkeys(features, pl.List(pl.String)))]
    source = formats.of(options.format)
    for first, batch in source.first_rows(source.batches(uri, sorted({*named.values(), *features})), uri):
        raw = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))
        ids = {key: _ids(raw[named[key]], what, _Place(source, uri, first))}
        texts = {name: _null_where(raw[named[name]].cast(pl.String), "") for name in others}
        values = {name: _values(raw[name], how, options.feature_values) for name, how in features.items()}
        parts.append(pl.DataFrame(ids | texts | values))
    return pl.concat(parts).unique(key, keep="first", maintain_order=True)


def _prefixed(prefix: str, texts: pl.Series) -> pl.Series:
    """Null stays null."""
    return pl.select((pl.lit(prefix) + pl.lit(texts)).alias(texts.name)).to_series()


def _values(texts: pl.Series, how: str, most: int) -> pl.Series:
    """The distinct values in every text, `most` at most, in their order: its words, its parts, or the text itself."""
    text = pl.lit(texts.cast(pl.String).fill_null(""))
    if how == "words":
        parts = text.str.to_lowercase().str.extract_all(r"\w+")
    else:
        parts = text.str.split(how) if how else text.reshape((-1, 1)).arr.to_list()
        parts = parts.list.eval(pl.element().str.strip_chars())
    kept = parts.list.eval(pl.element().filter(pl.element() != "")).list.unique(maintain_order=True)
    return pl.select(kept.list.head(most)).to_series()
