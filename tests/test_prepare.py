"""Prepare: splits, histories, candidates, negatives, the shuffle, and the same bytes however the work is cut."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cdr_dist.data import examples, partitions, shuffle
from cdr_dist.data.counts import counts_table
from cdr_dist.data.dataset import EXAMPLE_SCHEMA, FOLDERS, SPLITS, Manifest, read_manifest
from cdr_dist.data.prepare import PrepareOptions, options_from_words, prepare
from cdr_dist.errors import UserError
from tests.prepare_oracle import Row, expected_examples, expected_sequences, expected_users

SHARED = Path(os.environ.get("CDR_SHARED", Path(__file__).parents[1] / ".." / "shared"))
AMAZON = SHARED / "data" / "amazon14"


def write_log(path: Path, rows: list[Row], separator: str = "\t", **more: list[str | None]) -> str:
    columns = dict(zip(("user_id", "item_id", "timestamp", "rating"), zip(*rows, strict=True), strict=True)) | more
    frame = pl.DataFrame(columns, strict=False)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        text = frame.write_csv(separator=separator).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def random_log(seed: int, users: int, rows: int, items: int = 60, span: int = 1000) -> list[Row]:
    rng = np.random.default_rng(seed)
    draws = zip(*(rng.integers(0, n, rows) for n in (users, items, span, 5)), strict=True)
    return [(f"u{u}", f"i{i:03d}", int(t), float(r + 1)) for u, i, t, r in draws]


def run(folder: Path, source: list[Row], target: list[Row], **options: Any) -> tuple[PrepareOptions, Manifest]:
    folder.mkdir(parents=True, exist_ok=True)
    logs = {"source": write_log(folder / "s.tsv", source), "target": write_log(folder / "t.tsv", target)}
    made = PrepareOptions(**logs, **({"out": str(folder / "out")} | options))
    return made, prepare(made)


def rows_of(out: str, split: str) -> list[dict[str, Any]]:
    parts = sorted(Path(out, split).glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def keys_of(out: str, name: str) -> dict[int, str]:
    table = pq.read_table(f"{out}/vocab/{name}.parquet")
    return {0: "<padding>", 1: "<unknown>"} | dict(zip(table["id"].to_pylist(), table["key"].to_pylist(), strict=True))


def digests(manifest: Manifest) -> list[str]:
    return [s.sha256 for of in FOLDERS for s in manifest.shards[of]] + [s.sha256 for s in manifest.vocab.values()]


def written_examples(out: str) -> dict[tuple[str, int], dict[str, Any]]:
    """As the oracle's: found by user and by the order of example_id within the user."""
    user, item, source_item = (keys_of(out, name) for name in ("user", "target_item", "source_item"))
    rows = sorted((row | {"split": s} for s in SPLITS for row in rows_of(out, s)), key=lambda r: r["example_id"])
    assert len({row["example_id"] for row in rows}) == len(rows)
    seen: Counter[str] = Counter()
    found = {}
    for row in rows:
        name = user[row["user"]]
        found[name, seen[name]] = {
            "split": row["split"],
            "item": item[row["item"]],
            "label": row["label"],
            "timestamp": row["timestamp"],
            "target_history": [item[i] for i in row["target_history_item"]],
            "source_history": [source_item[i] for i in row["source_history_item"]],
            "source_candidates": [
                (source_item[i], label, t, before)
                for i, label, t, before in zip(
                    *(row[f"source_candidates_{of}"] for of in ("item", "label", "timestamp", "before")), strict=True
                )
            ],
            "source_history_first": row["source_history_first"],
            "target_candidates": [
                (item[i], label)
                for i, label in zip(row["target_candidates_item"], row["target_candidates_label"], strict=True)
            ],
            "position": row["position"],
        }
        seen[name] += 1
    return found


def written_users(out: str) -> dict[str, dict[str, Any]]:
    user, item, source_item = (keys_of(out, name) for name in ("user", "target_item", "source_item"))
    rows = rows_of(out, "users")
    assert len({row["example_id"] for row in rows}) == len(rows)
    return {
        row["user_id"]: {
            "user": user[row["user"]],
            "target_history": [item[i] for i in row["target_history_item"]],
            "source_history": [source_item[i] for i in row["source_history_item"]],
            "source_history_first": row["source_history_first"],
            "source_candidates": [
                (source_item[i], label, before)
                for i, label, before in zip(
                    *(row[f"source_candidates_{of}"] for of in ("item", "label", "before")), strict=True
                )
            ],
            "seen": {item[i] for i in row["seen_item"]},
        }
        for row in rows
    }


