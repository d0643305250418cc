"""The generated dataset: in prepare's own format, popularity by Zipf's law, trained on; the same bytes however made."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import generate as command

from cdr_dist.configuration import from_words
from cdr_dist.data import generate as module
from cdr_dist.data.dataset import SPLITS, read_manifest
from cdr_dist.data.generate import generate
from cdr_dist.data.generate_options import GenerateOptions, options_from_words
from cdr_dist.data.popularity import scattered, zipf_ranks
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.shards import verify
from cdr_dist.errors import UserError
from cdr_dist.training.job import check_run
from cdr_dist.training.launch import train
from tests.datasets import rows_of, scratch
from tests.problem import replaced

SIZES = {
    "users": 2000,
    "source_items": 3000,
    "target_items": 2000,
    "source_categories": 30,
    "target_categories": 20,
    "source_behaviours": 20_000,
    "target_behaviours": 12_000,
}


def written(name, **more):
    """In several shards, from several blocks of users."""
    with replaced(module, "BLOCK_USERS", 700):
        generate(GenerateOptions(out=str(scratch() / name), **{**SIZES, "rows_per_shard": 2500, **more}))
    return scratch() / name


@functools.cache
def dataset():
    return written("generated")


def test_users_rows_are_what_their_examples_end_with():
    _, rows = everything()
    found = {row["user"]: row for row in rows_of(dataset(), "users").iter_rows(named=True)}
    assert len(found) == SIZES["users"]
    assert len(read_manifest(str(dataset())).shards["users"]) == 1
    for (user,), own in rows.sort("timestamp").group_by("user", maintain_order=True):
        row, liked = found[user], own.filter(pl.col("label") > 0)["item"].to_list()
        assert row["user_id"] == f"u{user - 2:04d}"
        assert row["seen_item"] == sorted(set(own["item"].to_list()))
        assert row["target_history_item"] == liked
        last = own[-1].to_dicts()[0]
        n = len(last["source_history_item"])
        assert row["source_history_item"][:n] == last["source_history_item"]
        assert len(row["source_candidates_item"]) == 1
        if row["source_candidates_label"] == [1.0]:
            assert row["source_candidates_item"] == row["source_history_item"][-1:]
            assert row["source_candidates_before"] == [len(row["source_history_item"]) - 1]


@functools.cache
def everything(labels="rating"):
    """Every row of every split, in the order of example_id."""
    folder = dataset() if labels == "rating" else written("generated-sampled", labels=labels, eval_negatives=3)
    rows = [rows_of(folder, s).with_columns(split=pl.lit(s)) for s in SPLITS]
    return folder, pl.concat(rows).sort("example_id")


def test_manifest_and_files_agree_by_checksum():
    manifest = read_manifest(str(dataset()))
    verify(str(dataset()), manifest, how="checksum")
    _, rows = everything()
    assert {s: manifest.examples(s) for s in SPLITS} == dict(rows.group_by("split").len().iter_rows())
    assert len(manifest.shards["train"]) > 1
    assert manifest.rows["target_item"] == 2002
    counts = manifest.counts
    assert (counts["users"], counts["source_items"], counts["target_behaviours"]) == (2000, 3000, len(rows))
    assert abs(counts["target_behaviours"] / SIZES["target_behaviours"] - 1) < 0.05
    assert abs(counts["source_behaviours"] / SIZES["source_behaviours"] - 1) < 0.08
    for split in SPLITS:
        assert counts[f"{split}_positives"] == rows.filter(pl.col("split") == split)["label"].sum()
    train, test = (set(rows.filter(pl.col("split") == s)["item"]) for s in ("train", "test"))
    unseen = rows.filter((pl.col("split") == "test") & pl.col("item").is_in(list(test - train))).height
    assert manifest.unseen["test"] == {"user": 0.0, "item": unseen / manifest.examples("test")}
    assert unseen


@pytest.mark.parametrize("labels", ["rating", "sampled"])
def test_prepare_makes_the_same_examples_of_the_same_behaviours(labels, tmp_path):
    """The logs are read back from the rows: a row is a target behaviour; its candidates are the user's source log up
    to validation (what comes later shows in no training row)."""
    folder, rows = everything(labels)
    names = {n: pl.read_parquet(folder / f"vocab/{n}.parquet") for n in read_manifest(str(folder)).rows}

    def keyed(frame, vocabulary):
        return frame.join(names[vocabulary].select("id", name="key"), on="id").drop("id")

    target = rows.select("example_id", "user", "timestamp", "label", "category", id="item")
    source = rows.unique("user").select(
        "user",
        id="source_candidates_item",
        category="source_candidates_category",
        label="source_candidates_label",
        timestamp="source_candidates_timestamp",
    )
    logs = {"target": target, "source": source.explode("id", "category", "label", "timestamp").drop_nulls()}
    for role, log in logs.items():
        log = keyed(log.rename({"user": "u", "category": "c"}), f"{role}_item").rename({"name": "item_id"})
        log = keyed(log.rename({"u": "id"}), "user").rename({"name": "user_id"})
        log = keyed(log.rename({"c": "id"}), f"{role}_category").rename({"name": "category"})
        log.with_columns(rating=4.0 * pl.col("label")).sort("timestamp").write_parquet(tmp_path / f"{role}.parquet")
    given = {role: str(tmp_path / f"{role}.parquet") for role in logs}
    out = tmp_path / "out"
    more = {"eval_negatives": 3} if labels == "sampled" else {}
    prepare(PrepareOptions(**given, out=str(out), users="target", labels=labels, **more))
    again = {n: pl.read_parquet(out / f"vocab/{n}.parquet") for n in names}
    for split in SPLITS:
        ours = comparable(rows.filter(pl.col("split") == split).drop("split"), names, split)
        theirs = comparable(rows_of(out, split), again, split)
        for column in theirs.columns:
            assert ours[column].equals(theirs[column]), (split, column)


def comparable(rows, vocabularies, split):
    """Keys in place of ids, in the order of (user, time)."""
    of = {"user": "user", "item": "target_item", "category": "target_category"}
    of |= {n: f"{n[:6]}_{n.rpartition('_')[2]}" for n in rows.columns if rows.schema[n] == pl.List(pl.Int32)}
    columns = []
    for name in rows.columns:
        if of.get(name) not in vocabularies:  # numbers; negatives, which depend on the size of the catalogue
            columns.append(pl.col(name))
            continue
        ids, keys = (vocabularies[of[name]][c] for c in ("id", "key"))
        if rows.schema[name] == pl.List(pl.Int32):
            columns.append(pl.col(name).list.eval(pl.element().replace_strict(ids, keys)))
        else:
            columns.append(pl.col(name).replace_strict(ids, keys))
    left_out = ["example_id", "negatives_item"]
    left_out += [] if split == "train" else ["source_history_item", "source_history_category"]
    return rows.select(columns).drop(left_out).sort("user", "timestamp")


def test_ids_are_unique_and_every_item_has_one_category():
    folder, rows = everything()
    assert rows["example_id"].to_list() == list(range(len(rows)))
    for domain in ("source", "target"):
        known = pl.read_parquet(folder / f"vocab/{domain}_item.parquet").select("id", "category")
        lists = [f"{domain}_history", f"{domain}_candidates"]
        pairs = [rows.select(id=f"{n}_item", c=f"{n}_category").explode("id", "c").drop_nulls() for n in lists] + (
            [rows.select(id="item", c="category")] if domain == "target" else []
        )
        joined = pl.concat(pairs).join(known, on="id", how="left")
        assert len(joined) > 10_000
        assert joined["c"].equals(joined["category"], null_equal=False)


def test_histories_are_geometric_and_capped():
    folder = written("generated-short", longest=13, source_behaviours=12_000)
    rows = pl.concat(rows_of(folder, s) for s in SPLITS)
    counts = rows.group_by("user").len()["len"].to_numpy()
    assert counts.max() == 13
    assert abs((counts >= 7).sum() / (counts >= 4).sum() - (1 - 1 / 6) ** 3) < 0.06
    assert rows["target_history_item"].list.len().max() <= 13
    assert rows["source_history_item"].list.len().max() <= 13


def test_rows_are_shuffled_over_all_shards():
    """The ranks of users in file order are as those of random numbers: no run of them, none missing from a shard."""
    users = rows_of(dataset(), "train")["user"].to_numpy().astype(float)
    assert abs(np.corrcoef(users[:-1], users[1:])[0, 1]) < 0.05
    for shard in read_manifest(str(dataset())).shards["train"]:
        own = pl.read_parquet(dataset() / shard.path)["user"]
        assert abs(own.mean() - 1000) < 5 * 577 / len(own) ** 0.5


def test_the_bytes_are_those_of_the_options(tmp_path):
    """However many processes write, and however users are cut into blocks; the seed changes them."""
    first = read_manifest(str(dataset()))
    options = {**SIZES, "rows_per_shard": 2500}
    for name, more in {"again": {}, "on-ray": {"workers": 2}}.items():
        assert generate(GenerateOptions(out=str(tmp_path / name), **options, **more)).checksum == first.checksum
    assert generate(GenerateOptions(out=str(tmp_path / "seed"), **options, seed=9)).shards != first.shards
    assert not list(tmp_path.glob("*.unfinished"))


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.3])
def test_popularity_follows_zipfs_law(exponent):
    """Against the exact probabilities, also at the head."""
    items, draws = 1000, 400_000
    ranks = zipf_ranks((np.arange(draws) + 0.5) / draws, items, exponent)
    exact = 1 / np.arange(1, items + 1) ** exponent
    found = np.bincount(ranks, minlength=items) / draws
    ratio = found / (exact / exact.sum())
    assert np.allclose(ratio[:2], 1, atol=0.16)
    assert abs(np.polyfit(np.log(np.arange(3, 101)), np.log(found[2:100]), 1)[0] + exponent) < 0.02


def test_popular_items_are_spread_over_the_workers():
    items = 10_000
    numbers = scattered(np.arange(items), items)
    assert np.array_equal(np.sort(numbers), np.arange(items))
    mass = np.bincount(numbers * 4 // items, weights=1 / np.arange(1, items + 1))
    assert mass.max() / mass.sum() < 0.35


@pytest.mark.parametrize("recipe", ["joint", "biao"])
def test_it_is_trained_on(recipe, tmp_path):
    given = [f"data={dataset()}", f"run={tmp_path}/run", f"recipe={recipe}", "batch.size=64", "trainer.workers=0"]
    config = from_words([*given, "trainer.max_steps=12", "trainer.verify=checksum"])
    assert check_run(config).startswith(f"ok: {recipe} on {dataset()}: ")
    summary = train(config, config.data, quiet=True)
    assert summary["steps"] == 12
    assert summary["upper_steps"] == (2 if recipe == "biao" else 0)
    assert 0.5 < summary["metrics"]["test"]["logloss"] < 0.8


def test_the_command_keeps_what_is_there_and_refuses_what_is_not(tmp_path, capsys):
    sizes = [f"{n}={v}" for n, v in SIZES.items()]
    given = [f"out={tmp_path}/out", *sizes]
    command.main(given)
    before = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    assert "2,000" in capsys.readouterr().out
    command.main(given)
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds a dataset of other options"):
        command.main([*given, "seed=1"])


@pytest.mark.parametrize(
    ("word", "said"),
    {
        "user=3": "user: unknown option; did you mean 'users'?",
        "users=many": "users=many: not a whole number",
        "exponent=-1": "exponent=-1.0: must be between 0 and 3",
        "target_behaviours=10": "target_behaviours=10: must be users=2000 to users x longest / 2 = 50000",
        "target_items=3": "target_categories=20: must be 1 to target_items=3",
        "labels=stars": "labels=stars: known: rating, sampled",
        "rows_per_shard=0": "rows_per_shard=0: must be 1 or more",
    }.items(),
)
def test_a_bad_option(word, said):
    words = {n: f"{n}={v}" for n, v in SIZES.items()} | {word.partition("=")[0]: word}
    with pytest.raises(UserError) as error:
        options_from_words(["out=x", *words.values()])
    assert str(error.value) == said
    with pytest.raises(UserError, match="out= is missing"):
        options_from_words([])


def test_items_are_counted_as_prepare_counts_them():
    folder, rows = everything()
    liked = rows.filter((pl.col("split") == "train") & (pl.col("label") > 0))["item"].value_counts()
    vocabulary = pl.read_parquet(folder / "vocab/target_item.parquet")
    found = dict(vocabulary.filter(pl.col("count") > 0).select("id", "count").iter_rows())
    assert found == dict(liked.iter_rows())
    source = pl.read_parquet(folder / "vocab/source_item.parquet")["count"].sum()
    assert 0 < source < read_manifest(str(folder)).counts["source_behaviours"]
