"""What is pre-trained on, and splits by share: nothing lost, nothing twice, nobody in two splits who must not be."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cdr_dist.data.behaviours import Behaviours
from cdr_dist.data.dataset import FIRST_ID, SEQUENCE_SCHEMA, SEQUENCES, SPLITS, Manifest, read_manifest
from cdr_dist.data.options import StreamOptions
from cdr_dist.data.prepare import PrepareOptions, prepare
from cdr_dist.data.sequences import sequence_rows
from cdr_dist.data.shards import ShardReader, verify
from cdr_dist.data.stream import Stream
from cdr_dist.production.forget import Places, forget
from tests.test_prepare import digests, keys_of, random_log, rows_of, run, write_log

SHARES: dict[str, Any] = {
    "labels": "sampled",
    "sequences": 5,
    "sequences_valid_share": 0.2,
    "sequences_test_share": 0.2,
    "valid_share": 0.2,
    "test_share": 0.2,
}


def logs(seed: int = 5) -> tuple[list[Any], list[Any]]:
    """60 users of the target among 100 of the source, who are later; some items are `i000`."""
    target = [(user, item, time + 500, rating) for user, item, time, rating in random_log(seed, 60, 300)]
    return random_log(seed + 1, 100, 1500), target


def windows(out: str) -> list[dict[str, Any]]:
    return [row | {"split": split} for split in SEQUENCES for row in rows_of(out, split)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=20), min_size=1, max_size=6),
    st.integers(2, 7),
)
def test_every_step_from_one_item_to_the_next_is_in_one_window(
    users: list[list[tuple[int, bool]]], longest: int
) -> None:
    rows = [(user, place, *of) for user, own in enumerate(users) for place, of in enumerate(own)]
    columns = np.array(rows, dtype=np.int64).reshape(-1, 4).T
    source = Behaviours(len(users), columns[0], columns[2], columns[1], columns[3].astype(np.float32))
    keys = pl.Series([f"u{n}" for n in range(len(users))]).to_arrow()
    options = PrepareOptions(source="s", target="t", out="x", sequences=longest)
    table, split = sequence_rows(keys, np.arange(len(users), dtype=np.int32), source, options)
    found: Counter[tuple[int, int, int, int]] = Counter()
    for row in table.to_pylist():
        assert 2 <= len(row["source_history_item"]) <= longest
        for place, (a, b) in enumerate(pairwise(row["source_history_item"]), row["source_history_first"]):
            found[row["user"], place, a, b] += 1
    liked = [[item for item, likes in own if likes] for own in users]
    steps = [(user, at, *pair) for user, own in enumerate(liked) for at, pair in enumerate(pairwise(own))]
    assert found == Counter(steps)
    assert len(split) == table.num_rows
    assert len(set(table["example_id"].to_pylist())) == table.num_rows


def test_users_without_examples_are_pretrained_on_and_their_items_are_known(tmp_path: Path) -> None:
    source, target = logs()
    options, manifest = run(
        tmp_path, [*source, ("nobody", "rare", 1, 1.0), ("nobody", "i000", 2, 1.0)], target, **SHARES
    )
    found, items = windows(options.out), keys_of(options.out, "source_item")
    assert ["rare", "i000"] in [[items[i] for i in row["source_history_item"]] for row in found]
    assert sum(row["user"] < FIRST_ID for row in found) > 20
    assert pq.read_schema(f"{options.out}/{manifest.shards['sequences_train'][0].path}") == SEQUENCE_SCHEMA
    # With the others' items: what is counted is what training reads, each behaviour once.
    counted = Counter(
        item
        for row in rows_of(options.out, "sequences_train")
        for item in row["source_history_item"][bool(row["source_history_first"]) :]
    )
    vocabulary = pq.read_table(f"{options.out}/vocab/source_item.parquet").to_pylist()
    assert {row["id"]: row["count"] for row in vocabulary if row["count"]} == counted


def test_a_users_windows_are_in_one_split_and_about_as_many_users_as_asked(tmp_path: Path) -> None:
    options, manifest = run(tmp_path, random_log(1, 900, 9000), random_log(2, 900, 2000), **SHARES)
    users: dict[str, set[int]] = {split: {row["user"] for row in rows_of(options.out, split)} for split in SEQUENCES}
    everyone = [user for of in users.values() for user in of if user != 1]
    assert len(everyone) == len(set(everyone))
    for split, share in zip(SEQUENCES, (0.6, 0.2, 0.2), strict=True):
        assert len(users[split]) / len(everyone) == pytest.approx(share, abs=0.05)
    ids = [row["example_id"] for row in rows_of(options.out, "sequences_train")]
    assert ids != sorted(ids)
    assert manifest.examples("sequences_train") == len(ids)


def test_nobody_is_in_two_splits_by_user_and_many_are_by_instance(tmp_path: Path) -> None:
    shared = {}
    for split in ("user", "instance"):
        options, _ = run(tmp_path / split, random_log(1, 600, 5000), random_log(2, 600, 3000), **SHARES, split=split)
        users = {part: {row["user"] for row in rows_of(options.out, part)} for part in SPLITS}
        shared[split] = len(users["train"] & users["test"]) / len(users["test"])
        rows = {part: len(rows_of(options.out, part)) for part in SPLITS}
        for part, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
            assert rows[part] / sum(rows.values()) == pytest.approx(share, abs=0.06)
    assert shared["user"] == 0
    assert shared["instance"] > 0.8


@pytest.mark.parametrize("split", ["user", "instance"])
def test_the_papers_shares_are_the_default(tmp_path: Path, split: str) -> None:
    options, _ = run(tmp_path, random_log(1, 600, 5000), random_log(2, 600, 6000), split=split)
    rows = [len(rows_of(options.out, part)) for part in SPLITS]
    np.testing.assert_allclose(np.array(rows) / sum(rows), [0.8, 0.05, 0.15], atol=0.03)


def test_a_split_stays_when_others_come(tmp_path: Path) -> None:
    source, target = logs()
    splits = []
    for number, more in enumerate(([], [("aa", "i001", 600 + n, 1.0) for n in range(9)])):
        folder = tmp_path / str(number)
        options, _ = run(folder, [*source, ("aa", "i000", 1, 1.0)], target + more, **SHARES, split="instance")
        keys = keys_of(options.out, "user")
        splits.append({(keys[r["user"]], r["timestamp"], s) for s in SPLITS for r in rows_of(options.out, s)})
    assert splits[0] == {of for of in splits[1] if of[0] != "aa"}


def test_a_share_of_the_training_examples_changes_nothing_else(tmp_path: Path) -> None:
    found = {}
    for share in (1.0, 0.5, 0.2):
        options, manifest = run(tmp_path / str(share), *logs(), **SHARES, split="instance", train_share=share)
        rows = {s: {row["example_id"]: _without_training(row) for row in rows_of(options.out, s)} for s in SPLITS}
        found[share] = rows, keys_of(options.out, "target_item"), windows(options.out)
        assert manifest.examples("train") == len(rows["train"])
    whole, few, fewer = found.values()
    assert whole[1:] == few[1:] == fewer[1:]
    for split in ("valid", "test"):
        assert whole[0][split] == few[0][split] == fewer[0][split]
    assert fewer[0]["train"].items() < few[0]["train"].items() < whole[0]["train"].items(), (
        "a smaller one is in a larger"
    )
    assert len(few[0]["train"]) / len(whole[0]["train"]) == pytest.approx(0.5, abs=0.12)


def _without_training(row: dict[str, Any]) -> dict[str, Any]:
    """Without a row's columns of its user's training examples."""
    return {name: str(v) for name, v in row.items() if not name.startswith("target_candidates") and name != "position"}


@pytest.mark.parametrize("split", ["user", "instance"])
def test_bytes_do_not_depend_on_partitions(tmp_path: Path, split: str) -> None:
    more = SHARES | {"split": split, "least_history": 3, "unknown_item": "i000"}
    made = [run(tmp_path / str(n), *logs(), partitions=n, **more)[1] for n in (1, 5)]
    assert all(made[0].shards[name] for name in SEQUENCES)
    assert digests(made[0]) == digests(made[1])


def test_without_the_option_there_are_none(tmp_path: Path) -> None:
    with_, without = (run(tmp_path / str(n), *logs(), **SHARES | {"sequences": n})[1] for n in (5, 0))
    assert [without.shards[name] for name in SEQUENCES] == [[], [], []]
    assert [with_.shards[name] for name in SPLITS] == [without.shards[name] for name in SPLITS]
    assert sorted(path.name for path in (tmp_path / "0" / "out").iterdir()) == sorted(
        ["manifest.json", "vocab", "users", *SPLITS]
    )


@pytest.mark.parametrize("least", [0, 1])
def test_examples_without_a_source_sequence_are_told(tmp_path: Path, least: int, caplog: Any) -> None:
    options, _ = run(tmp_path, random_log(1, 60, 300), random_log(2, 60, 300), sequences=4, least_history=least)
    empty = sum(not row["source_history_item"] for part in SPLITS for row in rows_of(options.out, part))
    told = [r.getMessage() for r in caplog.records if "no positive source behaviour before them" in r.getMessage()]
    assert (empty > 0) == (least == 0)
    assert [line.split(" of ")[0] for line in told] == [f"{empty:,}"] * (least == 0)


def test_a_stream_reads_them(tmp_path: Path) -> None:
    options, manifest = run(tmp_path, *logs(), **SHARES)
    reader = ShardReader(options.out, manifest, "sequences_train", ["example_id", "source_history_item"])
    stream = Stream(reader, 16, StreamOptions(), seed=8, name="pretrain")
    found = []
    for rows in stream.epoch():
        items, lengths = rows.stored.lists("source_history_item").of(np.arange(len(rows.stored)))
        lists = [part.tolist() for part in np.split(items, np.cumsum(lengths)[:-1])]
        found += zip(rows.stored["example_id"].tolist(), lists, strict=True)
    stream.close()
    wanted = [(r["example_id"], r["source_history_item"]) for r in rows_of(options.out, "sequences_train")]
    assert sorted(found) == sorted(wanted)
    assert found != wanted


def test_a_dataset_on_top_keeps_the_ids_and_counts_anew(tmp_path: Path) -> None:
    source, target = logs()
    early, _ = run(tmp_path / "a", [row for row in source if row[2] < 400], target, **SHARES)
    late, manifest = run(tmp_path / "b", source, target, **SHARES, extends=early.out)
    before, after = keys_of(early.out, "source_item"), keys_of(late.out, "source_item")
    assert before.items() <= after.items()
    alone, _ = run(tmp_path / "c", source, target, **SHARES)
    found = []
    for out in (late.out, alone.out):
        keys = keys_of(out, "source_item")
        found.append({(r["example_id"], tuple(keys[i] for i in r["source_history_item"])) for r in windows(out)})
    assert found[0] == found[1]
    verify(late.out, manifest, how="checksum")


def test_a_forgotten_persons_sequences_are_gone_with_or_without_examples(tmp_path: Path) -> None:
    source, target = logs()
    gone = [next(row[0] for row in target), "nobody"]
    source += [("nobody", f"i{n:03d}", n, 1.0) for n in range(9)]  # two windows
    options, before = run(tmp_path / "all", source, target, **SHARES, split="user")
    keys, old = keys_of(options.out, "user"), windows(options.out)
    removed = forget(gone, Places(data=[options.out]))
    theirs = [row for row in old if keys[row["user"]] == gone[0]]
    assert {one.what: one.number for one in removed}["sequences"] == len(theirs) + 2
    left = windows(options.out)
    kept = [row for row in source if row[0] not in gone], [row for row in target if row[0] not in gone]
    without, _ = run(tmp_path / "kept", *kept, **SHARES, split="user")
    assert {row["example_id"] for row in left} == {row["example_id"] for row in windows(without.out)}
    assert left == [row for row in old if row["example_id"] in {row["example_id"] for row in left}], "in their order"
    manifest: Manifest = read_manifest(options.out)
    verify(options.out, manifest, how="checksum")
    assert (
        sum(manifest.examples(name) for name in SEQUENCES)
        == len(left)
        < sum(before.examples(name) for name in SEQUENCES)
    )
    assert "nobody" not in {row["user_id"] for row in rows_of(options.out, "users")}


def test_forgetting_somebody_keeps_the_others_out_of_what_is_prepared_on_top(tmp_path: Path) -> None:
    source, target = logs()
    options, _ = run(
        tmp_path / "a", [*source, ("nobody", "i001", 1, 1.0), ("nobody", "i002", 2, 1.0)], target, **SHARES
    )
    forget(["nobody"], Places(data=[options.out]))
    again = write_log(tmp_path / "s.tsv", [*source, ("nobody", "i001", 1, 1.0), ("nobody", "i002", 2, 1.0)])
    made = PrepareOptions(
        source=again, target=f"{tmp_path}/a/t.tsv", out=f"{tmp_path}/b", extends=options.out, **SHARES
    )
    prepare(made)
    assert {row["example_id"] for row in windows(made.out)} == {row["example_id"] for row in windows(options.out)}