def written_sequences(out: str, manifest: Manifest) -> dict[tuple[str, str], list[list[str]]]:
    """As the oracle's."""
    user, item = keys_of(out, "user"), keys_of(out, "source_item")
    found: dict[tuple[str, str], list[list[str]]] = {}
    ids: list[int] = []
    for split in SPLITS:
        rows = [
            row for s in manifest.shards[f"sequences_{split}"] for row in pq.read_table(f"{out}/{s.path}").to_pylist()
        ]
        ids += [row["example_id"] for row in rows]
        for row in rows:
            items = [item[i] for i in row["source_history_item"]]
            found.setdefault((user[row["user"]], split), []).append(items)
    assert len(set(ids)) == len(ids)
    assert min(ids, default=0) >= 0
    return {of: sorted(windows) for of, windows in found.items()}


logs = st.lists(
    st.tuples(
        st.sampled_from(["0012", "7806397051", "é", "a", "b"]),
        st.sampled_from(["10", "9", "x", "y", "z", "w"]),
        st.integers(0, 12),
        st.sampled_from([1.0, 3.0, 3.5, 5.0]),
    ),
    max_size=40,
)
SURE = [("a", "x", 3, 5.0), ("a", "y", 1, 4.0), ("a", "z", 9, 5.0)]  # so that no split is empty, and
SURE += [(user, f"{user}'s", 0, 1.0) for user in "pq"]  # nobody has all items
EARLY = [(user, "x", -1, 5.0) for user in "aappqq"]  # of the source, so that they have histories


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    source=logs,
    target=logs,
    labels=st.sampled_from(["rating", "sampled"]),
    split=st.sampled_from(["leave_last", "time", "instance", "user"]),
    users=st.sampled_from(["both", "target"]),
    history=st.sampled_from(["past", "train"]),
    history_length=st.sampled_from([1, 3, 50]),
    partitions=st.sampled_from([1, 3]),
    cold_users=st.booleans(),
    least_history=st.sampled_from([0, 1, 2]),
    unknown_item=st.sampled_from(["", "w"]),
    sequences=st.sampled_from([0, 2, 3, 50]),
)
def test_examples_and_users_equal_the_oracles(
    tmp_path_factory: pytest.TempPathFactory, source: list[Row], target: list[Row], **choices: Any
) -> None:
    folder = tmp_path_factory.mktemp("log")
    source, target = EARLY + source + SURE, target + SURE
    choices |= {"cold_users": choices["cold_users"] or choices["sequences"] > 0, "valid_share": 0.3, "test_share": 0.3}
    times = {"valid_from": 5, "test_from": 8} if choices["split"] == "time" else {}
    with pytest.MonkeyPatch.context() as patch:  # tables of a few rows, so that their seams are met
        patch.setattr(examples, "CHUNK_BYTES", 500)
        patch.setattr(partitions, "SPILL_ROWS", 1)
        options = PrepareOptions(source="s", target="t", out=str(folder / "out"), **choices, **times)
        expected = expected_examples(source, target, options)
        lacks = {"train", "valid", "test"} - {example["split"] for example in expected.values()}
        if lacks and options.split in ("instance", "user"):
            with pytest.raises(UserError, match=f"^split={options.split}: of {len(expected)} examples none is "):
                run(folder, source, target, **choices)
            return
        options, manifest = run(folder, source, target, **choices, **times)
    positives = {at: example.pop("positives") for at, example in expected.items()}
    assert positives
    assert written_examples(options.out) == expected
    users = expected_users(source, target, options)
    assert written_users(options.out) == users
    assert manifest.counts["cold_users"] == sum(of["user"] == "<unknown>" for of in users.values())
    assert manifest.counts["users"] == len({user for user, _ in expected})
    whose = {r[0] for r in source} if options.users == "both" else {r[0] for r in target}
    known = [r for r in target if r[0] in whose and r[1] != options.unknown]
    assert manifest.counts["short_targets"] == len(known) - len(expected)
    assert manifest.counts["unknown_targets"] == sum(r[0] in whose and r[1] == options.unknown for r in target)
    assert written_sequences(options.out, manifest) == expected_sequences(source, target, options)
    assert [manifest.examples(s) for s in SPLITS] == [sum(e["split"] == s for e in expected.values()) for s in SPLITS]


