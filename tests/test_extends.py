"""A dataset on top of an earlier one: no id changes, new keys come behind, and the examples are as without it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cdr_dist.data import storage
from cdr_dist.data.dataset import UNKNOWN, VOCABULARIES, read_manifest
from cdr_dist.data.item_columns import item_categories
from cdr_dist.data.keys import Keys
from cdr_dist.data.prepare import PrepareOptions, prepare
from cdr_dist.errors import UserError
from tests.prepare_oracle import expected_examples
from tests.test_prepare import keys_of, random_log, rows_of, run, write_log, written_examples

ITEMS = "item_id\tcategory\tbrand\n"


def nights(tmp_path, **options):
    """Two datasets: of the first users' logs, and of logs that some of them are in no more, on top of it."""
    first = [random_log(seed, 20, 300, items=40) for seed in (1, 2)]
    second = [[(f"u{int(u[1:]) + 8}", f"i{int(i[1:]) + 15:03d}", t, r) for u, i, t, r in log] for log in first]
    before, _ = run(tmp_path / "first", *first, **options)
    after, manifest = run(tmp_path / "second", *second, extends=before.out, **options)
    return before, after, manifest, second


def test_every_key_keeps_its_id_and_new_ones_come_behind_in_order(tmp_path):
    before, after, manifest, _ = nights(tmp_path)
    for name in VOCABULARIES:
        old, new = keys_of(before.out, name), keys_of(after.out, name)
        assert list(new.items())[: len(old)] == list(old.items())
        added = list(new.values())[len(old) :]
        assert added == sorted(added)
        assert list(new) == list(range(manifest.rows[name]))
    assert len(keys_of(after.out, "user")) > len(keys_of(before.out, "user"))
    assert len(keys_of(after.out, "target_item")) > len(keys_of(before.out, "target_item"))


def test_a_user_of_one_domain_alone_keeps_the_id_of_an_earlier_night(tmp_path):
    logs = [random_log(seed, 20, 300, items=40) for seed in (1, 2)]
    before, _ = run(tmp_path / "first", *logs)
    later = [[*logs[0], ("new", "i001", 5, 5.0)], [row for row in logs[1] if row[0] != "u3"]]
    after, manifest = run(tmp_path / "second", *later, extends=before.out)
    users = {row["user_id"]: row["user"] for row in rows_of(after.out, "users")}
    assert users["new"] == UNKNOWN
    assert keys_of(before.out, "user")[users["u3"]] == "u3"
    assert manifest.counts["cold_users"] == 2


@pytest.mark.parametrize("labels", ["rating", "sampled"])
def test_examples_are_those_of_the_same_logs_alone(tmp_path, labels):
    _, after, _, logs = nights(tmp_path, labels=labels)
    alone, _ = run(tmp_path / "alone", *logs, labels=labels)
    found, names = written_examples(after.out), ("item", "label", "split", "target_history", "source_history")
    oracle = expected_examples(*logs, after)
    assert {k: [row[n] for n in names] for k, row in found.items()} == {
        k: [row[n] for n in names] for k, row in oracle.items()
    }
    without = written_examples(alone.out)
    drawn = {"negatives"}  # among the items of both nights
    assert {k: {n: v for n, v in row.items() if n not in drawn} for k, row in found.items()} == {
        k: {n: v for n, v in row.items() if n not in drawn} for k, row in without.items()
    }


def test_an_item_keeps_what_was_said_of_it_until_something_else_is_said(tmp_path):
    source, target = random_log(1, 9, 90, items=6), random_log(2, 9, 90, items=6)
    said = {
        "first": ITEMS + "i000\tA\tx\ni001\tA\ty\ni002\tB\tx\ni003\tB\ty\ni004\tB\tx\n",
        "second": ITEMS + "i000\tZ\tz\ni001\tZ\tz\ni005\tB\tx\n",  # of 2 to 4 nothing more
    }
    outs = {}
    for night, text in said.items():
        (tmp_path / f"{night}.tsv").write_text(text)
        more = {"target_items": str(tmp_path / f"{night}.tsv"), "target_item_columns": brand()}
        options, _ = run(tmp_path / night, source, target, extends=outs.get("first", ""), **more)
        outs[night] = options.out
    assert described(outs["first"]) == {
        "i000": ("A", ["x"]), "i001": ("A", ["y"]), "i002": ("B", ["x"]), "i003": ("B", ["y"]), "i004": ("B", ["x"]),
        "i005": ("others", []),
    }  # fmt: skip
    assert described(outs["second"]) == {
        "i000": ("Z", ["z"]), "i001": ("Z", ["z"]), "i002": ("B", ["x"]), "i003": ("B", ["y"]), "i004": ("B", ["x"]),
        "i005": ("B", ["x"]),
    }  # fmt: skip
    assert list(keys_of(outs["second"], "target_brand").values())[2:] == ["x", "y", "z"]
    assert list(keys_of(outs["second"], "target_category").values())[2:] == ["A", "B", "others", "Z"]


def brand():
    from cdr_dist.data.prepare_options import ItemColumns

    return ItemColumns("", "", "brand")


def described(out):
    categories, values = keys_of(out, "target_category"), keys_of(out, "target_brand")
    rows = pq.read_table(f"{out}/vocab/target_item.parquet").to_pylist()
    return {r["key"]: (categories[r["category"]], [values[v] for v in r["brand"]]) for r in rows}


