"""jobs/audit.py: the verdict on scores whose truth is known, popularity against a loop, and a whole audit in small."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest

from cdr_dist.data.dataset import FIRST_ID, read_manifest
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import options_from_words
from cdr_dist.data.synthetic import planted_logs
from cdr_dist.errors import UserError
from cdr_dist.evaluation import verdict
from cdr_dist.evaluation.audit_page import Answer
from cdr_dist.evaluation.metrics import auc
from cdr_dist.evaluation.popularity import PRIOR, full_ranking, popularity
from cdr_dist.evaluation.verdict import Category, Rows, Tried
from cdr_dist.training import audit as module
from cdr_dist.training.experiment_runs import Room, run_one
from cdr_dist.training.run_folder import RunFolder
from tests.browser import check_readable, needs_browser
from tests.datasets import SHAPE, copied, rated, rows_of, sampled
from tools import audit_planted

USERS, SEEDS = 400, 4


def rows():
    """Two rows a user, a like and none; behaviours 1 to 12."""
    user = np.repeat(np.arange(USERS), 2)
    return Rows(user, np.tile([1.0, 0.0], USERS), 1 + user % 12)


def tried(name, signal, valid, where=None):
    """Scores that know the label this well (on rows `where`), with another noise for every seed."""
    known, random = rows(), np.random.default_rng(zlib.crc32(name.encode()))
    inside = np.ones(len(known.user)) if where is None else where
    scores = known.label * signal * inside + random.normal(size=(SEEDS, len(known.user)))
    return Tried(name, [valid] * SEEDS, [auc(known.label, s) for s in scores], scores, 2.0, seeds=(8, 9, 10, 11))


@pytest.mark.parametrize(("signal", "expected"), [(1.5, "yes"), (0.6, "not shown"), (0.0, "no")])
def test_the_verdict_is_the_sign_of_the_interval(signal, expected):
    single = tried("mf", 0.6, 0.7)
    found = verdict.judge("books", rows(), [tried("popularity", 3.0, 0.6), single], [tried("biao", signal, 0.8)])
    assert found.verdict == expected
    assert found.single is single, "the best by validation, whatever the test rows say"
    assert verdict.sentence([found]).startswith("Yes" if expected == "yes" else "No")


def test_methods_are_chosen_by_validation_alone():
    """The transfer method that would win on the test rows lost on validation rows."""
    lucky, chosen = tried("joint", 3.0, 0.60), tried("biao", 0.6, 0.61)
    found = verdict.judge("books", rows(), [tried("mf", 0.6, 0.7)], [lucky, chosen])
    assert found.best is chosen


def test_groups_see_their_own_users_alone():
    cold = (rows().behaviours <= 2).astype(float)
    found = verdict.judge("books", rows(), [tried("mf", 0.0, 0.7)], [tried("biao", 2.0, 0.8, cold)])
    gains = {name: difference.low > 0 for name, (_, difference) in found.groups.items()}
    assert gains == {"cold (1 or 2)": True, "short (3 to 9)": False, "long (10 and more)": False}
    assert sum(users for users, _ in found.groups.values()) == USERS


def test_of_the_gains_shown_the_best_on_validation_is_recommended_and_harm_is_named():
    single = [tried("mf", 0.6, 0.7)]
    lucky, better, harm = (
        verdict.judge(n, rows(), single, [tried("biao", signal, valid)])
        for n, signal, valid in (("a", 2.5, 0.8), ("b", 1.3, 0.81), ("c", 0, 0.9))
    )
    assert lucky.difference.difference > better.difference.difference
    assert verdict.recommended([lucky, better, harm]) is better
    assert verdict.to_json([lucky, better, harm])["source"] == "b"
    assert verdict.recommended([harm]) is None
    assert "c does harm" in verdict.sentence([harm])


def test_the_more_sources_the_more_a_gain_has_to_be():
    """Of ten sources without any use, about one in four would otherwise show a gain."""
    single, borderline = [tried("mf", 0.6, 0.7)], [tried("biao", 0.72, 0.8)]
    found = {n: verdict.judge("books", rows(), single, borderline, sources=n) for n in (1, 10)}
    assert [of.verdict for of in found.values()] == ["yes", "not shown"]
    assert found[1].difference.p == found[10].difference.p
    assert verdict.level_of(10) == pytest.approx(0.995)


@pytest.mark.parametrize(("alone", "harms"), [(0.2, False), (1.5, True)], ids=["the backbone", "the source"])
def test_a_source_does_harm_only_where_the_same_backbone_is_better_without_it(alone, harms):
    singles = [tried("mf", 2.5, 0.9), tried("target_only", alone, 0.7)]
    found = verdict.judge("books", rows(), singles, [tried("joint", 0.3, 0.8)])
    assert (found.verdict, found.harms) == ("no", harms)
    assert ("books does harm" in verdict.sentence([found])) == harms
    assert verdict.to_json([found])["sources"][0]["harms"] == harms


def test_seeds_are_compared_with_themselves_where_some_failed():
    """The noise of a seed is the same in both methods, so that only true pairs differ by the signal alone."""
    noise = np.random.default_rng(0).normal(size=(5, 2 * USERS))
    single = Tried("mf", [0.7], [0.5], noise, seeds=(8, 9, 10, 11, 12))
    better = Tried("biao", [0.8], [0.5], (noise + 0.05 * rows().label)[[3, 4, 0]], seeds=(11, 12, 8))
    found = verdict.judge("books", rows(), [single], [better])
    assert found.verdict == "yes"
    with pytest.raises(UserError, match="biao and mf: of no seed did both runs come through"):
        verdict.judge("books", rows(), [replace(single, seeds=(1, 2, 3, 4, 5))], [better])


def test_a_scorer_without_seeds_stands_against_every_seed():
    popular = Tried("popularity", [0.9], [0.5], np.zeros((1, 2 * USERS)))
    found = verdict.judge("books", rows(), [popular], [tried("biao", 1.5, 0.8)])
    assert found.verdict == "yes"
    assert found.difference.difference == pytest.approx(np.mean(found.best.test) - 0.5)


def test_categories_count_more_or_less_where_their_intervals_say_so():
    assert [Category("x", 1, w, w - 0.1, w + 0.1).verdict for w in (1.2, 1.05, 0.8)] == ["more", "as all", "less"]


def check_full_ranking(folder, manifest, score):
    scores = np.array([score(item) for item in range(manifest.rows["target_item"])])
    trained = {user: set(part["item"]) for (user,), part in rows_of(folder, "train").group_by("user")}
    gained = []
    for row in rows_of(folder, "test").filter(pl.col("label") > 0).iter_rows(named=True):
        barred = trained.get(row["user"], set()) | {row["item"]}
        others = np.array([s for item, s in enumerate(scores) if item >= FIRST_ID and item not in barred])
        first, tied = (others > scores[row["item"]]).sum(), 1 + (others == scores[row["item"]]).sum()
        ranks = np.arange(first + 1, first + tied + 1)
        gained.append([(ranks <= 3).mean(), np.where(ranks <= 3, 1 / ranks, 0).mean()])
    found = full_ranking(str(folder), manifest, "test", [3])
    np.testing.assert_allclose([found["hr@3"], found["mrr@3"]], np.mean(gained, axis=0))
    assert 0 < found["mrr@3"] < 1


def test_of_raw_logs_the_answer_is_about_all_users_of_the_target(tmp_path):
    """Half of them have no source behaviour: they are asked about all the same, and so is who transfers nothing."""
    logs = planted_logs(SHAPE)
    logs.target.write_csv(tmp_path / "t.csv")
    logs.source.filter(pl.col("user_id") < "u000150").write_csv(tmp_path / "s.csv")
    given = [f"source={tmp_path}/s.csv", f"target={tmp_path}/t.csv", f"out={tmp_path}/out", "seed=3", "storage.tries=9"]
    request = module.request_of(given)
    manifest = read_manifest(request.data["s"])
    assert manifest.counts["users"] == logs.target["user_id"].n_unique() == SHAPE.users
    assert (manifest.options["seed"], request.words) == (3, ["storage.tries=9"])


def test_popularity_of_an_item_that_nobody_trained_on_is_a_number(tmp_path):
    folder = copied(rated(), tmp_path)
    for path in (folder / "test").glob("*.parquet"):
        rows = pl.read_parquet(path)
        unknown = (pl.int_range(pl.len()) % 3 == 0) & (pl.col("label") > 0)
        rows.with_columns(item=pl.when(unknown).then(pl.lit(1, pl.Int32)).otherwise("item")).write_parquet(path)
    found = full_ranking(str(folder), read_manifest(str(folder)), "test", [3, 10_000])
    assert found["hr@10000"] == 1
    assert 0 < found["hr@3"] < 0.5


@pytest.mark.parametrize("data", [rated, sampled])
def test_popularity_against_a_loop(data):
    folder, manifest = data(), read_manifest(str(data()))
    train = rows_of(folder, "train")
    count = {i: part["label"].to_list() for (i,), part in train.group_by("item")}
    mean = train["label"].mean()

    def score(item):
        likes = count.get(item, [])
        return (
            np.log1p(len(likes)) if manifest.label == "sampled" else (sum(likes) + PRIOR * mean) / (len(likes) + PRIOR)
        )

    check_full_ranking(folder, manifest, score)
    expected = []
    for row in rows_of(folder, "test").sort("example_id").iter_rows(named=True):
        expected.append((row["example_id"], row["user"], row["label"], score(row["item"])))
        expected += [(row["example_id"], row["user"], 0.0, score(item)) for item in row["negatives_item"]]
    found = popularity(str(folder), manifest, "test")
    np.testing.assert_allclose(np.stack([found.group, found.user, found.label, found.score]).T, expected)


class Here:
    """Runs take place in this process."""

    def __init__(self):
        self.done = []

    def room(self):
        return Room(1, 2**30)

    def start(self, number, words):
        self.done.append((number, run_one(words)))

    def next(self):
        return self.done.pop(0)

    def close(self):
        pass


SMALL = ["seeds=2", "budget=1", "parallel=1", "trainer.max_steps=8", "batch.size=64", "batch.history_length=4"]


class Tables(HTMLParser):
    """Counts tables and anything that would be fetched or run."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.foreign = 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tables += tag == "table"
        if tag in ("script", "link", "img", "iframe") or dict(attrs).keys() & {"src", "href"}:
            self.foreign.append(tag)


