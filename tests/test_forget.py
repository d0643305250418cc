"""A person who is removed is nowhere any more, everybody else is as before, and everything still works."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sys
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from cdr_dist import crash_points
from cdr_dist.crash_points import EFFECTS
from cdr_dist.data import forgotten, storage
from cdr_dist.data.dataset import SPLITS, read_manifest
from cdr_dist.data.feed import Feed
from cdr_dist.data.options import StreamOptions
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.data.shards import ShardReader, verify
from cdr_dist.data.stream import Place, Stream
from cdr_dist.data.synthetic import planted_logs
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job
from cdr_dist.production import forget as module
from cdr_dist.production.forget import Places, forget
from cdr_dist.production.forget_dataset import _Scan
from cdr_dist.production.forget_job import forget_job
from cdr_dist.production.nightly_job import nightly_job
from cdr_dist.production.recommendation_job import recommend
from cdr_dist.production.recommendation_options import RecommendOptions
from cdr_dist.training import lease
from cdr_dist.training.checkpoint import complete
from cdr_dist.training.clear_rows import clear_rows
from cdr_dist.training.evaluation_job import evaluate_run
from cdr_dist.training.explanation_job import explain_all, file_name
from cdr_dist.training.rows_file import RowsFile, read_rows, write_rows
from cdr_dist.training.run_folder import RunFolder
from tests.crashes import KILLED, job
from tests.datasets import SHAPE, scratch
from tests.problem import replaced
from tests.runs import newest, summary, tensors, train, words
from tests.stores import upload
from tests.test_nightly import NIGHTS, night

KEY, COLD = "erase-me-7f3a9c", "of-one-log-5e21d8"
"""A user of both logs, and one of the source's alone."""
RUN = ["recipe=biao", "upper.interval=4", "trainer.checkpoint_every=3", "trainer.max_steps=6", "evaluation.every=3"]


def renamed(log):
    new = {"u000100": KEY, "u000101": COLD}
    return log.with_columns(pl.col("user_id").replace(new))


@functools.cache
def logs():
    """source, target."""
    folder, of = scratch() / "forget-logs", planted_logs(SHAPE)
    folder.mkdir()
    renamed(of.source).write_parquet(folder / "source.parquet")
    renamed(of.target).filter(pl.col("user_id") != COLD).write_parquet(folder / "target.parquet")
    return folder


def prepared(out, folder=None, **more):
    raw = folder or logs()
    given = {role: str(raw / f"{role}.parquet") for role in ("source", "target")} | {"rows_per_shard": 400, "seed": 8}
    prepare(PrepareOptions(**given | more, out=str(out)))
    return out


@functools.cache
def pristine():
    """A dataset, a run with all that can be written into its folder, and recommendations; what tests change is a copy
    at one and the same place, as a run names its dataset."""
    world = scratch() / "forget"
    prepared(world / "data")
    run = world / "run"
    train(words(world / "data", run, *RUN))
    place = RunFolder(str(run))
    best = summary(run)["best"]["step"]
    page = place.file(f"explanations/{file_name(KEY)}")
    storage.write_bytes(page, f"<p>{KEY}</p>".encode())
    storage.write_bytes(place.file("explanations/u000099.html"), b"<p>another</p>")
    explain_all(place.config(), place, best, str(run / "all.parquet"), most=100, workers=0)
    recommend(RecommendOptions(run=str(run), out=str(world / "top"), workers=0, top=5))
    kept = scratch() / "forget-pristine"
    shutil.copytree(world, kept)
    return world, kept


@pytest.fixture
def world():
    here, kept = pristine()
    shutil.rmtree(here)
    shutil.copytree(kept, here)
    return here


def given(world, *keys):
    return [f"user={','.join(keys)}", f"data={world}/data", f"run={world}/run", f"recommendations={world}/top"]


def traces(folder, key):
    """The files below a folder that say a key anywhere: in their bytes, or in a text of a Parquet file."""
    return [uri for uri in storage.files(str(folder)) if says(uri, key)]


