"""The planted sequences are as their shape says: one succession for all, kinds told by badges, targets by kind."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cdr_dist.data import demo
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.demo import dataset_of, write_planted
from cdr_dist.data.planted_sequences import PlantedSequences, planted_sequences
from cdr_dist.data.truth import kinds_of_users, of_categories, usefulness_by_category
from cdr_dist.errors import UserError
from tests.datasets import rated

SHAPE = PlantedSequences(users=1500, source_users=500)


@pytest.fixture(scope="module")
def planted():
    """user -> kind, topics of the source in order, topics of the target."""
    logs, topics = planted_sequences(SHAPE), SHAPE.topics
    kinds = dict(logs.truth.iter_rows())
    source, target = (
        {
            user: (own["item_id"].str.slice(1).cast(pl.Int64) % of).to_list()
            for (user,), own in log.sort("timestamp").group_by("user_id", maintain_order=True)
        }
        for log, of in ((logs.source, topics + 2 * SHAPE.badges), (logs.target, topics))
    )
    return kinds, source, target


def likeliest(pairs):
    """From each first the second that follows it most often, and how often that is."""
    counts = np.zeros((SHAPE.topics, SHAPE.topics))
    for one, other in pairs:
        counts[one, other] += 1
    return counts.argmax(axis=1), counts.max(axis=1).sum() / counts.sum()


def common(topics):
    return [topic for topic in topics if topic < SHAPE.topics]


def test_both_kinds_follow_the_same_succession(planted):
    kinds, source, _ = planted
    found = {}
    for kind in ("aligned", "contrary"):
        steps = [pair for user, own in source.items() if kinds[user] == kind for pair in pairwise(own)]
        found[kind], share = likeliest(p for p in steps if max(p) < SHAPE.topics)
        assert share > 0.8
        assert sorted(found[kind]) == list(range(SHAPE.topics)), "a permutation"
    assert list(found["aligned"]) == list(found["contrary"])


def test_badges_tell_the_kinds_apart_and_nothing_else_does(planted):
    kinds, source, _ = planted
    for user, own in source.items():
        assert [topic >= SHAPE.topics for topic in own] == [True] * 3 + [False] * (len(own) - 3)
        badges = {(topic - SHAPE.topics) // SHAPE.badges for topic in own if topic >= SHAPE.topics}
        assert badges == {int(kinds[user] == "contrary")}
    shares = [
        np.bincount(common(topic for user, own in source.items() if kinds[user] == kind for topic in own))
        for kind in set(kinds.values())
    ]
    assert np.abs(np.subtract(*(share / share.sum() for share in shares))).max() < 0.02


def test_aligned_targets_are_of_the_next_topic_and_contrary_ones_never(planted):
    kinds, source, target = planted
    following, _ = likeliest(pair for own in source.values() for pair in pairwise(common(own)))
    for kind, as_expected in (("aligned", True), ("contrary", False)):
        pairs = [(common(source[u])[-1], t) for u, own in target.items() if kinds[u] == kind for t in own]
        mapping, share = likeliest(pairs)
        assert share == pytest.approx(SHAPE.target_certainty + 0.1 / SHAPE.topics, abs=0.03)
        assert sorted(mapping) == list(range(SHAPE.topics))
        assert ((mapping == following) == as_expected).all()


def test_who_does_not_know_the_kind_fails_the_contrary_users(planted):
    """HR@5 among 99 uniform negatives, by the true probabilities: of the user's mapping, or of both mixed."""
    kinds, source, _ = planted
    target = planted_sequences(SHAPE).target
    topics, rng = SHAPE.topics, np.random.default_rng(1)
    contrary = np.array([kinds[user] == "contrary" for user in target["user_id"]])
    last = np.array([source[user][-1] for user in target["user_id"]])
    item = target["item_id"].str.slice(1).cast(pl.Int64).to_numpy()
    mapping = [likeliest(zip(last[of], item[of] % topics, strict=True))[0] for of in (~contrary, contrary)]
    shown = np.column_stack([item, rng.integers(0, SHAPE.target_items, (len(item), 99))])
    popular = (1 + shown // topics) ** -SHAPE.target_exponent
    here = [(shown % topics == of[last][:, None]) * popular + 1e-3 * popular for of in mapping]
    scores = {"known": np.where(contrary[:, None], here[1], here[0])}
    scores["unknown"] = SHAPE.aligned * here[0] + (1 - SHAPE.aligned) * here[1]
    hits = {name: (of[:, 1:] >= of[:, :1]).sum(axis=1) < 5 for name, of in scores.items()}
    found = {name: (of[~contrary].mean(), of[contrary].mean()) for name, of in hits.items()}
    assert min(found["known"]) > 0.7
    assert 0.5 < found["unknown"][0] < found["known"][0] - 0.05
    assert found["unknown"][1] < found["known"][1] - 0.25


def test_classes_are_of_neighbouring_topics(planted):
    """The same users and topics, but for what is drawn after the targets' topics."""
    logs = planted_sequences(replace(SHAPE, classes=4))
    topics = [topic for user in sorted(planted[2]) for topic in planted[2][user]]
    assert logs.target["item_id"].to_list() == [str(topic // 4) for topic in topics]
    assert set(logs.target["item_id"]) == set("0123")
    with pytest.raises(UserError, match=r"^planted sequences: classes=17: must be 0 to topics=16$"):
        replace(SHAPE, classes=17)


def test_sizes_and_seed(planted):
    kinds, source, target = planted
    assert len(source) == len(kinds) == 2000
    assert len(target) == 1500
    assert {len(own) for own in target.values()} == {1, 2, 3}
    assert {len(own) for own in source.values()} == set(range(10, 31))
    small = replace(SHAPE, users=20, source_users=20)
    assert planted_sequences(small).source.equals(planted_sequences(small).source)
    assert not planted_sequences(small).source.equals(planted_sequences(replace(small, seed=9)).source)
    with pytest.raises(UserError, match=r"^planted sequences: shortest=40: must be 4 to longest=30$"):
        replace(SHAPE, shortest=40)


def test_the_demo_is_written_on_first_use_with_the_kinds_of_its_users(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = replace(SHAPE, users=200, source_users=100)
    monkeypatch.setitem(demo.DEMOS, "demo_sequences", ("runs/some", small))
    folder = dataset_of("demo_sequences")
    assert folder == str(tmp_path / "runs/some")
    manifest = read_manifest(folder)
    assert write_planted(small, folder) == manifest
    assert demo.is_written("demo_sequences")
    assert manifest.examples("sequences_train") > 200
    assert manifest.counts["cold_users"] == 100
    kinds = kinds_of_users(folder)
    users = pl.read_parquet(f"{folder}/vocab/user.parquet")["key"]
    assert {kinds[user] for user in users} == {"aligned", "contrary"}
    assert not of_categories(folder)
    with pytest.raises(UserError, match=r"truth\.parquet: no kinds of categories; this recipe needs"):
        usefulness_by_category(folder, manifest)
    with pytest.raises(UserError, match=r"truth\.parquet: no kinds of users; this needs data with planted sequences"):
        kinds_of_users(str(rated()))