def test_an_audit_of_two_sources_tries_them_apart_and_together(tmp_path, monkeypatch):
    logs = planted_logs(SHAPE)
    logs.target.write_csv(tmp_path / "t.csv")
    logs.source.write_csv(tmp_path / "a.csv")
    logs.source.filter(pl.col("user_id") < "u000100").write_csv(tmp_path / "b.csv")
    monkeypatch.setattr(module.experiment_runs, "places_of", lambda *_: Here())
    monkeypatch.setattr(module, "TRANSFER", {"biao": ["recipe=biao"]})  # two more would take twice as long
    given = [f"source={tmp_path}/a.csv,{tmp_path}/b.csv", f"target={tmp_path}/t.csv", f"out={tmp_path}/out"]
    module.audit_job([*given, *SMALL])
    found = json.loads((tmp_path / "out/audit.json").read_text())
    assert [source["name"] for source in found["sources"]] == ["a", "b", "a + b"]
    assert {name[:2] for name in found["sources"][2]["categories"]} == {"a:", "b:"}
    text = (tmp_path / "out/audit.md").read_text()
    assert text.count("| target alone |") == 3
    page = Tables((tmp_path / "out/audit.html").read_text())
    assert (page.tables, page.foreign) == (4, [])


def test_of_sampled_labels_the_factorisation_is_bprs(tmp_path, monkeypatch):
    monkeypatch.setattr(module.experiment_runs, "places_of", lambda *_: Here())
    monkeypatch.setattr(module, "TRANSFER", {"biao": ["recipe=biao"]})
    module.audit_job([f"data={sampled()}", f"out={tmp_path}", *SMALL])
    assert "| BPR-MF " in (tmp_path / "audit.md").read_text()
    runs = [RunFolder(str(path.parent)) for path in tmp_path.glob("runs/single/**/BPR-MF/**/config.yaml")]
    assert {run.config().model["loss"] for run in runs} == {"bpr"}


