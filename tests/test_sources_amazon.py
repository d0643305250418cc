"""Amazon's review data as it is downloaded: both releases, JSON and Python literals, gzip or not."""

from __future__ import annotations

import ast
import gzip
import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdr_dist.data.sources import amazon, records
from cdr_dist.errors import UserError

REVIEW = {"reviewerID": "A2", "asin": "0001", "overall": 5.0, "unixReviewTime": 1381363200, "reviewText": 'It\'s "ok"'}
ITEM = {
    "asin": "0001",
    "categories": [["Books", "Comics"], ["Books", "Art", "Ink|Pen"]],
    "title": "Émile's",
    "brand": "",
}
ITEM_2018 = {"asin": "0001", "category": ["Books", "Comics", "Ink|Pen"], "title": "Émile's", "brand": "B"}


def written(path: Path, lines: list[str], compress: bool = False) -> str:
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if compress else text)
    return str(path)


def rows(uri: str) -> list[dict[str, Any]]:
    return pa.Table.from_batches(amazon.batches(uri, amazon.column_names(uri))).to_pylist()


def message(uri: str) -> str:
    with pytest.raises(UserError) as error:
        rows(uri)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["r.json", "r.json.gz", "r.jsonl"])
@pytest.mark.parametrize("dump", [json.dumps, repr])
@pytest.mark.parametrize("compress", [False, True])
def test_reviews_are_read_in_every_form(tmp_path: Path, name: str, dump: Any, compress: bool) -> None:
    """The first bytes tell gzip, whatever the ending says."""
    later = REVIEW | {"reviewerID": "Ü", "overall": 1, "reviewTime": "10 10, 2013", "verified": True}
    uri = written(tmp_path / name, [dump(REVIEW), "", dump(later)], compress)
    assert rows(uri) == [
        {"user_id": "A2", "item_id": "0001", "rating": 5.0, "timestamp": 1381363200},
        {"user_id": "Ü", "item_id": "0001", "rating": 1.0, "timestamp": 1381363200},
    ]
    (batch,) = amazon.batches(uri, ["timestamp", "user_id"])
    assert [(f.name, f.type) for f in batch.schema] == [("timestamp", pa.int64()), ("user_id", pa.string())]


@pytest.mark.parametrize("dump", [json.dumps, repr])
def test_items_of_2014_have_the_second_level_of_the_first_path(tmp_path: Path, dump: Any) -> None:
    uri = written(tmp_path / "meta.json.gz", [dump(ITEM)], compress=True)
    assert rows(uri) == [
        {
            "item_id": "0001",
            "category": "Comics",
            "title": "Émile's",
            "brand": None,
            "categories": "Books|Comics|Art|Ink/Pen",
        }
    ]


def test_items_of_2018_have_the_second_level_of_their_path(tmp_path: Path) -> None:
    (row,) = rows(written(tmp_path / "meta.json", [json.dumps(ITEM_2018)]))
    assert (row["category"], row["categories"], row["brand"]) == ("Comics", "Books|Comics|Ink/Pen", "B")


@pytest.mark.parametrize(
    ("line", "categories"),
    [
        ("{'asin': 'a'}", None),
        ("{'asin': 'a', 'categories': []}", None),
        ("{'asin': 'a', 'categories': [[]]}", None),
        ("{'asin': 'a', 'categories': None, 'title': None}", None),
        ("{'asin': 'a', 'categories': [['Books']], 'brand': nan, 'price': -inf}", "Books"),
        ("{'asin': 'a', 'categories': [['Books'], ['Music', 'Rock']]}", "Books|Music|Rock"),
        ("{'asin': 'a', 'categories': [['Books', '']]}", "Books"),
        ('{"asin": "a", "category": ["Books", null]}', "Books"),
        ('{"asin": "a", "category": "", "brand": NaN, "title": ""}', None),
    ],
)
def test_an_item_without_a_second_level_is_among_the_others(tmp_path: Path, line: str, categories: str | None) -> None:
    expected = {"item_id": "a", "category": "others", "title": None, "brand": None, "categories": categories}
    assert rows(written(tmp_path / "meta.json", [line])) == [expected]