def test_ties_in_time_keep_the_order_of_the_log(tmp_path: Path) -> None:
    target = [("u", item, 7, 5.0) for item in "dcab"]
    options, _ = run(tmp_path, [("u", "s", 7, 5.0)], target)
    found = written_examples(options.out)
    assert [found["u", n]["item"] for n in range(4)] == list("dcab")
    assert found["u", 3]["target_history"] == ["d", "c", "a"]
    assert found["u", 3]["source_history"] == []  # the same time is not strictly earlier


def test_duplicated_behaviours_are_kept(tmp_path: Path) -> None:
    options, manifest = run(tmp_path, [("u", "s", 1, 5.0)] * 2, [("u", "i", 5, 5.0)] * 4)
    assert manifest.counts["source_behaviours"] == 2
    assert manifest.examples("train") == 2
    assert written_examples(options.out)["u", 3]["target_history"] == ["i"] * 3


def test_vocabularies_are_sorted_by_bytes_from_two_and_keep_text(tmp_path: Path) -> None:
    target = [("0012", item, n, 5.0) for n, item in enumerate(["10", "9", "é", "Z", "a"])]
    options, manifest = run(tmp_path, [("0012", "s", 0, 5.0)], target)
    assert keys_of(options.out, "user") == {0: "<padding>", 1: "<unknown>", 2: "0012"}
    assert list(keys_of(options.out, "target_item").values())[2:] == ["10", "9", "Z", "a", "é"]
    assert manifest.rows["target_item"] == 7
    assert manifest.counts["target_items"] == 5


@pytest.mark.parametrize("given", ["item file", "log", "neither"])
def test_category_comes_from_the_item_file_else_the_log_else_others(tmp_path: Path, given: str) -> None:
    items, times = ["a", "b", "c"], [1, 2, 3]
    log = [("u", i, t, 5.0) for i, t in zip(items, times, strict=True)]
    more = {"category": ["log a", None, "log c"]} if given != "neither" else {}
    options: dict[str, Any] = {}
    if given == "item file":
        (tmp_path / "items.csv").write_text('item_id,category,title\na,"file, a",x\na,second,x\nc,,x\nunsold,never,x\n')
        options["target_items"] = str(tmp_path / "items.csv")
    logs = {"source": write_log(tmp_path / "s.tsv", log), "target": write_log(tmp_path / "t.tsv", log, **more)}
    out = str(tmp_path / "out")
    prepare(PrepareOptions(**logs, out=out, **options))
    kinds = keys_of(out, "target_category")
    vocabulary = pq.read_table(f"{out}/vocab/target_item.parquet").to_pylist()
    found = {row["key"]: kinds[row["category"]] for row in vocabulary}
    assert (
        found
        == {
            "item file": {"a": "file, a", "b": "others", "c": "others"},
            "log": {"a": "log a", "b": "others", "c": "log c"},
            "neither": dict.fromkeys(items, "others"),
        }[given]
    )
    assert "never" not in kinds.values()
    (test_row,) = rows_of(out, "test")
    assert kinds[test_row["category"]] == found["c"]
    assert [kinds[k] for k in test_row["target_history_category"]] == [found["a"], found["b"]]
    assert [kinds[k] for k in test_row["target_candidates_category"]] == [found["a"]]


def test_vocabulary_of_training_makes_the_rest_unknown_and_says_how_much(tmp_path: Path) -> None:
    source = [("a", "early", 1, 5.0), ("a", "late", 9, 5.0), ("b", "early", 50, 5.0)]
    target = [("a", item, time, 5.0) for item, time in (("x", 1), ("x", 4), ("new", 5))] + [("b", "newer", 20, 5.0)]
    times = {"split": "time", "valid_from": 4, "test_from": 5}
    options, manifest = run(tmp_path, source, target, vocab="train", **times)
    assert list(keys_of(options.out, "target_item").values())[2:] == ["x"]
    assert list(keys_of(options.out, "source_item").values())[2:] == ["early"]
    assert list(keys_of(options.out, "user").values())[2:] == ["a"]
    assert {(r["user"], r["item"], r["category"]) for r in rows_of(options.out, "test")} == {(2, 1, 1), (1, 1, 1)}
    assert manifest.unknown == {"train": 0.0, "valid": 0.0, "test": 1.0, "source_history": 1 / 3, "sequences": 0.0}
    assert manifest.unseen == {"valid": {"user": 0.0, "item": 0.0}, "test": {"user": 0.5, "item": 1.0}}
    _, whole = run(tmp_path / "all", source, target, vocab="all", **times)
    assert set(whole.unknown.values()) == {0.0}
    assert whole.unseen == manifest.unseen