def says(uri, key):
    content = storage.read_bytes(uri)
    if key.encode() in content or key in uri:
        return True
    return uri.endswith(".parquet") and any(
        has(column, key) for column in pq.read_table(pa.BufferReader(content)).columns
    )


def has(column, key):
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.ChunkedArray):
        return any(has(chunk, key) for chunk in column.chunks)
    if pa.types.is_nested(column.type):
        return has(column.flatten(), key)
    text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    return bool(text and pc.any(pc.match_substring(column, key)).as_py())


def id_of(data, key):
    table = pl.read_parquet(data / read_manifest(str(data)).vocab["user"].path)
    return dict(table.select("key", "id").iter_rows()).get(key)


def rows(data, part):
    shards = [data / shard.path for shard in read_manifest(str(data)).shards[part]]
    return pl.concat([pl.read_parquet(path) for path in shards])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_of_a_person_remains_and_everything_else_does(world, capsys):
    data, run, top = world / "data", world / "run", world / "top"
    before, number = {part: rows(data, part) for part in (*SPLITS, "users")}, id_of(data, KEY)
    of_before, checksum = tensors(run), read_manifest(str(data)).checksum
    served = pl.read_parquet(top / "part-*.parquet")
    weighed, scored = pl.read_parquet(run / "all.parquet"), pl.read_parquet(run / "scores_test.parquet")
    assert len(traces(world, KEY)) >= 5
    assert number in weighed.join(pl.DataFrame({"user": [KEY]}), on="user").select(pl.lit(number)).to_series()
    forget_job(given(world, KEY))
    said = capsys.readouterr().out
    assert said.startswith("1 user removed; the raw logs, exported files and backups are not touched\n")
    assert KEY not in said
    assert traces(world, KEY) == []

    manifest = read_manifest(str(data))
    verify(str(data), manifest, how="checksum")
    assert manifest.before == [checksum]
    assert id_of(data, KEY) is None
    for part, old in before.items():
        gone = pl.col("user_id") == KEY if part == "users" else pl.col("user") == number
        assert rows(data, part).equals(old.filter(~gone))
        assert manifest.examples(part) == len(old.filter(~gone)) < len(old)
    assert {path.name for part in (*SPLITS, "users") for path in (data / part).iterdir()} == {
        Path(shard.path).name for part in (*SPLITS, "users") for shard in manifest.shards[part]
    }, "no file of before is left"

    assert pl.read_parquet(run / "all.parquet").equals(weighed.filter(pl.col("user") != KEY))
    assert pl.read_parquet(run / "scores_test.parquet").equals(scored.filter(pl.col("user") != number))
    assert [path.name for path in (run / "explanations").iterdir()] == ["u000099.html"]
    assert pl.read_parquet(top / "part-*.parquet").equals(served.filter(pl.col("user_id") != KEY))
    found = json.loads((top / "recommendations.json").read_text())
    assert (
        found["users"] == sum(part["rows"] for part in found["parts"]) == sum(found["by"].values()) == len(served) - 1
    )
    assert len(complete(str(run / "checkpoints"))) == 2
    for name, old in of_before.items():
        new = tensors(run)[name]
        if name.startswith("tables.user."):
            assert not new[number].any()
            assert old[number].any()
            new[number] = old[number]
        assert torch.equal(new, old), name

    step, metrics = evaluate_run(str(run), "test")
    assert metrics["rows"] == manifest.examples("test")
    assert step == summary(run)["best"]["step"]
    assert recommend(RecommendOptions(run=str(run), out=str(top), workers=0, top=5)) == found, "done already"
    train(words(data, run, *RUN, "trainer.max_steps=9"))
    assert summary(run)["steps"] == 9
    assert not tensors(run)["tables.user.weights"][number].any()
    assert traces(world, KEY) == []

    forget_job(given(world, KEY))
    assert capsys.readouterr().out == "nothing was removed: gone from here already\n"


