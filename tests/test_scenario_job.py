"""From downloads to a dataset: a scenario of the paper by its name, RecBole's files, on tiny files of those names."""

from __future__ import annotations

import gzip
import json

import polars as pl
import pytest

from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.prepare import options_from_words
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.errors import UserError
from tests.test_item_features import values_of


@pytest.fixture
def raw(tmp_path):
    """Four users of CDs and Clothing: 2014's reviews as JSON, metadata as Python literals."""
    for name, prefix in (("CDs_and_Vinyl", "C"), ("Clothing_Shoes_and_Jewelry", "K")):
        with gzip.open(tmp_path / f"reviews_{name}_5.json.gz", "wt") as file:
            for user in range(4):
                for place in range(5):
                    line = {
                        "reviewerID": f"U{user}",
                        "asin": f"{prefix}{(user + place) % 6}",
                        "overall": 1.0 + place % 5,
                    }
                    file.write(json.dumps(line | {"unixReviewTime": 1_400_000_000 + 100 * place}) + "\n")
        with gzip.open(tmp_path / f"meta_{name}.json.gz", "wt") as file:
            for item in range(6):
                levels = [name, f"kind {item % 2}"][: 1 + item % 3]
                line = {"asin": f"{prefix}{item}", "categories": [levels], "title": "It's a hat", "brand": "Acme"}
                file.write(repr(line) + "\n")
    return tmp_path


def test_a_scenario_needs_only_the_folder_of_the_downloads(raw, capsys):
    prepare_job(["scenario=cds_cloth", f"raw={raw}", f"out={raw}/out", "item_columns.features=brand,title:words"])
    manifest = read_manifest(f"{raw}/out")
    assert (manifest.source_domain, manifest.target_domain) == ("cds", "cloth")
    assert (manifest.counts["users"], manifest.counts["target_behaviours"]) == (4, 20)
    printed = capsys.readouterr().out
    assert "users                          4       4,283" in printed
    kinds = set(pl.read_parquet(raw / "out/vocab/target_category.parquet")["key"])
    assert kinds == {"others", "kind 0", "kind 1"}
    assert values_of(raw / "out", "title")["K1"] == ["it", "s", "a", "hat"]
    rows = pl.read_parquet(sorted((raw / "out/train").glob("*")))
    assert set(rows["label"]) <= {0.0, 1.0}


def test_other_words_win_over_the_scenarios(raw):
    options = options_from_words(["scenario=cds_cloth", f"raw={raw}", "out=x", "labels=sampled", "source_domain=discs"])
    assert (options.labels, options.source_domain, options.threshold) == ("sampled", "discs", 3.0)


@pytest.mark.parametrize("words", [["scenario=cds_cloth"], ["raw=here"]])
def test_a_scenario_without_its_downloads_is_a_mistake(words):
    with pytest.raises(UserError, match="scenario= and raw=, the folder of its downloads, belong together"):
        options_from_words([*words, "out=x"])


def test_an_unknown_scenario_is_named():
    with pytest.raises(UserError, match="books_toys"):
        options_from_words(["scenario=books_toy", "raw=here", "out=x"])


def test_recboles_files_become_a_dataset(tmp_path):
    for name, prefix in (("a", "p"), ("b", "q")):
        lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
        lines += [
            f"u{u}\t{prefix}{(u + t) % 5}\t{4.0 if t % 2 else 2.0}\t{100.0 + t}" for u in range(3) for t in range(4)
        ]
        (tmp_path / f"{name}.inter").write_text("\n".join(lines) + "\n")
        items = ["item_id:token\tclass:token_seq\tmaker:token"]
        items += [f"{prefix}{i}\tone two{i}\tm{i % 2}" for i in range(5)]
        (tmp_path / f"{name}.item").write_text("\n".join(items) + "\n")
    words = ["format=recbole", f"source={tmp_path}/a.inter", f"target={tmp_path}/b.inter", f"out={tmp_path}/out"]
    words += [f"source_items={tmp_path}/a.item", f"target_items={tmp_path}/b.item", "feature_items=1"]
    prepare_job([*words, "item_columns.category=maker", "item_columns.features=class: "])
    assert read_manifest(f"{tmp_path}/out").counts["target_behaviours"] == 12
    assert values_of(tmp_path / "out", "class")["q3"] == ["one", "two3"]
