"""Recommendations against every score computed one pair at a time, and what a person who asks for them meets."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cdr_dist.configuration import to_yaml
from cdr_dist.data.dataset import FIRST_ID, read_manifest
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.synthetic import planted_logs
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.production import candidates as candidates_module
from cdr_dist.production import recommend as module
from cdr_dist.production.candidates import CoVisited, Embeddings
from cdr_dist.production.recommendation_job import (
    DONE,
    recommend,
    recommendation_job,
    recommendation_worker,
    told,
)
from cdr_dist.production.recommendation_options import RecommendOptions
from cdr_dist.training import full_ranking
from cdr_dist.training.best import best_of_run
from cdr_dist.training.checkpoint import best_step
from cdr_dist.training.launch import alone
from cdr_dist.training.run_folder import RunFolder
from tests import datasets
from tests.datasets import scratch
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import train, words

SOURCE_ONLY, TARGET_ONLY = [f"u{n:06d}" for n in range(20)], [f"u{n:06d}" for n in range(20, 30)]


def dataset(labels="rating"):
    """Of some users one log alone, and of one of them nothing that anybody else has had to do with."""
    return _dataset(labels)


@functools.cache
def _dataset(labels):
    folder, logs = scratch() / f"cold-{labels}", planted_logs(datasets.SHAPE)
    folder.mkdir()
    logs.source.filter(~pl.col("user_id").is_in(TARGET_ONLY)).with_columns(
        item_id=pl.when(pl.col("user_id") == "u000003").then(pl.lit("nobody's")).otherwise("item_id")
    ).write_csv(folder / "source.csv")
    logs.target.filter(~pl.col("user_id").is_in(SOURCE_ONLY)).write_csv(folder / "target.csv")
    source, target = str(folder / "source.csv"), str(folder / "target.csv")
    prepare(PrepareOptions(source=source, target=target, out=str(folder / "data"), labels=labels))
    return folder / "data"


def run(recipe="joint", labels="rating", *more):
    """A finished run; of large steps, so that its scores are far apart."""
    return _run(recipe, labels, *more)


@functools.cache
def _run(recipe, labels, *more):
    out = scratch() / f"recommend-{recipe}-{labels}-{len(more)}"
    given = words(dataset(labels), out, f"recipe={recipe}", "tables.lr=0.1", "dense.lr=0.01", *more)
    train([word for word in given if "upper." not in word])
    return out


def key_of(name, labels="rating"):
    table = pl.read_parquet(dataset(labels) / "vocab" / f"{name}.parquet")
    return dict(table.select("id", "key").iter_rows())


def rows_of(out):
    return {row["user_id"]: row for row in pl.read_parquet(Path(out) / "part-*.parquet").iter_rows(named=True)}


def scores_of_everything(folder, data):
    """User -> the logits of all item ids with the latest source behaviour, one forward pass a user."""
    place, found = RunFolder(str(folder)), {}
    manifest = read_manifest(str(data))
    category = dict(pl.read_parquet(data / "vocab" / "source_item.parquet").select("id", "category").iter_rows())
    category |= {0: 0, 1: 1}
    items = np.arange(FIRST_ID, manifest.rows["target_item"])
    with alone(), best_of_run(place.config(), str(data), place, best_step(place)) as session, torch.no_grad():
        session.model.eval()
        asked = session.builder.target_items(items)
        tables = {f: session.features[f] for f in ("target_item", "target_category")}
        of_items = rows_by_feature(session.tables.read(ids_by_table(asked, tables)), asked, tables)
        weights = {name: shard for name, (_, shard) in session.tables.shards().items()}
        for row in datasets.rows_of(data, "users").iter_rows(named=True):
            latest = (row["source_candidates_item"] or [0])[-1]
            own = {"user": row["user"], "source_item": latest, "source_category": category[latest]}
            many = {
                f: of_items[f] if f in of_items else weights[table][own[f]].expand(len(items), -1)
                for f, table in session.features.items()
            }
            logits = np.full(manifest.rows["target_item"], -np.inf)
            logits[FIRST_ID:] = session.model(many, None).target_logit.numpy()
            found[row["user_id"]] = logits
    return found


def expected(scores, options, recipe="joint", labels="rating", listed=None):
    """User -> (by, item keys, scores), by sorting everything."""
    data, key, found = dataset(labels), key_of("target_item", labels), {}
    train_rows = pl.read_parquet(data / "train" / "*.parquet")
    trained, known = set(train_rows["item"].to_list()), set(train_rows["user"].to_list())
    likes = dict(train_rows.group_by("item").agg(pl.col("label").sum()).iter_rows())
    category = dict(pl.read_parquet(data / "vocab" / "target_item.parquet").select("id", "category").iter_rows())
    for row in datasets.rows_of(data, "users").iter_rows(named=True):
        reads = recipe != "target_only" and any(i >= FIRST_ID for i in row["source_candidates_item"])
        by = "model" if row["user"] in known or reads else "popularity"
        of = scores[row["user_id"]] if by == "model" else [likes.get(i, 0.0) for i in range(max(key) + 1)]
        barred = set(row["seen_item"]) if options.seen == "drop" else set()
        may = [i for i in key if i not in barred and (i in trained or options.new_items)]
        may = [i for i in may if listed is None or key[i] in listed]
        chosen, counts = [], {}
        for item in sorted(may, key=lambda i: (-of[i], i)):
            counts[category[item]] = counts.get(category[item], 0) + 1
            if len(chosen) < options.top and (
                not options.per_category or counts[category[item]] <= options.per_category
            ):
                chosen.append(item)
        found[row["user_id"]] = by, [key[i] for i in chosen], [float(of[i]) for i in chosen]
    return found


def check(out, wanted):
    found = rows_of(out)
    assert set(found) == set(wanted)
    for user, (by, items, scores) in wanted.items():
        assert found[user]["by"] == by, user
        assert found[user]["item_id"] == items, user
        shown = 1 / (1 + np.exp(-np.array(scores))) if by == "model" else scores
        np.testing.assert_allclose(found[user]["score"], shown, rtol=1e-4)
    return found


@functools.cache
def scores(recipe, labels):
    return scores_of_everything(run(recipe, labels), dataset(labels))


@pytest.mark.parametrize(
    ("recipe", "labels", "more"),
    [
        ("joint", "rating", {}),
        ("joint", "rating", {"per_category": 2, "top": 12, "new_items": True}),
        ("joint", "sampled", {"seen": "keep", "top": 5}),
        ("target_only", "sampled", {"per_category": 1, "top": 30}),
    ],
)
def test_they_are_the_best_of_all_scores(tmp_path, recipe, labels, more):
    options = RecommendOptions(run=str(run(recipe, labels)), out=str(tmp_path / "out"), workers=0, **more)
    with replaced(full_ranking, "LOOKED_UP", 33), replaced(module, "COLUMNS", 7), replaced(module, "HELD_USERS", 1):
        done = recommend(options)
    wanted = expected(scores(recipe, labels), options, recipe, labels)
    found = check(tmp_path / "out", wanted)
    assert {found[user]["by"] for user in SOURCE_ONLY if user != "u000003"} == {
        "popularity" if recipe == "target_only" else "model"
    }
    assert found["u000003"]["by"] == "popularity"
    assert done["users"] == len(wanted) == datasets.USERS
    assert done["by"] == {by: sum(w[0] == by for w in wanted.values()) for by in ("model", "popularity")}
    assert done["users_with_fewer"] == sum(len(w[1]) < options.top for w in wanted.values())
    assert done["coverage"] == pytest.approx(len({i for w in wanted.values() for i in w[1]}) / done["items"], abs=1e-6)
    assert sum(part["rows"] for part in done["parts"]) == len(wanted)


def test_lists_of_users_and_items_are_kept_to(tmp_path, capsys):
    key = sorted(key_of("target_item").values())
    listed = key[::3]
    (tmp_path / "items.txt").write_text("\n".join([*listed, "no such item"]))
    asked = [*SOURCE_ONLY[:4], "u000100", "nobody"]
    pl.DataFrame({"user_id": asked}).write_parquet(tmp_path / "users.parquet")
    options = RecommendOptions(
        run=str(run()),
        out=str(tmp_path / "out"),
        workers=0,
        items=str(tmp_path / "items.txt"),
        users=str(tmp_path / "users.parquet"),
    )
    done = recommend(options)
    wanted = expected(scores("joint", "rating"), options, listed=set(listed))
    check(tmp_path / "out", {user: wanted[user] for user in asked if user != "nobody"})
    assert done["users_not_found"] == 1
    assert "1 of " in capsys.readouterr().err
    assert "1 of the users asked for are not in the dataset" in told(done, "out")


def parts(rank, given):
    recommendation_worker(given)


@pytest.mark.parametrize("more", [{}, {"candidates": "40"}])
def test_no_number_of_workers_changes_a_byte(tmp_path, more):
    place = RunFolder(str(run()))
    contents = []
    for workers in (1, 2) if more else (1, 2, 3):
        out = tmp_path / str(workers)
        options = RecommendOptions(run=place.uri, out=str(out), **more)
        given = {
            "config": to_yaml(place.config()),
            "folder": str(dataset()),
            "run": place.uri,
            "options": dataclasses.asdict(options),
            "users": None,
            "items": None,
        }
        on_workers(workers, parts, given)
        contents.append([path.read_bytes() for path in sorted(out.glob("part-*"))])
        assert len(contents[-1]) == 8
    assert all(content == contents[0] for content in contents)


def test_of_candidates_the_best_are_chosen_and_what_is_lost_is_said(tmp_path):
    whole, few = (
        RecommendOptions(run=str(run()), out=str(tmp_path / n), workers=0, candidates=n) for n in ("all", "30")
    )
    recommend(whole)
    done = recommend(few)
    exact, found = rows_of(whole.out), rows_of(few.out)
    kept = [len({*exact[u]["item_id"]} & {*row["item_id"]}) / 20 for u, row in found.items() if row["by"] == "model"]
    assert done["recall"]["candidates"] == 30
    assert 0.5 < np.mean(kept) < 1
    assert done["recall"]["recall"] == pytest.approx(np.mean(kept), abs=0.05)
    assert done["recall"]["embeddings"] <= done["recall"]["recall"]
    assert "30 candidates a user hold" in told(done, "out")
    better = [
        all(a >= b for a, b in zip(exact[u]["score"], row["score"], strict=True))
        for u, row in found.items()
        if row["by"] == "model" and len(row["score"]) == 20
    ]
    assert all(better)


class Products:
    """Scores that are inner products of few values, as those of matrix factorisation."""

    def logits(self, rows, items):
        return (rows * items).sum(-1)


def test_approximate_scores_of_few_dimensions_find_the_best_items(monkeypatch):
    random = torch.Generator().manual_seed(3)
    users, items, ids = (
        torch.randn(150, 10, generator=random),
        torch.randn(900, 10, generator=random),
        np.arange(900) + 2,
    )
    monkeypatch.setattr(candidates_module, "item_parts", lambda _s, _p, asked: iter([items[asked - 2]]))
    config = type("C", (), {"seed": 8, "trainer": type("T", (), {"threads": 1})()})()
    for limit in (50_000, 100):  # looking at all, and through cells
        monkeypatch.setattr(candidates_module, "EXACT_UP_TO", limit)
        monkeypatch.setattr(candidates_module, "LOOKED_AT", 1.0)
        of_some = users[:40] @ items.t()
        found = Embeddings(type("S", (), {"config": config})(), Products(), ids, of_some)(users[40:], 50)
        best = (users[40:] @ items.t()).topk(50).indices.numpy() + 2
        assert np.mean([len({*a} & {*b}) / 50 for a, b in zip(found.tolist(), best.tolist(), strict=True)]) > 0.99


def test_co_visited_items_are_those_of_the_users_of_a_users_items():
    data, manifest = dataset(), read_manifest(str(dataset()))
    rows = list(datasets.rows_of(data, "users").iter_rows(named=True))
    first = manifest.rows["target_item"]
    allowed = np.ones(first, dtype=bool)
    allowed[::5] = False
    sets = []
    for row in rows:
        latest = {i for i in row["target_history_item"][-10:] if i >= 2}
        sets.append(latest | {i + first for i in row["source_history_item"][-10:] if i >= 2})
    users = {}
    for own in sets:
        for item in own:
            users[item] = users.get(item, 0) + 1
    both = {}
    for own in sets:
        for a in own:
            for b in own:
                if a != b and b < first and allowed[b]:
                    both.setdefault(a, {}).setdefault(b, 0)
                    both[a][b] += 1
    near = {}
    for a, of in both.items():
        scored = sorted(((n / np.sqrt(users[a] * users[b]), b) for b, n in of.items()), key=lambda x: (-x[0], x[1]))
        near[a] = scored[:20]
    place, covisited = RunFolder(str(run())), CoVisited(str(data), manifest, allowed)
    with alone(), best_of_run(place.config(), str(data), place, best_step(place)) as session:
        stored = [r.stored for r in module.evaluation_rows(session, "users", more=["user_id", *module.HISTORIES])]
    checked = 0
    for some in stored:
        found = covisited(some, 12)
        for user, items in zip(some.texts("user_id").to_pylist(), found.tolist(), strict=True):
            own = sets[next(i for i, row in enumerate(rows) if row["user_id"] == user)]
            total = {}
            for a in own:
                for score, b in near.get(a, ()):
                    total[b] = total.get(b, 0.0) + score
            best = sorted(total, key=lambda b: (-round(total[b], 9), b))[:12]
            real = [i for i in items if i]
            assert sorted(round(total[i], 6) for i in real) == sorted(round(total[i], 6) for i in best)
            checked += len(best) > 0
    assert checked > 250


def test_a_backbone_that_reads_histories_knows_users_by_them(tmp_path):
    folder = run("joint", "rating", "model=minet")
    done = recommend(RecommendOptions(run=str(folder), out=str(tmp_path / "out"), workers=0, top=5))
    found = rows_of(tmp_path / "out")
    rows = {row["user_id"]: row for row in datasets.rows_of(dataset(), "users").iter_rows(named=True)}
    likes = [user for user in TARGET_ONLY if any(i >= FIRST_ID for i in rows[user]["target_history_item"])]
    assert len(likes) > 5
    assert {found[user]["by"] for user in likes} == {"model"}
    assert done["by"]["popularity"] == 1 + len(TARGET_ONLY) - len(likes)


def test_the_same_again_does_nothing_and_something_else_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    asked = [f"run={run()}", f"out={out}", "workers=0", "top=3"]
    recommendation_job(asked, only_check=True)
    assert capsys.readouterr().out.startswith("ok: joint of ")
    assert not out.exists()
    recommendation_job(asked)
    first = capsys.readouterr().out
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert sorted(before) == [*[f"part-{n:05d}.parquet" for n in range(8)], DONE]
    recommendation_job(asked)
    assert capsys.readouterr().out == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match=r"holds other recommendations \(top 3, now 4\); choose another out="):
        recommendation_job([*asked[:3], "top=4"])
    recommendation_job(asked, only_check=True)
    assert capsys.readouterr().out == f"{out}: done already\n"


def test_what_a_killed_job_left_is_begun_anew(tmp_path):
    out = tmp_path / "out"
    asked = RecommendOptions(run=str(run()), out=str(out), workers=0, top=3)
    done = recommend(asked)
    contents = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / DONE).unlink()
    (out / "started.json").write_text(json.dumps(done["asked"]))
    (out / "part-00003.parquet").write_bytes(b"half")
    (out / ".part-00004.parquet.0a1b.part").write_bytes(b"half")
    assert recommend(asked) == done
    assert {path.name: path.read_bytes() for path in out.iterdir()} == contents


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["top=0"], "top=0: must be 1 or more"),
        (["candidates=few"], "candidates=few: all, auto or a number of 1 or more"),
        (["candidates=10", "top=20"], "candidates=10: fewer than top=20"),
        (["seen=hide"], "seen=hide: "),
        (["tops=3"], "tops: unknown option; did you mean"),
        (["run=nowhere"], "nowhere: not a run"),
        (["workers=9"], "workers=9: more than stream.lanes=8"),
        (["items=none.txt"], "none.txt: not found"),
        (["users=empty.txt"], "users=empty.txt: holds no keys"),
        (["items=wrong.txt"], "items=wrong.txt: none of the 2 keys is a target item of "),
        (["users=wrong.parquet"], "users=wrong.parquet: no Parquet file with a column user_id"),
        (["out=full"], "full: holds something that is not recommendations; choose another out="),
        (["data=other"], "other: not a dataset"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_written(tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("wrong.txt").write_text("one\ntwo\n")
    pl.DataFrame({"user": ["u"]}).write_parquet("wrong.parquet")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("x")
    given = {"run": str(run()), "out": "out", "workers": "0"} | dict(word.split("=", 1) for word in more)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        recommendation_job([f"{name}={value}" for name, value in given.items()])
    assert "\n" not in str(caught.value)
    assert not Path("out").exists()
    assert [path.name for path in Path("full").iterdir()] == ["thesis.txt"]