def test_a_user_of_one_log_alone_goes_as_well(world):
    removed = forget([COLD], Places(data=[f"{world}/data"], recommendations=[f"{world}/top"], runs=[f"{world}/run"]))
    assert {one.what for one in removed} == {"rows of users", "rows"}
    assert traces(world, COLD) == []
    assert read_manifest(f"{world}/data").counts["cold_users"] == 0
    assert id_of(world / "data", KEY) is not None


@pytest.mark.parametrize("more", [{}, {"labels": "sampled"}, {"users": "target"}])
def test_counts_are_those_of_logs_without_the_person(tmp_path, more):
    data = prepared(tmp_path / "data", **more)
    nobody = _Scan(str(data), read_manifest(str(data)), pa.array([], pa.int32()), pa.array([], pa.string()))
    before = read_manifest(str(data))
    assert (nobody.counts(), nobody.unseen(), nobody.unknown()) == (before.counts, before.unseen, before.unknown)
    forget([KEY, COLD], Places(data=[str(data)]))
    for role in ("source", "target"):
        pl.read_parquet(logs() / f"{role}.parquet").filter(~pl.col("user_id").is_in([KEY, COLD])).write_parquet(
            tmp_path / f"{role}.parquet"
        )
    found, wanted = (read_manifest(str(one)) for one in (data, prepared(tmp_path / "without", tmp_path, **more)))
    for part in SPLITS:
        assert found.examples(part) == wanted.examples(part)
    left_out = {"source_items", "target_items"} | ({"source_behaviours"} if more.get("labels") != "sampled" else set())
    assert {n: v for n, v in found.counts.items() if n not in left_out} == {
        n: v for n, v in wanted.counts.items() if n not in left_out
    }
    assert before.counts["source_behaviours"] > found.counts["source_behaviours"] >= wanted.counts["source_behaviours"]
    assert found.unknown == wanted.unknown
    assert found.unseen == wanted.unseen
    assert found.rows["user"] == before.rows["user"]


def test_a_dataset_on_top_leaves_out_whom_the_earlier_one_forgot(tmp_path):
    data = prepared(tmp_path / "data")
    number, last = id_of(data, KEY), read_manifest(str(data)).rows["user"]
    forget([KEY, COLD], Places(data=[str(data)]))
    second = prepared(tmp_path / "second", extends=str(data))
    third = prepared(tmp_path / "third", extends=str(second))
    afresh = prepared(tmp_path / "afresh", forgotten=str(data / forgotten.FILE))
    for out in (second, third, afresh):
        assert traces(out, KEY) == traces(out, COLD) == []
        assert KEY in forgotten.read(str(out))
        assert KEY not in (out / forgotten.FILE).read_text()
    assert number not in rows(third, "train")["user"]
    assert read_manifest(str(third)).rows["user"] == last
    assert forgotten.read(str(third)).id_of(KEY) == number
    assert forgotten.read(str(afresh)).id_of(KEY) is None, "another dataset's ids say nothing"
    assert prepared(tmp_path / "second", extends=str(data)) == second, "is kept, though the earlier one has changed"


def test_a_dataset_that_still_holds_somebody_who_is_to_be_forgotten_is_not_kept_silently(tmp_path):
    data = prepared(tmp_path / "data")
    second = prepared(tmp_path / "second", extends=str(data))
    forget([KEY], Places(data=[str(data)]))
    with pytest.raises(UserError, match=r"second: holds users that are to be forgotten; python jobs/forget.py data="):
        prepared(second, extends=str(data))
    forget([KEY], Places(data=[str(second)]))
    prepared(second, extends=str(data))
    with pytest.raises(UserError, match="forgotten= goes without extends="):
        prepared(tmp_path / "third", extends=str(data), forgotten=str(data / forgotten.FILE))


# ---- crashes --------------------------------------------------------------------------------------------------------

OURS = [effect for effect in EFFECTS if effect.startswith("forget.")]
TIMES = {"forget.shard": 3, "forget.sweep": 2, "forget.checkpoint": 2, "forget.rows": 2}
"""The last that this many times passed is the one at which it dies; else the first."""