def test_candidates_are_a_seeded_sample_in_time_order(tmp_path: Path) -> None:
    source = [("u", f"s{n:03d}", n, 5.0) for n in range(400)] + [("v", "s000", 1, 5.0)]
    target = [(user, f"t{n}", 300 + n, 5.0) for user in "uv" for n in range(4)]
    drawn = {}
    for seed in range(30):
        options, _ = run(tmp_path / str(seed), source, target, seed=seed, candidates=20)
        found = {e["timestamp"]: e for e in rows_of(options.out, "train") if e["user"] == 2}
        assert len({tuple(e["source_candidates_item"]) for e in found.values()}) == 1  # one sample for a user
        drawn[seed] = found[300]["source_candidates_timestamp"]
        assert drawn[seed] == sorted(set(drawn[seed]))
        assert len(drawn[seed]) == 20
        assert max(drawn[seed]) < 302  # the validation behaviour's time
    assert len({tuple(d) for d in drawn.values()}) == 30
    middle = np.mean([t for d in drawn.values() for t in d])
    assert abs(middle - 150.5) < 5 * 87 / np.sqrt(600)  # uniform over 0..301, five standard errors


@pytest.mark.parametrize("count", [1, 7, 30])
def test_negatives_are_uniform_distinct_and_never_a_positive(tmp_path: Path, count: int) -> None:
    target = random_log(1, 150, 1500)
    options, manifest = run(tmp_path, random_log(2, 150, 600), target, labels="sampled", eval_negatives=count)
    assert manifest.eval_negatives == count
    positives: dict[str, set[str]] = {}
    for user, item, _, _ in target:
        positives.setdefault(user, set()).add(item)
    users, items = keys_of(options.out, "user"), keys_of(options.out, "target_item")
    drawn: Counter[str] = Counter()
    for row in rows_of(options.out, "valid") + rows_of(options.out, "test"):
        negatives = [items[i] for i in row["negatives_item"]]
        assert len(set(negatives)) == count
        assert not set(negatives) & positives[users[row["user"]]]
        drawn.update(negatives)
    assert len(drawn) == 60
    assert max(drawn.values()) < 5 * min(drawn.values()) + 20
    assert all(row["negatives_item"] == [] for row in rows_of(options.out, "train"))


def test_shuffle_is_global_and_a_function_of_the_seed(tmp_path: Path) -> None:
    source, target = random_log(3, 500, 1000), random_log(4, 500, 20_000)
    out: dict[int, list[int]] = {}
    for seed in (1, 2):
        options, manifest = run(tmp_path / str(seed), source, target, seed=seed, rows_per_shard=6000)
        out[seed] = [row["example_id"] for row in rows_of(options.out, "train")]
        shards = manifest.shards["train"]
        assert len(shards) == 3
        assert sum(s.rows for s in shards) == len(out[seed])
        first = out[seed][: shards[0].rows]
        ranks = np.argsort(np.argsort(out[seed]))
        correlation = np.corrcoef(ranks, np.arange(len(ranks)))[0, 1]
        assert abs(correlation) < 5 / np.sqrt(len(ranks))
        assert np.histogram(first, 10, (0, max(out[seed])))[0].min() > len(first) / 10 * 0.8
    assert sorted(out[1]) != out[1]
    assert out[1] != out[2]


def test_shards_hold_full_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffle, "ROW_GROUP_ROWS", 300)
    monkeypatch.setattr(shuffle, "BUCKET_ROWS", 200)
    options, manifest = run(tmp_path, random_log(3, 50, 100), random_log(4, 50, 2000))
    (shard,) = manifest.shards["train"]
    assert set(shard.row_groups[:-1]) == {300}
    file = pq.ParquetFile(f"{options.out}/{shard.path}")
    assert file.schema_arrow.equals(EXAMPLE_SCHEMA)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == shard.row_groups
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_bytes_do_not_depend_on_partitions(tmp_path: Path) -> None:
    source, target = random_log(5, 80, 900), random_log(6, 80, 900)
    cut = [
        run(tmp_path / str(n), source, target, partitions=n, labels="sampled", candidates=5)[1] for n in (1, 2, 7, 90)
    ]
    assert len({tuple(digests(manifest)) for manifest in cut}) == 1