def test_what_advice_costs_is_measured_on_users_that_it_was_not_decided_by():
    """A method that knows the labels of the one half and nothing of the other is advised, and costs; a good one not."""
    users = np.random.default_rng(0).permutation(USERS)[: USERS // 2]
    half = np.isin(rows().user, users).astype(float)
    singles = [tried("mf", 0.8, 0.7)]
    costs = []
    for where in (half, None):
        found = verdict.judge("books", rows(), singles, [tried("biao", 3.0, 0.8, where)])
        costs.append(audit_planted.regret_of([found], singles, rows()))
    assert costs[0] > 3
    assert costs[1] == 0


@needs_browser
def test_a_browser_shows_the_answer(tmp_path):
    singles = [tried("mf", 0.6, 0.7), tried("target_only", 0.5, 0.6)]
    found = verdict.judge("books", rows(), singles, [tried("biao", 1.5, 0.8)])
    answer = Answer(True, verdict.sentence([found]), verdict.tables(singles, [found]), "notes", "command")
    (tmp_path / "page.html").write_text(answer.html())
    check_readable(tmp_path / "page.html", tmp_path)


def test_names_are_escaped_in_the_page():
    table = verdict.Table("<b>", ["<script>"], [["<img src=x>"]], 1)
    text = Answer(False, "No: <script>", [table], "", "x").html()
    assert Tables(text).foreign == []
    assert "&lt;img src=x&gt;" in text


def test_datasets_of_other_targets_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match="other valid rows, so no answer could compare them"):
        module.request_of([f"data={rated()},{other(tmp_path)}", *SMALL])