def test_ratings_of_2014_are_told_by_their_name(tmp_path: Path) -> None:
    lines = ["A1,0001,5.0,1381363200", "A2,0002,1,7"]
    expected = [("A1", "0001", 5.0, 1381363200), ("A2", "0002", 1.0, 7)]
    for name, compress in (("ratings_Books.csv", False), ("ratings_Books.csv.gz", True)):
        assert [tuple(row.values()) for row in rows(written(tmp_path / name, lines, compress))] == expected
    found = message(written(tmp_path / "Books.csv", lines))
    assert found.startswith(f"{tmp_path}/Books.csv: is not named ratings_….csv, so its order may be user, item (2014)")
    assert found.endswith("use format=table")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{'asin': __import__('os').system('touch PWNED')}",
         "neither JSON nor a Python literal (holds more than values)"),
        ("__import__('os').system('touch PWNED')", "neither JSON nor a Python literal (Expecting value, character 1)"),
        ('{"asin": "a', "neither JSON nor a Python literal (Unterminated string starting at, character 10)"),
        ("{'asin': 'a",
         "neither JSON nor a Python literal (unterminated string literal (detected at line 1), character 10)"),
        ("{'a': " + "[" * 5000, "neither JSON nor a Python literal (nested too deeply)"),
        ('{"a": ' + "[" * 200_000, "neither JSON nor a Python literal (nested too deeply)"),
        ("{'a': " + "-" * 100_000 + "1}", "neither JSON nor a Python literal (nested too deeply)"),
        ('{"a": ' + "1" * 5000 + "}",
         "neither JSON nor a Python literal (Exceeds the limit (4300 digits) for integer string conversion: "
         "value has 5000 digits)"),
        ("[1, 2]", "'[1, 2]' is not a record"),
        ("{'a': 'b\0'}", "neither JSON nor a Python literal (source code string cannot contain null bytes)"),
        (json.dumps(REVIEW | {"overall": None}), "overall None is not a number"),
        (json.dumps(REVIEW | {"overall": math.nan}), "overall nan is not a number"),
        (json.dumps(REVIEW | {"overall": "five"}), "overall 'five' is not a number"),
        (json.dumps(REVIEW | {"overall": True}), "overall True is not a number"),
        (json.dumps(REVIEW | {"unixReviewTime": "10 10, 2013"}), "unixReviewTime '10 10, 2013' is not a whole number"),
        (json.dumps(REVIEW | {"unixReviewTime": True}), "unixReviewTime True is not a whole number"),
        (json.dumps(REVIEW | {"unixReviewTime": 1.5}), "unixReviewTime 1.5 is not a whole number"),
        (json.dumps(REVIEW | {"unixReviewTime": math.inf}), "unixReviewTime inf is not a whole number"),
        (json.dumps(REVIEW | {"unixReviewTime": 2**63}), "unixReviewTime 9223372036854775808 is not a whole number"),
        (json.dumps(REVIEW | {"asin": ""}), "asin is empty"),
        (json.dumps(REVIEW | {"asin": None}), "asin None is not an id"),
        (json.dumps(REVIEW | {"asin": "\ud800"}), "asin '\\ud800' is not Unicode text"),
        *((json.dumps({k: v for k, v in REVIEW.items() if k != key}), f"no '{key}'")
          for key in ("reviewerID", "asin", "overall", "unixReviewTime")),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    good = json.dumps(REVIEW)
    assert (
        message(written(Path("r.json.gz"), [good, " ", good, line, good], compress=True))
        == f"r.json.gz: line 4: {what}"
    )
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{'title': 'x'}", "no 'asin'"),
        ("{'asin': ['x']}", "asin ['x'] is not an id"),
        ("{'asin': 'a', 'title': ['x']}", "title ['x'] is not text"),
        ("{'asin': 'a', 'categories': 'Books'}", "categories 'Books' is not a list"),
        ("{'asin': 'a', 'categories': [['Books'], 'x']}", "categories [['Books'], 'x'] is not a list of lists"),
    ],
)
def test_a_bad_item_is_named(tmp_path: Path, line: str, what: str) -> None:
    uri = written(tmp_path / "meta.json", [repr(ITEM), line])
    assert message(uri) == f"{uri}: line 2: {what}"


def test_a_first_line_of_neither_kind_is_named(tmp_path: Path) -> None:
    uri = written(tmp_path / "r.json", ["", '{"parent_asin": 1, "user": 2}'])
    expected = "line 2: neither a review (reviewerID) nor an item (asin); found: parent_asin, user"
    assert message(uri) == f"{uri}: {expected}"
    uri = written(tmp_path / "e.json.gz", [" "], compress=True)
    assert message(uri) == f"{uri}: is empty; its lines must be reviews or items"


def test_bad_ratings_and_bytes_are_named(tmp_path: Path) -> None:
    uri = written(tmp_path / "ratings_x.csv", ["user,item,rating,timestamp"])
    assert message(uri) == f"{uri}: line 1: rating 'rating' is not a number"
    uri = written(tmp_path / "ratings_y.csv", ["a,b,1,2", "a,b,1"])
    assert message(uri) == f"{uri}: line 2: 3 fields; user,item,rating,timestamp are 4"
    (tmp_path / "r.json").write_bytes(json.dumps(REVIEW).encode() + b"\n\xff\n")
    assert message(str(tmp_path / "r.json")) == f"{tmp_path}/r.json: line 2: is not UTF-8 text (byte 1)"


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    uri = written(tmp_path / "r.json.gz", [json.dumps(REVIEW | {"n": n * 7919}) for n in range(500)], compress=True)
    Path(uri).write_bytes(Path(uri).read_bytes()[:-200])
    assert message(uri) == f"{uri}: cannot be read (Truncated compressed stream)"


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(records, "BLOCK_BYTES", 1 << 10)
    uri = written(tmp_path / "r.json", [json.dumps(REVIEW), "x" * (3 << 20)])
    assert message(uri) == f"{uri}: line 2: is longer than 1 MiB"