@pytest.mark.ray
def test_two_workers_write_the_same_bytes_and_find_the_same_mistakes(tmp_path: Path) -> None:
    import ray

    source, target = random_log(5, 80, 900), random_log(6, 80, 900)
    try:
        _, alone = run(tmp_path / "0", source, target, partitions=3)
        _, two = run(tmp_path / "2", source, target, partitions=3, workers=2)
        with pytest.raises(
            UserError, match=r"^eval_negatives=60: the catalogue has 60 target items, of which one user"
        ):
            run(tmp_path / "3", source, target, partitions=3, workers=2, labels="sampled", eval_negatives=60)
    finally:
        ray.shutdown()
    assert digests(alone) == digests(two)
    assert sorted(path.name for path in (tmp_path / "3").iterdir()) == ["s.tsv", "t.tsv"]


def test_another_seed_gives_other_shards(tmp_path: Path) -> None:
    source, target = random_log(5, 80, 900), random_log(6, 80, 900)
    checksums = {run(tmp_path / str(seed), source, target, seed=seed)[1].checksum for seed in (1, 2)}
    assert len(checksums) == 2


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "log.tsv", "log.tsv.gz", "log.parquet"])
def test_every_kind_of_file_gives_the_same_dataset(tmp_path: Path, name: str) -> None:
    source, target = random_log(5, 20, 200), random_log(6, 20, 200)
    _, expected = run(tmp_path / "tsv", source, target)
    separator = "," if ".csv" in name else "\t"
    for role, rows in (("s", source), ("t", target)):
        (tmp_path / role).mkdir()
        write_log(tmp_path / role / name, rows, separator)
    domains = {"source_domain": "s", "target_domain": "t"}
    logs = {"source": str(tmp_path / "s" / name), "target": str(tmp_path / "t" / name)}
    found = prepare(PrepareOptions(**logs, **domains, out=str(tmp_path / "out")))
    assert digests(found) == digests(expected)


def test_a_log_may_be_a_folder_or_a_pattern_of_files(tmp_path: Path) -> None:
    source, target = random_log(5, 20, 200), random_log(6, 20, 200)
    _, expected = run(tmp_path / "one", source, target)
    days = tmp_path / "target"
    days.mkdir()
    for day in range(4):
        write_log(days / f"day{day}.parquet", target[50 * day : 50 * day + 50])
    (days / "_SUCCESS").touch()
    log = write_log(tmp_path / "s.tsv", source)
    for number, pattern in enumerate((days, days / "day*.parquet")):
        found = prepare(
            PrepareOptions(source=log, target=str(pattern), out=str(tmp_path / f"out{number}"), target_domain="t")
        )
        assert digests(found) == digests(expected)


def test_columns_have_any_name_and_parquet_any_fitting_type(tmp_path: Path) -> None:
    frame = pl.DataFrame({"uid": [12, 12, 12], "asin": ["a", "b", "c"], "at": [1, 2, 3], "stars": [5, 1, 4]})
    frame = frame.with_columns(pl.from_epoch("at", time_unit="s"))
    for name in ("s", "t"):
        frame.write_parquet(tmp_path / f"{name}.parquet")
    words = f"source={tmp_path}/s.parquet target={tmp_path}/t.parquet out={tmp_path}/out columns.user=uid"
    words += " columns.item=asin columns.timestamp=at columns.rating=stars threshold=3.5"
    options = options_from_words(words.split())
    prepare(options)
    found = written_examples(options.out)
    assert [found["12", n]["label"] for n in range(3)] == [1.0, 0.0, 1.0]
    assert [found["12", n]["timestamp"] for n in range(3)] == [1, 2, 3]


