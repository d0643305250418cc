"""RecBole's atomic files: columns with types in the header, text as it stands."""

from __future__ import annotations

import gzip
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from cdr_dist.data import interactions
from cdr_dist.data.sources import formats, recbole, table
from cdr_dist.errors import UserError

INTER = 'user_id:token\titem_id:token\trating:float\ttimestamp:float\n0012\té"1\t5\t1318896000.0\nu\t2\t1.0\t7\n'
ITEM = 'item_id:token\tcategories:token_seq\t title:token_seq\r\n2\tComedy Drama\'s\tA "long" title\r\n3\t\tx\r\n'


def written(path: Path, text: str) -> str:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


@pytest.mark.parametrize("name", ["a.inter", "a.inter.gz"])
def test_interactions_are_read_as_text(tmp_path: Path, name: str) -> None:
    uri = written(tmp_path / name, INTER)
    assert recbole.column_names(uri) == ["user_id", "item_id", "rating", "timestamp"]
    assert recbole.domain_name(uri) == "a"
    ((first, batch),) = recbole.first_rows(recbole.batches(uri, ["timestamp", "user_id", "item_id"]), uri)
    assert first == 2
    expected = {"timestamp": ["1318896000.0", "7"], "user_id": ["0012", "u"], "item_id": ['é"1', "2"]}
    assert batch.to_pydict() == expected


@pytest.mark.parametrize("name", ["a.item", "a.item.gz"])
def test_sequences_of_tokens_stay_as_they_are(tmp_path: Path, name: str) -> None:
    uri = written(tmp_path / name, ITEM)
    columns = ["item_id", "categories", "title"]
    assert recbole.column_names(uri) == columns
    found = pa.Table.from_batches(recbole.batches(uri, columns)).to_pylist()
    assert [list(row.values()) for row in found] == [["2", "Comedy Drama's", 'A "long" title'], ["3", "", "x"]]


def test_whole_floats_become_whole_timestamps(tmp_path: Path) -> None:
    uri = written(tmp_path / "a.inter", INTER)
    (batch,) = recbole.batches(uri, ["timestamp"])
    values = pl.Series("timestamp", batch["timestamp"].to_pylist())
    assert interactions._timestamps(values, interactions._Place(recbole, uri, 2)).to_list() == [1318896000, 7]


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (
            "user_id\titem_id:token",
            "column 'user_id' has no type; RecBole's header reads user_id:token, rating:float, …",
        ),
        (":token", "column ':token' has no type; RecBole's header reads user_id:token, rating:float, …"),
        ("user_id:tokens", "column 'user_id' has the unknown type 'tokens'; did you mean 'token'?"),
        ("user_id:int", "column 'user_id' has the unknown type 'int'; known: float, float_seq, token, token_seq"),
        ("a:token\ta:float", "two columns are named 'a'"),
    ],
)
def test_a_header_that_is_not_recboles_is_refused(tmp_path: Path, header: str, what: str) -> None:
    uri = written(tmp_path / "a.inter", header + "\n")
    for call in (lambda: recbole.column_names(uri), lambda: list(recbole.batches(uri, ["user_id"]))):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == f"{uri}: {what}"


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.inter", INTER + "u\t1\n", "cannot be read (CSV parse error: Row #4: Expected 4 columns, got 2: u\t1)"),
        ("a.inter", "", "is empty; its first line must name the columns"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, text: str, what: str) -> None:
    uri = written(tmp_path / name, text)
    with pytest.raises(UserError) as error:
        list(recbole.batches(uri, ["user_id"]))
    assert str(error.value) == f"{uri}: {what}"


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    uri = written(tmp_path / "a.inter.gz", INTER + "".join(f"u\t{n * 7919}\t1\t{n}\n" for n in range(99)))
    Path(uri).write_bytes(Path(uri).read_bytes()[:-30])
    with pytest.raises(UserError, match=r"a\.inter\.gz: cannot be read \(Truncated compressed stream\)"):
        list(recbole.batches(uri, ["user_id"]))


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "BLOCK_BYTES", 100)
    uri = written(tmp_path / "a.inter", INTER + "".join(f"u\t{n}\t1\t{n}\n" for n in range(200)))
    found = list(recbole.batches(uri, ["item_id"]))
    assert max(batch.num_rows for batch in found) < 30
    assert [item for batch in found for item in batch["item_id"].to_pylist()][2:] == [str(n) for n in range(200)]


def test_a_folder_is_its_interactions(tmp_path: Path) -> None:
    for name, text in (("a.inter", INTER), ("a.item", ITEM), ("a.user", "")):
        written(tmp_path / name, text)
    assert recbole.files(str(tmp_path)) == [f"{tmp_path}/a.inter"]
    assert recbole.files(f"{tmp_path}/a.item") == [f"{tmp_path}/a.item"]
    with pytest.raises(UserError, match=r"a\.user: unknown kind of file; known endings: \.inter, \.inter\.gz, \.item"):
        recbole.files(f"{tmp_path}/a.user")


def test_columns_are_required_by_option(tmp_path: Path) -> None:
    uri = written(tmp_path / "a.inter", INTER)
    recbole.require_columns(uri, {"columns.user": "user_id"})
    with pytest.raises(
        UserError, match=r"a\.inter: no column 'uid' \(columns\.user=\); found: user_id, item_id, rating"
    ):
        recbole.require_columns(uri, {"columns.user": "uid"})


def test_formats_are_found_by_name() -> None:
    assert [formats.of(name) for name in ("table", "recbole")] == [table, recbole]
    for name in formats.SOURCES:
        for function in ("files", "domain_name", "column_names", "batches", "is_text", "require_columns", "first_rows"):
            assert callable(getattr(formats.of(name), function))
    with pytest.raises(UserError, match=r"^format=amzon: did you mean 'amazon'\?$"):
        formats.of("amzon")
