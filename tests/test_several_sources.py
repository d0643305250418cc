"""Several source domains in one run: each behaviour counts, none is mixed up, and one source is the pair."""

from __future__ import annotations

import polars as pl
import pytest

from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import options_from_words
from cdr_dist.data.synthetic import Planted, planted_logs
from cdr_dist.errors import UserError
from cdr_dist.training.report_of_weights import section_of_weights
from cdr_dist.training.run_folder import RunFolder
from tests.datasets import rows_of
from tests.runs import summary, train, words

SHAPE = Planted(users=120, target_behaviours=6, source_behaviours=8, target_items=40, source_items=60)


@pytest.fixture
def raw(tmp_path):
    """Logs a.csv and t.csv of the same users; b.csv of half of them, with a's item names; c.csv of nobody of them."""
    logs = planted_logs(SHAPE)
    logs.source.write_csv(tmp_path / "a.csv")
    logs.target.write_csv(tmp_path / "t.csv")
    half = logs.source.filter(pl.col("user_id") < "u000060")
    half.with_columns(pl.lit("same").alias("category")).write_csv(tmp_path / "b.csv")
    logs.source.with_columns(("x" + pl.col("user_id")).alias("user_id")).write_csv(tmp_path / "c.csv")
    return tmp_path


def prepared(raw, source, *more):
    out = raw / source.replace(",", "+").replace(".csv", "")
    sources = ",".join(str(raw / name) for name in source.split(","))
    prepare(options_from_words([f"source={sources}", f"target={raw}/t.csv", f"out={out}", *more]))
    return out


def behaviours(dataset):
    """(user key, item key, timestamp) of all source candidates."""
    keys = {name: pl.read_parquet(dataset / f"vocab/{name}.parquet") for name in ("user", "source_item")}
    rows = (
        rows_of(dataset, "train").unique("user").select("user", "source_candidates_item", "source_candidates_timestamp")
    )
    rows = rows.explode("source_candidates_item", "source_candidates_timestamp").drop_nulls()
    named = rows.join(keys["user"], left_on="user", right_on="id").rename({"key": "who"})
    named = named.join(keys["source_item"], left_on="source_candidates_item", right_on="id")
    return set(named.select("who", "key", "source_candidates_timestamp").iter_rows())


def test_the_behaviours_are_those_of_all_sources_under_their_domains_names(raw):
    both, a, b = (prepared(raw, names) for names in ("a.csv,b.csv", "a.csv", "b.csv"))
    expected = {(u, f"a:{i}", t) for u, i, t in behaviours(a)} | {(u, f"b:{i}", t) for u, i, t in behaviours(b)}
    assert behaviours(both) == expected
    manifest = read_manifest(str(both))
    assert (manifest.sources, manifest.source_domain) == (["a", "b"], "a+b")
    names = set(pl.read_parquet(both / "vocab/source_category.parquet")["key"])
    assert "b:same" in names
    assert not [name for name in names if not name.startswith(("a:", "b:"))]


def test_a_user_of_one_source_is_a_user(raw):
    """Users of both domains: of the target and any source."""
    assert read_manifest(str(prepared(raw, "b.csv"))).counts["users"] == 60
    assert read_manifest(str(prepared(raw, "b.csv,a.csv"))).counts["users"] == 120


@pytest.mark.parametrize("recipe", ["joint", "biao"])
def test_a_second_source_of_other_people_changes_nothing(raw, recipe):
    digests = []
    for names in ("a.csv", "a.csv,c.csv"):
        data = prepared(raw, names)
        run = raw / f"run-{data.name}"
        train(words(data, run, f"recipe={recipe}", "trainer.max_steps=15"))
        digests.append(summary(run)["parameters_sha256"])
    assert digests[0] == digests[1]


def test_categories_come_from_item_files_where_a_source_has_one(raw):
    items = pl.read_csv(raw / "a.csv").select("item_id").unique().with_columns(category=pl.lit("filed"))
    items.head(30).write_csv(raw / "a-items.csv")
    both = prepared(raw, "a.csv,b.csv", f"source_items={raw}/a-items.csv,", "source_domain=x,y")
    assert set(pl.read_parquet(both / "vocab/source_category.parquet")["key"]) == {"x:filed", "x:others", "y:same"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("source_domain=x", "source_domain=x: 1 for 2 logs of source="),
        ("source_domain=x,x", "both domains are named x"),
        ("source_domain=x:y,z", "a name has no colon"),
        ("source_items=1,2,3", "source_items=1,2,3: 3 for 2 logs of source="),
    ],
)
def test_other_numbers_of_names_are_a_mistake(raw, more, expected):
    with pytest.raises(UserError) as error:
        prepared(raw, "a.csv,b.csv", more)
    assert expected in str(error.value)


def test_the_behaviours_of_every_source_are_weighed(raw, tmp_path):
    both = prepared(raw, "a.csv,b.csv")
    train(words(both, tmp_path / "run", "recipe=biao", "trainer.max_steps=8"))
    weights = pl.read_parquet(tmp_path / "run" / "weights.parquet")
    names = pl.read_parquet(both / "vocab/source_category.parquet").select(
        category=pl.col("id").cast(pl.Int64), key="key"
    )
    found = weights.join(names, on="category")
    for source in ("a:", "b:"):
        of = found.filter(pl.col("key").str.starts_with(source))
        assert of["behaviours"].sum() > 0
    section = section_of_weights(
        RunFolder(str(tmp_path / "run")), summary(tmp_path / "run"), str(both), read_manifest(str(both))
    )
    (shown,) = [table for table in section.tables if table.caption == "By source domain"]
    assert [row[0] for row in shown.rows] == ["a", "b"]
    for name, mean, behaviours_ in shown.rows:
        of = found.filter(pl.col("key").str.starts_with(f"{name}:"))
        assert int(behaviours_) == of["behaviours"].sum()
        assert float(mean) == pytest.approx((of["weight"] * of["behaviours"]).sum() / int(behaviours_), abs=1e-4)
        assert (of["weight"] > 0).all()
