"""The demo data: its likes are as planted, and its folder is whole, or not there, whoever writes it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cdr_dist.data import demo
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.demo import dataset_of, is_written, write_planted
from cdr_dist.data.synthetic import Planted, PlantedLogs, planted_logs
from cdr_dist.data.truth import KINDS, usefulness_by_category
from cdr_dist.errors import UserError

SMALL = Planted(users=200, source_behaviours=10)
PLAIN = Planted(users=4000, source_behaviours=160, target_behaviours=40)


@pytest.fixture(scope="module")
def logs() -> PlantedLogs:
    return planted_logs(PLAIN)


def agreement(logs: PlantedLogs, kind: str, shape: Planted = PLAIN) -> float:
    """Largest |correlation| over users between mean ratings in a source category of a kind and one of the target."""
    target = _mean_likes(logs.target)
    of_kind = logs.truth.filter(pl.col("kind") == kind)["category"].to_list()
    source = {name: likes for name, likes in _mean_likes(logs.source).items() if name in of_kind}
    assert len(source) == shape.kinds.count(kind)
    largest = [max(abs(_correlation(one, other)) for other in target.values()) for one in source.values()]
    return min(largest) if kind == "helpful" else max(largest)


def _mean_likes(log: pl.DataFrame) -> dict[str, pl.DataFrame]:
    means = log.group_by("category", "user_id").agg(pl.col("rating").mean())
    return {name: part for (name,), part in means.partition_by("category", as_dict=True).items()}


def _correlation(one: pl.DataFrame, other: pl.DataFrame) -> float:
    both = one.join(other, on="user_id")
    return float(np.corrcoef(both["rating"], both["rating_right"])[0, 1])


def test_every_helpful_category_follows_the_targets_taste(logs):
    assert agreement(logs, "helpful") > 0.5


@pytest.mark.parametrize("kind", ["neutral", "harmful"])
def test_no_other_category_tells_anything_of_the_target(logs, kind):
    assert agreement(logs, kind) < 0.12  # 3,500 users a pair: .017 is one standard error, and 80 or more pairs


def test_harmful_categories_are_as_consistent_as_helpful_ones_and_neutral_ones_are_coin_flips(logs):
    """Within a category, two ratings of one user agree as often as two noisy reports of one like do."""
    rated = logs.source.join(logs.truth, on="category").with_columns(high=pl.col("rating") > 3)
    of_user = rated.group_by("kind", "category", "user_id").agg(n=pl.len(), high=pl.col("high").sum())
    pairs = of_user.with_columns(
        all=pl.col("n") * (pl.col("n") - 1),
        agree=pl.col("high") * (pl.col("high") - 1)
        + (pl.col("n") - pl.col("high")) * (pl.col("n").cast(pl.Int64) - pl.col("high") - 1),
    )
    shares = dict(pairs.group_by("kind").agg(pl.col("agree").sum() / pl.col("all").sum()).iter_rows())
    expected = PLAIN.source_certainty**2 + (1 - PLAIN.source_certainty) ** 2
    assert shares["helpful"] == pytest.approx(expected, abs=0.01)
    assert shares["harmful"] == pytest.approx(expected, abs=0.01)
    assert shares["neutral"] == pytest.approx(0.5, abs=0.01)


def test_category_alone_tells_nothing_about_a_rating(logs):
    for log in (logs.source, logs.target):
        high = log.group_by("category").agg(pl.col("rating").gt(3).mean())["rating"]
        assert high.is_between(0.46, 0.54).all()


def test_a_user_has_as_many_behaviours_as_asked_and_the_source_comes_first(logs):
    for log, count in ((logs.source, PLAIN.source_behaviours), (logs.target, PLAIN.target_behaviours)):
        assert (log.group_by("user_id").len()["len"] == count).all()
        assert log["user_id"].n_unique() == PLAIN.users
    assert logs.source["timestamp"].max() < logs.target["timestamp"].min()


def test_the_seed_decides_every_rating():
    again, other = planted_logs(SMALL), planted_logs(replace(SMALL, seed=9))
    first = planted_logs(SMALL)
    assert first.source.equals(again.source)
    assert first.target.equals(again.target)
    assert not first.target.equals(other.target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_of_one_kind_is_one_line(kind):
    shape = replace(SMALL, **(dict.fromkeys(KINDS, 0) | {kind: 4}))
    assert planted_logs(shape).truth["kind"].to_list() == [kind] * 4


@pytest.mark.parametrize(
    ("wrong", "told"),
    [({"certainty": 1.5}, "certainty=1.5"), ({"helpful": -1}, "helpful=-1"), ({"source_items": 3}, "source_items=3")],
)
def test_a_shape_that_cannot_be_is_refused_by_name(wrong, told):
    with pytest.raises(UserError, match=told):
        Planted(**wrong)


def test_the_demo_is_written_in_seconds_and_then_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_written()
    began = time.perf_counter()
    folder = dataset_of("demo")
    assert time.perf_counter() - began < 15
    assert is_written()
    before = _files(Path(folder))
    assert dataset_of("demo") == folder == str(tmp_path / "runs/demo-data")
    assert _files(Path(folder)) == before
    assert dataset_of("somewhere/else") == "somewhere/else"


def test_the_truth_names_the_kind_of_every_source_category(tmp_path):
    manifest = write_planted(SMALL, str(tmp_path / "data"))
    found = usefulness_by_category(str(tmp_path / "data"), manifest)
    assert sorted(found) == sorted(["", "", *SMALL.kinds])


def test_the_same_shape_makes_the_same_shards_anywhere(tmp_path):
    one, other = (write_planted(SMALL, str(tmp_path / name)) for name in ("one", "other"))
    assert one.shards == other.shards
    assert one.vocab == other.vocab


def test_another_shape_or_generator_is_written_anew_in_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    first = write_planted(SMALL, str(folder))
    second = write_planted(replace(SMALL, certainty=0.7), str(folder))
    assert first.checksum != second.checksum
    assert json.loads((folder / demo.SHAPE_FILE).read_text())["certainty"] == 0.7
    back = write_planted(SMALL, str(folder))
    assert back.checksum == first.checksum
    before = _files(folder)
    monkeypatch.setattr(demo, "GENERATOR", demo.GENERATOR + 1)
    write_planted(SMALL, str(folder))
    assert _files(folder) != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.lock"]


def test_a_folder_of_somebody_elses_is_refused_and_kept(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not planted data"):
        write_planted(SMALL, str(tmp_path / "data"))
    assert (tmp_path / "data/thesis.txt").read_text() == "mine"


KILLED = """
import os, signal, sys
from cdr_dist.data import demo
from cdr_dist.data.synthetic import Planted
demo.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
demo.write_planted(Planted(users=200, source_behaviours=10), sys.argv[1])
"""


def test_a_writer_killed_before_its_dataset_appears_leaves_none_and_the_next_one_writes_it(tmp_path):
    folder = tmp_path / "data"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], cwd=Path(__file__).resolve().parent.parent)
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert (tmp_path / "data.unfinished/dataset/manifest.json").exists()
    write_planted(SMALL, str(folder))
    assert read_manifest(str(folder)).counts["users"] == SMALL.users
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.lock"]


def test_two_that_want_the_demo_at_once_write_one_dataset(tmp_path, monkeypatch):
    """Threads stand for processes: the lock belongs to the file that each of them opens."""
    folder, written, write, together = tmp_path / "data", [], demo._write, threading.Barrier(2)

    def wanted(_):
        together.wait(timeout=10)
        return write_planted(SMALL, str(folder))

    monkeypatch.setattr(demo, "_write", lambda shape, out: written.append(out) or write(shape, out))
    with ThreadPoolExecutor(2) as pool:
        manifests = list(pool.map(wanted, range(2)))
    assert written == [folder]
    assert manifests[0] == manifests[1] == read_manifest(str(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "data.lock"]


def _files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