@pytest.mark.parametrize("block", [1, 7, 100, 1 << 20])
def test_batches_are_bounded_wherever_blocks_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(records, "BLOCK_BYTES", block)
    monkeypatch.setattr(amazon, "BATCH_ROWS", 4)
    uri = written(tmp_path / "r.json.gz", [json.dumps(REVIEW | {"asin": f"é{n}"}) for n in range(10)], compress=True)
    found = list(amazon.first_rows(amazon.batches(uri, ["item_id"]), uri))
    assert [(first, batch.num_rows) for first, batch in found] == [(1, 4), (5, 4), (9, 2)]
    assert [item for _, batch in found for item in batch["item_id"].to_pylist()] == [f"é{n}" for n in range(10)]


def test_members_of_a_gzip_file_follow_each_other(tmp_path: Path) -> None:
    line = (json.dumps(REVIEW) + "\n").encode()
    (tmp_path / "r.json.gz").write_bytes(gzip.compress(line) + gzip.compress(line))
    assert len(rows(str(tmp_path / "r.json.gz"))) == 2


texts = st.text() | st.text(alphabet="'\"\\/nux0{}[],: é\t")
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(texts, values, min_size=1), st.sampled_from([repr, json.dumps, str.format]))
def test_whatever_repr_and_json_write_is_read_as_it_was(record: dict[str, Any], dump: Any) -> None:
    line = json.dumps(record, ensure_ascii=False) if dump is str.format else dump(record)
    assert records.record_of(line) == record


@given(st.text(alphabet="'\"\\/nuUx0N{}[],:# b1\t"))
def test_a_literal_is_read_as_python_reads_it_or_not_at_all(inner: str) -> None:
    """The way through JSON accepts no more and means the same."""
    line = "{'a': " + inner + "}"
    try:
        expected = ast.literal_eval(line)
    except (ValueError, SyntaxError):
        with pytest.raises((ValueError, SyntaxError)):
            records._parsed(line)
    else:
        assert records._parsed(line) == expected


@pytest.mark.parametrize(
    "value",
    [r"'a\/b'", r"'a\"b\'c'", r"'\x41\u00e9\U0001f600\t\\x41'", "u'é'", "b'x'", "'a' 'b'", "'''a'''", "(1, 2)", "0x1F"],
)
def test_every_way_of_writing_a_literal_is_read(value: str) -> None:
    assert records.record_of("{'a': " + value + ", 'b': 1}") == {"a": ast.literal_eval(value), "b": 1}


def test_a_mark_of_byte_order_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    assert len(rows(written(tmp_path / "r.json", ["\ufeff" + repr(REVIEW)]))) == 1


@given(texts.filter(bool), texts, st.sampled_from([repr, json.dumps]))
def test_strange_texts_arrive_as_they_were(item: str, title: str, dump: Any) -> None:
    assert amazon._item(dump({"asin": item, "title": title}))[:3] == (item, "others", title or None)


def test_halves_of_characters_are_joined(tmp_path: Path) -> None:
    uri = written(tmp_path / "m.json", [r"{'asin': 'a', 'title': '\ud83d\ude00', 'brand': '\ud83d'}"])
    assert [(row["title"], row["brand"]) for row in rows(uri)] == [("😀", "\ufffd")]


def test_a_log_of_many_files_and_its_name(tmp_path: Path) -> None:
    for name in ("b.json", "a.json.gz", "notes.txt"):
        written(tmp_path / name, [json.dumps(REVIEW)])
    assert [Path(uri).name for uri in amazon.files(str(tmp_path))] == ["a.json.gz", "b.json"]
    with pytest.raises(
        UserError, match=r"notes\.txt: unknown kind of file; known endings: \.json, \.json\.gz, \.jsonl"
    ):
        amazon.files(str(tmp_path / "notes.txt"))
    names = ["d/reviews_Movies_and_TV_5.json.gz", "ratings_Books.csv", "meta_Books.json.gz", "Books_5.json", "x.jsonl/"]
    assert [amazon.domain_name(name) for name in names] == ["Movies_and_TV", "Books", "Books", "Books", "x"]


def test_columns_are_required_by_option(tmp_path: Path) -> None:
    uri = written(tmp_path / "r.json", [json.dumps(REVIEW)])
    amazon.require_columns(uri, {"columns.user": "user_id"})
    with pytest.raises(UserError) as error:
        amazon.require_columns(uri, {"columns.category": "category"})
    expected = "no column 'category' (columns.category=); found: user_id, item_id, rating, timestamp"
    assert str(error.value) == f"{uri}: {expected}"


def test_batches_are_what_polars_takes(tmp_path: Path) -> None:
    (batch,) = amazon.batches(written(tmp_path / "m.json", [repr(ITEM)]), ["item_id", "brand"])
    frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches([batch])))
    assert frame.schema == {"item_id": pl.String, "brand": pl.String}
