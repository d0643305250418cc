"""The scenarios of BIAO's paper: prepare's options, and Table 4 beside our counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cdr_dist.data import prepare_options, scenarios
from cdr_dist.data.prepare_options import options_from_words
from cdr_dist.data.sources import formats
from cdr_dist.errors import UserError

TABLE_4 = """
books_movies  944533  792319  37388  269301  49273
books_cds     418653  380675  16738  191942  61201
books_elec    735683  364267  28506  229189  52134
books_toys    317646   84564   7576  134350  11567
cds_cloth      71491   36319   4283   26178  15445
cds_kitchen   160358   96670   8144   36018  22550
elec_cloth     99594   66470   8235   25816  18703
"""
COLUMNS = ("source_behaviours", "target_behaviours", "users", "source_items", "target_items")
ROWS = {name: [int(n) for n in counts] for name, *counts in (row.split() for row in TABLE_4.split("\n") if row)}


def test_there_are_the_papers_scenarios() -> None:
    assert scenarios.names() == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_papers_counts_are_table_4s(name: str) -> None:
    assert scenarios.paper_counts(name) == dict(zip(COLUMNS, ROWS[name], strict=True))


@pytest.mark.parametrize("name", ROWS)
def test_words_are_prepares_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prepare_options.CHOICES, "format", tuple(formats.SOURCES))
    options = options_from_words([*scenarios.words_of(name, "s3://logs/amazon/"), "out=x"])
    assert f"{options.source_domain}_{options.target_domain}" == name
    assert (options.format, options.threshold, options.users, options.history) == ("amazon", 3.0, "both", "past")
    for role in ("source", "target"):
        log, items = getattr(options, role), getattr(options, f"{role}_items")
        domain = formats.of("amazon").domain_name(log)
        assert log == f"s3://logs/amazon/reviews_{domain}_5.json.gz"
        assert items == f"s3://logs/amazon/meta_{domain}.json.gz"


def test_the_files_of_a_scenario_are_read(tmp_path: Path) -> None:
    """As they would be with the downloads in the folder."""
    for domain in ("CDs_and_Vinyl", "Clothing_Shoes_and_Jewelry"):
        review = {"reviewerID": "u", "asin": "i", "overall": 5.0, "unixReviewTime": 1}
        (tmp_path / f"reviews_{domain}_5.json.gz").write_text(json.dumps(review))
        (tmp_path / f"meta_{domain}.json.gz").write_text(repr({"asin": "i", "categories": [["A", "B"]]}))
    options = dict(word.split("=") for word in scenarios.words_of("cds_cloth", str(tmp_path)))
    source = formats.of(options["format"])
    for role in ("source", "target"):
        assert source.files(options[role]) == [options[role]]
        assert source.column_names(options[role]) == ["user_id", "item_id", "rating", "timestamp"]
        (batch,) = source.batches(options[f"{role}_items"], ["item_id", "category"])
        assert batch.to_pylist() == [{"item_id": "i", "category": "B"}]


def test_mistakes_are_named() -> None:
    for call in (lambda: scenarios.words_of("book_movies", "d"), lambda: scenarios.paper_counts("book_movies")):
        with pytest.raises(UserError, match=r"^scenario book_movies: did you mean 'books_movies'\?$"):
            call()
    with pytest.raises(UserError, match=r"^scenario books_cds: give the folder of the downloads$"):
        scenarios.words_of("books_cds", "")


def test_counts_stand_beside_the_papers() -> None:
    counts = dict(zip(COLUMNS, (71_491, 36_000, 4_284, 26_178, 15_445), strict=True)) | {"train_positives": 3}
    assert scenarios.beside_paper(counts, scenarios.paper_counts("cds_cloth")).splitlines() == [
        "                            here       paper",
        "users                      4,284       4,283  +1 (+0.0%)",
        "source items              26,178      26,178",
        "source behaviours         71,491      71,491",
        "target items              15,445      15,445",
        "target behaviours         36,000      36,319  -319 (-0.9%)",
    ]