def test_each_domain_may_have_columns_of_its_own(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [7, 8, 9], "timestamp": [1, 2, 3], "stars": [5, 1, 4]})
    frame.write_csv(tmp_path / "s.csv")
    frame.rename({"user_id": "reader"}).write_csv(tmp_path / "t.csv")
    pl.DataFrame({"asin": [7, 8], "kind": ["x", "y"]}).write_csv(tmp_path / "items.csv")
    words = f"source={tmp_path}/s.csv target={tmp_path}/t.csv target_items={tmp_path}/items.csv out={tmp_path}/out"
    words += " columns.rating=stars target_columns.user=reader"
    words += " target_item_columns.item=asin target_item_columns.category=kind"
    manifest = prepare(options_from_words(words.split()))
    assert manifest.counts["users"] == 1
    categories = pl.read_parquet(f"{tmp_path}/out/{manifest.vocab['target_category'].path}")["key"].to_list()
    assert sorted(categories) == ["others", "x", "y"]
    assert manifest.options["target_columns.user"] == "reader"
    assert "source_columns.user" not in manifest.options


def test_the_same_options_keep_the_dataset_and_manifest_reads_back(tmp_path: Path) -> None:
    source, target = random_log(5, 20, 200), random_log(6, 20, 200)
    options, manifest = run(tmp_path, source, target)
    assert read_manifest(options.out) == manifest
    before = {path: path.stat().st_mtime_ns for path in Path(options.out).rglob("*")}
    _, again = run(tmp_path, source, target, partitions=5)
    assert again == manifest
    assert {path: path.stat().st_mtime_ns for path in Path(options.out).rglob("*")} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s.tsv", "t.tsv"]


def test_counts_table_says_what_was_prepared(tmp_path: Path) -> None:
    log = [("u", item, time, 5.0) for time, item in enumerate("abc")]
    target = [*log[:2], ("u", "c", 2, 1.0)]
    _, manifest = run(tmp_path, [*log, ("u", "d", 9, 1.0), ("v", "a", 9, 1.0)], target)
    lines = [line.split() for line in counts_table(manifest).splitlines()]
    assert lines[:4] == [["s", "t"], ["role", "source", "target"], ["log", "users", "2", "1"], ["users", "1", "1"]]
    assert lines[4][:3] == ["cold", "users", "1"]
    assert lines[5:7] == [["items", "4", "3"], ["behaviours", "4", "3"]]
    positive = ["100.0%", "positive"]
    assert lines[7:10] == [["train", "1", *positive], ["valid", "1", *positive], ["test", "1", "0.0%", "positive"]]


@pytest.mark.skipif(not AMAZON.is_dir(), reason=f"the real logs are not at {AMAZON} (CDR_SHARED)")
def test_amazon_beauty_and_sports_have_the_known_counts(tmp_path: Path) -> None:
    beauty, sports = (str(AMAZON / f"{name}.inter.tsv.gz") for name in ("beauty", "sports"))
    manifest = prepare(PrepareOptions(source=beauty, target=sports, out=str(tmp_path / "out"), labels="sampled"))
    assert (manifest.source_domain, manifest.target_domain) == ("beauty", "sports")
    assert manifest.counts == {
        "users": 1625,
        "source_items": 6334,
        "target_items": 6259,
        "source_behaviours": 28_380,
        "target_behaviours": 17_766,
        "cold_users": 22_363 + 35_598 - 2 * 1625,
        "source_log_users": 22_363,
        "target_log_users": 35_598,
        "unknown_targets": 0,
        "short_targets": 0,
        "train_positives": 14_516,
        "valid_positives": 1625,
        "test_positives": 1625,
    }
    assert [manifest.examples(split) for split in SPLITS] == [14_516, 1625, 1625]


def test_items_are_counted_by_training_positives_and_by_all_positives_of_the_source(tmp_path: Path) -> None:
    source = [("u", "s", 1, 5.0), ("u", "s", 2, 5.0), ("u", "s", 99, 5.0), ("u", "r", 3, 1.0), ("v", "s", 1, 5.0)]
    target = [("u", item, time, rating) for item, time, rating in (("x", 1, 5.0), ("x", 2, 1.0), ("y", 3, 5.0))]
    options, _ = run(tmp_path, source, [*target, ("u", "x", 4, 5.0)])
    counts = {}
    for role in ("source", "target"):
        rows = pq.read_table(f"{options.out}/vocab/{role}_item.parquet").to_pylist()
        counts[role] = {row["key"]: row["count"] for row in rows}
    assert counts == {"source": {"s": 3, "r": 0}, "target": {"x": 1, "y": 0}}