def test_the_id_of_a_key_that_is_gone_is_given_to_nobody(tmp_path):
    before, *_ = nights(tmp_path)
    last = without_users(before.out, {2, read_manifest(before.out).rows["user"] - 1})
    logs = [random_log(seed, 40, 400) for seed in (5, 6)]
    after, manifest = run(tmp_path / "third", *logs, extends=before.out)
    found = keys_of(after.out, "user")
    assert 2 not in found
    assert last not in found
    assert max(found) == manifest.rows["user"] - 1
    assert "u0" in found.values(), "it is a user of the new logs, under a new id"
    keys = Keys(after.out, manifest, "user")
    assert len(keys) == len(found) - 2
    assert keys.id_of("u0") == next(i for i, key in found.items() if key == "u0") > last
    assert keys.of([0, 1, 3])[2].as_py() == found[3]
    assert keys.near("u1zzz") == ["u19", "u2", "u20"]
    assert len(item_categories(after.out, manifest, "target")) == manifest.rows["target_item"]


def without_users(out, ids):
    """Takes keys out of a dataset's users, as jobs/forget.py does. The largest id."""
    manifest = read_manifest(out)
    path = Path(out, manifest.vocab["user"].path)
    table = pq.read_table(path)
    pq.write_table(table.filter(pa.array([i not in ids for i in table["id"].to_pylist()])), path)
    content = path.read_bytes()
    shard = dataclasses.replace(manifest.vocab["user"], bytes=len(content), sha256=storage.sha256(content))
    edited = dataclasses.replace(manifest, vocab=manifest.vocab | {"user": shard})
    Path(out, "manifest.json").write_text(edited.to_json())
    return manifest.rows["user"] - 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"source_domain": "films"}, "sources: s there, films here"),
        ({"extends": "nowhere"}, "nowhere: not a dataset"),
    ],
)
def test_another_dataset_is_refused(tmp_path, more, message):
    before, *_, logs = nights(tmp_path)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "other", *logs, **({"extends": before.out} | more))


def test_another_target_has_ids_of_its_own_and_users_and_source_keep_theirs(tmp_path, caplog):
    caplog.set_level("INFO", "cdr_dist")
    before, *_, (source, target) = nights(tmp_path)
    films = [(user, f"f{item[1:]}", time, rating) for user, item, time, rating in target]
    after, manifest = run(tmp_path / "films", source, films, extends=before.out, target_domain="films")
    alone, _ = run(tmp_path / "alone", source, films, target_domain="films")
    assert "its target is t, so the ids of films are new" in caplog.text
    for name in VOCABULARIES:
        old, new = keys_of(before.out, name), keys_of(after.out, name)
        if name.startswith("target"):
            assert new == keys_of(alone.out, name)
            assert manifest.rows[name] == len(new)
        else:
            assert new.items() > old.items() or new == old


def test_a_dataset_of_declared_columns_is_refused_by_one_without(tmp_path):
    before, *_, logs = nights(tmp_path)
    (tmp_path / "items.tsv").write_text(ITEMS)
    with pytest.raises(UserError, match="target features: none there, brand here"):
        run(
            tmp_path / "x",
            *logs,
            extends=before.out,
            target_items=str(tmp_path / "items.tsv"),
            target_item_columns=brand(),
        )


def test_logs_by_day_are_one_log(tmp_path, caplog):
    logs = [random_log(seed, 9, 120, span=3) for seed in (1, 2)]
    days = ["2026-02-27", "2026-02-28", "2026-03-01", "2026-03-02"]
    for domain, log in zip("st", logs, strict=True):
        for number, day in enumerate(days):
            if number != 1:
                (tmp_path / domain / day).mkdir(parents=True)
                of_day = [r for r in log if r[2] == (number - 1 if number else 0)]
                write_log(tmp_path / domain / day / "part.tsv", of_day)
    named = {"source": f"{tmp_path}/s/{{date}}", "target": f"{tmp_path}/t/{{date}}/"}
    by_day = PrepareOptions(**named, out=f"{tmp_path}/out", days="2026-02-27..2026-03-01")
    manifest = prepare(by_day)
    assert (manifest.source_domain, manifest.target_domain) == ("s", "t")
    assert "1 of 3 days are missing: 2026-02-28" in caplog.text
    first_days = [[r for r in log if r[2] < 2] for log in logs]
    at_once, _ = run(tmp_path / "once", *first_days)
    assert written_examples(by_day.out) == written_examples(at_once.out)
    with pytest.raises(UserError, match="not found, of no day from 2025-01-01 to 2025-01-02"):
        prepare(dataclasses.replace(by_day, days="2025-01-01..2025-01-02", out=f"{tmp_path}/no"))


def test_since_and_until_are_as_shorter_logs(tmp_path):
    logs = [random_log(seed, 15, 300) for seed in (1, 2)]
    cut, _ = run(tmp_path / "cut", *logs, since=200, until=800)
    short, _ = run(tmp_path / "short", *([r for r in log if 200 <= r[2] < 800] for log in logs))
    assert written_examples(cut.out) == written_examples(short.out)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"days": "2026-11-01..2026-11-02"}, r"days= and \{date\} in source= or target= belong together"),
        ({"source": "x/{date}"}, r"days= and \{date\} in source= or target= belong together"),
        ({"source": "x/{date}", "days": "2026-11-02..2026-11-01"}, "ends before it begins"),
        ({"source": "x/{date}", "days": "2026-11-02"}, r"write FROM\.\.TO"),
        ({"source": "x/{date}", "days": "yesterday..today"}, r"write FROM\.\.TO"),
        ({"since": 5, "until": 5}, "since=5 must be before until=5"),
    ],
)
def test_days_that_are_none(words, message):
    with pytest.raises(UserError, match=message):
        PrepareOptions(**({"source": "s", "target": "t", "out": "o"} | words))