def left_by_killed_jobs(world):
    """A scratch folder of a prepare, half of a file."""
    (world / "data.unfinished-0a1b").mkdir()
    (world / "data.unfinished-0a1b" / "logs.arrow").write_text(KEY)
    (world / "top" / ".part-00000.parquet.0a1b.part").write_text(KEY)


class Died(BaseException):
    """Stands for SIGKILL: nothing of the job can catch it."""


@contextlib.contextmanager
def dying_at(point, count):
    passed = []

    def look(name):
        passed.extend([name] if name == point else [])
        if passed.count(point) == count:
            raise Died

    with replaced(crash_points, "_point", look), pytest.raises(Died):
        yield


POINTS = [f"{effect}:{side}" for effect in OURS for side in ("before", "after")]


def count_of(point):
    return TIMES.get(point.rpartition(":")[0], 1)


@pytest.mark.parametrize("point", POINTS)
def test_ended_at_any_point_the_same_command_finishes_it(point, world):
    left_by_killed_jobs(world)
    with dying_at(point, count_of(point)):
        forget_job(given(world, KEY))
    is_old_or_new(world, measured=point.startswith(("forget.complete", "forget.manifest")))
    forget_job(given(world, KEY))
    assert traces(world, KEY) == []
    assert finished(world) == undisturbed()


@pytest.mark.soak
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_same_command_finishes_it(point, world, tmp_path):
    left_by_killed_jobs(world)
    screen = tmp_path / "screen"
    assert job("forget", forget_job, given(world, KEY), crash=f"{point}:{count_of(point)}") == KILLED
    is_old_or_new(world)
    assert job("forget", forget_job, given(world, KEY), screen=screen) == 0, screen.read_text()
    assert traces(world, KEY) == []
    assert finished(world) == undisturbed()


def is_old_or_new(world, measured=True):
    manifest = read_manifest(f"{world}/data")
    verify(f"{world}/data", manifest, how="checksum")
    assert not measured or evaluate_run(f"{world}/run", "test")[1]["rows"] == manifest.examples("test")


def finished(world):
    """What lasts, but for the salt."""
    manifest = read_manifest(f"{world}/data")
    names = sorted(str(path.relative_to(world)) for path in world.rglob("*") if path.is_file())
    top = json.loads((world / "top" / "recommendations.json").read_text())
    return manifest, [n for n in names if "checkpoints" not in n], top, newest(world / "run").name


@functools.cache
def undisturbed():
    world, kept = pristine()
    shutil.rmtree(world)
    shutil.copytree(kept, world)
    forget_job(given(world, KEY))
    return finished(world)


# ---- nights ---------------------------------------------------------------------------------------------------------

PERSON = "u000100"
"""Of test_nightly's logs."""


def test_a_night_after_it_does_not_bring_a_person_back(tmp_path, capsys):
    out = tmp_path / "out"
    nightly = functools.partial(night, out=out, model=("recipe=joint",))
    for date in NIGHTS[:2]:
        nightly_job(nightly(date))
    (out / "datasets" / "2026-01-06.unfinished-0a1b").mkdir()
    (out / "datasets" / "2026-01-06.unfinished-0a1b" / "logs.arrow").write_text(PERSON)
    kinds = {Path(uri).relative_to(out).parts[0] for uri in traces(out, PERSON)}
    assert kinds == {"datasets", "recommendations"}
    number = id_of(out / "datasets" / NIGHTS[1], PERSON)
    scores = [out / "runs" / NIGHTS[1] / "scores_test.parquet", out / "nights" / NIGHTS[1] / "scores_published.parquet"]
    assert all(number in pl.read_parquet(path)["user"] for path in scores)
    capsys.readouterr()
    forget_job([f"user={PERSON}", f"out={out}"])
    said = capsys.readouterr().out
    for place in ("/datasets/", "/runs/", "/nights/", "/recommendations/", "unfinished dataset"):
        assert place in said
    assert traces(out, PERSON) == []
    assert not any(number in pl.read_parquet(path)["user"] for path in scores)
    for date in NIGHTS[:2]:
        assert not tensors(out / "runs" / date)["tables.user.weights"][number].any()
        nightly_job(nightly(date))
        assert "done already" in capsys.readouterr().out
    nightly_job(nightly(NIGHTS[2]))
    assert json.loads((out / "latest.json").read_text())["date"] == NIGHTS[2]
    assert traces(out, PERSON) == []
    third = out / "datasets" / NIGHTS[2]
    assert all(number not in rows(third, split)["user"] for split in SPLITS)
    forget_job([f"user={PERSON}", f"out={out}"])
    assert "gone from here already" in capsys.readouterr().out