def other(folder):
    logs = planted_logs(SHAPE)
    logs.source.write_csv(folder / "s.csv")
    logs.target.filter(pl.col("user_id") < "u000200").write_csv(folder / "t.csv")
    prepare(options_from_words([f"source={folder}/s.csv", f"target={folder}/t.csv", f"out={folder}/other"]))
    return folder / "other"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seeds=2"], "give source= and target=, or data="),
        (["data=x", "source=a.csv", "target=b.csv"], "give source= and target=, or data="),
        (["data=x", "labels=sampled"], "labels=sampled: is of jobs/prepare.py"),
        (["data=x", "parallel=0"], "parallel=0: must be auto or a whole number, at least 1"),
        (["data=x", "parallel=two"], "parallel=two: must be auto"),
        (["data=x", "out=s3://bucket/audit"], "out=s3://bucket/audit: must be a folder here"),
        (["source=a.csv", "target=b.csv", "dense.lrr=1"], "dense.lrr: unknown option"),
        (["data=x", "recipe=biao"], "recipe=biao: every run of experiment=single has its own"),
        (["data=x", "seeds=3", "seeds=2"], "seeds= is given twice"),
        (["data=x", "seeds=1"], "seeds=1: must be a whole number, at least 2"),
        (["data"], "'data': options are written key=value"),
    ],
)
def test_a_mistake_is_one_line(words, expected):
    with pytest.raises(UserError) as error:
        module.request_of(words)
    assert expected in str(error.value)


def test_a_category_is_one_row_over_seeds_that_drew_it_unequally_often(tmp_path):
    folder = str(rated())
    outcomes = []
    for seed, (behaviours, weight) in enumerate([(10, 1.0), (14, 3.0), (12, 2.0)]):
        (tmp_path / str(seed)).mkdir()
        frame = pl.DataFrame({"category": [2, 3], "behaviours": [behaviours, 10], "weight": [weight, 1.0]})
        frame.write_parquet(tmp_path / str(seed) / "weights.parquet")
        plan = type("Plan", (), {"run": str(tmp_path / str(seed))})()
        outcomes.append(type("Outcome", (), {"summary": {}, "plan": plan})())
    found = module._categories(folder, read_manifest(folder), outcomes)
    assert len(found) == len({category.name for category in found}) == 2
    first = next(category for category in found if category.behaviours == 12)
    means = [w / ((n * w + 10) / (n + 10)) for n, w in [(10, 1.0), (14, 3.0), (12, 2.0)]]
    assert first.weight == pytest.approx(np.mean(means))
    assert 0 < first.high - first.low < 5