def test_a_night_and_a_removal_never_run_together(world, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(world / "data", out / "datasets" / "2026-01-04")
    before = files(out)
    other = {"host": "h", "process": 1, "since": 0, "token": "x", "beats": 1}
    (out / lease.FILE).write_text(json.dumps(other))
    with replaced(lease, "_alive", lambda *_: True), pytest.raises(UserError, match="another job works here"):
        forget([KEY], Places(out=str(out)))
    (out / lease.FILE).unlink()
    assert files(out) == before

    def taken_over(*given):
        (out / lease.FILE).write_text(json.dumps(other))
        return clear(*given)

    clear = module.forget_in_dataset
    with replaced(module, "forget_in_dataset", taken_over), pytest.raises(UserError, match="has taken over"):
        forget([KEY], Places(out=str(out)))
    assert read_manifest(str(out / "datasets" / "2026-01-04")).before == []


# ---- places ---------------------------------------------------------------------------------------------------------


def test_in_an_object_store_and_its_replicas(world, s3, tmp_path):
    data, copy, run = (storage.join(s3, name) for name in ("data", "copy", "run"))
    upload(world / "data", copy)
    (world / "data" / "replicas.json").write_text(json.dumps({"elsewhere": copy}))
    upload(world / "data", data)
    upload(world / "run", run)
    config = (world / "run" / "config.yaml").read_text().replace(str(world / "data"), data)
    storage.write_bytes(storage.join(run, "config.yaml"), config.encode())
    forget([KEY], Places(data=[data], runs=[run]))
    assert traces(s3, KEY) == []
    assert read_manifest(copy) == read_manifest(data)
    verify(data, read_manifest(data), how="checksum")
    assert [saved.attempt for saved in complete(storage.join(run, "checkpoints"))] == [1, 1]


def test_a_run_is_cleared_also_after_its_dataset_has_forgotten(world):
    number = id_of(world / "data", KEY)
    forget([KEY], Places(data=[f"{world}/data"]))
    assert tensors(world / "run")["tables.user.weights"][number].any()
    evaluate_run(f"{world}/run", "test")
    forget([KEY], Places(runs=[f"{world}/run"], recommendations=[f"{world}/top"]))
    assert not tensors(world / "run")["tables.user.weights"][number].any()
    assert traces(world, KEY) == []


def test_rows_that_workers_share_are_cleared_in_whichever_file_they_are(tmp_path):
    values = torch.arange(1.0, 41.0).view(10, 4)
    folder, listed = tmp_path / "step-00000003", {}
    for rank in range(2):
        parts = {(t, "weights"): (5 * rank, values[5 * rank : 5 * rank + 5]) for t in ("user", "item")}
        parts["user", "state0"] = (5 * rank, values[5 * rank : 5 * rank + 5, 0].contiguous())
        content = write_rows(str(folder), f"rows-{rank}.bin", parts, 3).to_json()
        (folder / f"rows-{rank}.json").write_bytes(content)
        listed[f"rows-{rank}.json"] = [len(content), storage.sha256(content)]
    (folder / "COMPLETE").write_text(json.dumps(listed))
    (tmp_path / "step-00000004").mkdir()
    assert clear_rows(str(tmp_path), {"user"}, [2, 7], lambda: None) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003-1"], "what was never complete is gone, too"
    again = tmp_path / "step-00000003-1"
    found = {("user", "weights"): (0, torch.zeros(10, 4)), ("item", "weights"): (0, torch.zeros(10, 4))}
    found["user", "state0"] = (0, torch.zeros(10))
    read_rows(str(again), [RowsFile.from_json((again / f"rows-{rank}.json").read_bytes()) for rank in range(2)], found)
    wanted = values.clone()
    wanted[[2, 7]] = 0.0
    assert torch.equal(found["user", "weights"][1], wanted)
    assert torch.equal(found["user", "state0"][1], wanted[:, 0])
    assert torch.equal(found["item", "weights"][1], values)
    assert clear_rows(str(tmp_path), {"user"}, [2, 7], lambda: None) == 0


def test_a_place_behind_the_last_step_of_a_dataset_that_has_lost_rows(world):
    data = str(world / "data")
    reader = ShardReader(data, read_manifest(data), "train", ["user", "item"])
    feed = Feed(Stream(reader, 64, StreamOptions(), 8, "lower"), lambda block: [None] * len(block.steps))
    feed.seek(Place(2, feed.steps_per_epoch))
    assert feed.next().place == Place(3, 0)
    feed.close()


# ---- mistakes -------------------------------------------------------------------------------------------------------


def exit_code(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["forget.py", *words])
    return run_job("forget", None, forget_job)


def test_an_unknown_user_is_one_line_and_nothing_is_removed(world, monkeypatch, capsys):
    before = files(world)
    assert exit_code(monkeypatch, *given(world, KEY, "nobody")) == 2
    assert capsys.readouterr() == ("", "forget: user=nobody: unknown here; nothing was removed\n")
    assert files(world) == before
    assert exit_code(monkeypatch, *given(world, KEY)) == 0
    assert exit_code(monkeypatch, *given(world, KEY)) == 0
    assert exit_code(monkeypatch, "user=nobody", f"recommendations={world}/top") == 2
    assert exit_code(monkeypatch, f"user={KEY}", f"recommendations={world}/top") == 0


def test_users_come_from_a_file_as_well(world, tmp_path):
    (tmp_path / "asked.txt").write_text(f"{KEY}\n{COLD}\n")
    forget_job([f"users={tmp_path}/asked.txt", *given(world, "")[1:]])
    assert traces(world, KEY) == traces(world, COLD) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=x"], "give either user=KEY or users=FILE"),
        (["user=a", "users=b", "data=x"], "give either user=KEY or users=FILE"),
        (["user=,", "data=x"], "user=,: names nobody"),
        (["user=a"], "give out=, data=, run= or recommendations="),
        (["user=a", "data=nowhere"], "nowhere: not a dataset"),
        (["user=a", "run=nowhere"], "nowhere: not a run"),
        (["user=a", "recommendations=nowhere"], "nowhere: no recommendations"),
        (["user=a", "out=nowhere"], "out=nowhere: holds no datasets, runs or recommendations"),
        (["users=nowhere.txt", "data=x"], "nowhere.txt: not found"),
        (["usr=a"], "usr: unknown option; did you mean"),
    ],
)
def test_what_cannot_be_is_one_line_and_makes_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        forget_job(words)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_prepare_that_may_still_run_is_waited_for(world):
    scratch_folder = Path(f"{world}/data.unfinished-0a1b")
    scratch_folder.mkdir()
    (scratch_folder / "started").write_text(json.dumps({"host": "elsewhere", "process": 1, "since": 0}))
    before = files(world)
    with pytest.raises(UserError, match=r"unfinished-0a1b: a job may still prepare this dataset \(elsewhere\)"):
        forget([KEY], Places(data=[f"{world}/data"]))
    assert files(world) == before


def test_a_damaged_list_is_named(world):
    for text in ("no JSON", '{"salt": "x"}', '{"salt": 3, "users": {}}', '{"salt": "x", "users": {"a": "b"}}', "[]"):
        Path(f"{world}/data", forgotten.FILE).write_text(text)
        with pytest.raises(UserError, match=r"forgotten.json: damaged: who was forgotten is not known"):
            forgotten.read(f"{world}/data")
