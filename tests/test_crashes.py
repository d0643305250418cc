"""Killed right before and right after every effect that lasts, also while it recovers: nothing is lost or doubled."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from cdr_dist.crash_points import EFFECTS
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.data.shards import verify
from cdr_dist.training.job import train_job
from tests import crashes
from tests.crashes import KILLED, job, recorded
from tests.datasets import rated, scratch
from tests.runs import lines, same_run, steps_of, summary, train, words

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Way:
    """How a job comes to an effect: what is there before, what runs, and how often it passes before it is killed."""

    effect: str
    count: int = 1
    ready: Callable[[Path], object] = lambda _: None
    main: Callable[[list[str]], None] | None = None
    recovery: str = ""
    """Where the recovery is killed, too; the same effect unless said. `-`: there is nothing left to recover."""
    more: tuple[str, ...] = ()

    def __str__(self):
        return f"{self.effect}-{self.count}"


def given(run, *more):
    return words(
        rated(),
        run,
        "recipe=biao",
        "upper.interval=4",
        "trainer.max_steps=12",
        "trainer.checkpoint_every=3",
        "trainer.keep=1",
        "trainer.log_every=4",
        "evaluation.every=6",
        *more,
    )


PAGE = ("trainer.report=true",)
"""Of jobs that are killed about when they write it; it takes longer than the rest of a job."""


@functools.cache
def undisturbed():
    run = scratch() / "crash-undisturbed"
    assert job("train", train_job, given(run)) == 0
    return run


@functools.cache
def half_way():
    """A run that was finished when it was half as long."""
    run = scratch() / "crash-half-way"
    assert job("train", train_job, given(run, "trainer.max_steps=6")) == 0
    return run


def continued(run, left=()):
    """A run folder that is half-way, and has what another job left there."""
    shutil.copytree(half_way(), run)
    for name in left:
        (run / name).touch()


PART = ".summary.json.0a1b2c3d.part"
ANEW = "run.config"
"""Passed by every start of a run that is not finished."""
TRAINING = [
    *[Way(f"checkpoint.{name}", 2) for name in ("rows", "index", "dense", "place", "barrier", "complete", "outcome")],
    *[Way(f"checkpoint.{name}") for name in ("drop_mark", "drop")],
    *[Way(f"run.{name}") for name in ("lease", "config", "versions", "forget", "scores", "weights")],
    Way("run.line", 2),
    Way("run.beat", 2, main=crashes.train_with_many_beats, recovery=ANEW),
    Way("run.sweep", ready=lambda run: continued(run, [PART]), recovery=ANEW),
    Way("run.go_on", ready=continued, recovery=ANEW),
    Way("run.unstop", ready=lambda run: continued(run, ["stop"])),
    Way("run.stop", main=crashes.train_until_interrupted, recovery=ANEW),
    Way("run.discard", main=crashes.train_on_what_is_refused, recovery=ANEW),
    Way("run.summary", recovery="run.scores", more=PAGE),
    Way("run.report", recovery="-", more=PAGE),
    Way("run.release", recovery="-", more=PAGE),
]
RENAMES = [Way("file.rename", count, recovery=ANEW) for count in range(1, 24)]
"""Of the lease, config.yaml, versions.json, metrics.jsonl, then five of every checkpoint, …"""
RENAMES_IN_CI = (3, 5, 9)
AFTER_IN_CI = ("checkpoint.complete", "prepare.manifest", "run.summary", "run.report", "run.release")
"""What others see from then on, and the last ones."""


LOGS = {"source": "s", "target": "t"}


@functools.cache
def logs():
    folder = scratch() / "crash-logs"
    folder.mkdir()
    for name, letter in LOGS.items():
        rows = (f"u{i * 7 % 40},{letter}{i * i % 31},{i},{1 + i * 3 % 5},c{i * i % 31 % 3}" for i in range(900))
        (folder / f"{name}.csv").write_text("user_id,item_id,timestamp,rating,category\n" + "\n".join(rows) + "\n")
    return folder


@functools.cache
def dataset():
    """The checksum of a dataset that nothing disturbed."""
    assert job("prepare", prepare_job, preparing(scratch() / "crash-out")) == 0
    return read_manifest(str(scratch() / "crash-out")).checksum


def preparing(out, *more):
    return [f"source={logs()}/source.csv", f"target={logs()}/target.csv", f"out={out}", "partitions=3", *more]


def killed_before(out, *more):
    """What a job of these options leaves that dies when it has moved its dataset; with others, before that."""
    point = "prepare.manifest:before" if more else "prepare.clear:before"
    assert job("prepare", prepare_job, preparing(out, *more), point) == KILLED


AGAIN = "prepare.begin"
"""Passed by every start whose dataset is not there yet."""
PREPARING = [
    Way("prepare.begin"),
    Way("prepare.spill", 5),
    Way("prepare.shard", 2),
    Way("prepare.vocabulary", 3),
    Way("prepare.manifest"),
    Way("prepare.move"),
    Way("prepare.clear", recovery="prepare.sweep"),
    Way("prepare.sweep", ready=lambda out: killed_before(out, "seed=9"), recovery=AGAIN),
    Way("prepare.give_up", main=crashes.prepare_what_is_refused, recovery=AGAIN),
]
ELSEWHERE = ("nightly.", "recommend.", "forget.")
"""Effects that tests/test_nightly.py and tests/test_forget.py crash at."""
IN_A_STORE = [Way("prepare.moved_file", 3), Way("run.lines"), Way("run.board")]


def test_every_effect_has_a_name_and_every_name_is_crashed_at():
    named = re.compile(r'durable\(\s*"([a-z_.]+)"')
    listed = re.compile(r'\("((?:run|checkpoint|prepare)\.[a-z_]+)",')
    sources = [p.read_text() for p in (ROOT / "cdr_dist").rglob("*.py") if p.name != "crash_points.py"]
    found = {name for text in sources for name in [*named.findall(text), *listed.findall(text)]}
    elsewhere = {effect for effect in EFFECTS if effect.startswith(ELSEWHERE)}
    assert found == set(EFFECTS)
    assert found - elsewhere == {way.effect for way in [*TRAINING, *RENAMES, *PREPARING, *IN_A_STORE]}


NO_EFFECT = {
    r"run/tensorboard(/.*)?": "curves for people to look at; no job reads them",
    r"run/(checkpoints)?|run|out\.unfinished-\w+(/\w+)*": "an empty folder says nothing",
}


def test_whatever_changes_a_folder_does_so_within_an_effect_that_has_a_name(tmp_path):
    run, out, report, screen = (tmp_path / name for name in ("all/run", "all/out", "report", "screen"))

    def does(name, main, given, code=0, crash=""):
        assert job(name, recorded(main, tmp_path / "all", report), given, crash, screen) == code, screen.read_text()

    out.parent.mkdir()
    does("prepare", crashes.prepare_what_is_refused, preparing(out), 2)
    does("prepare", prepare_job, preparing(out, "seed=9"), KILLED, "prepare.manifest:before")
    does("prepare", prepare_job, preparing(out))
    short = given(run, "trainer.max_steps=6")
    does("train", crashes.train_on_what_is_refused, short, 2)
    does("train", crashes.train_until_interrupted, short, 130)
    does("train", train_job, short, KILLED, "checkpoint.complete:before:2")
    (run / PART).touch()
    does("train", crashes.train_with_many_beats, short)
    does("train", train_job, given(run, *PAGE))
    found = [line.split(" ", 2) for line in report.read_text().splitlines()]
    unnamed = {(change, path) for effect, change, path in found if effect == "-"}
    assert [(c, p) for c, p in sorted(unnamed) if not any(re.fullmatch(known, p) for known in NO_EFFECT)] == []
    changed = {effect for effect, change, _ in found if change not in ("before", "after")}
    in_a_store, told_only = {way.effect for way in IN_A_STORE}, {"checkpoint.barrier", "checkpoint.outcome"}
    elsewhere = {effect for effect in EFFECTS if effect.startswith(ELSEWHERE)}
    assert changed - {"-"} == set(EFFECTS) - in_a_store - told_only - elsewhere


# ---- killed once ----------------------------------------------------------------------------------------------------

STARTED, RECOVERED = [], []


def once(ways, in_ci=lambda way: True):
    """Before and after each effect; after an effect is before the next one, mostly, so CI does that at few points."""
    return [
        pytest.param(way, side, id=f"{way}-{side}", marks=[] if in_ci(way) and _kept(way, side) else [pytest.mark.soak])
        for way in ways
        for side in ("before", "after")
    ]


def _kept(way, side):
    return side == "before" or way.effect in AFTER_IN_CI


def train_killed(way, run, point, screen, main=None):
    main = main or way.main or train_job
    assert job("train", main, given(run, *way.more), point, screen) == KILLED, screen.read_text()


def recovers(way, run, screen, finished=False):
    assert job("train", train_job, given(run, *way.more), screen=screen) == 0, screen.read_text()
    assert "Traceback" not in screen.read_text()
    same_run(undisturbed(), run)
    left = [p.name for p in run.rglob("*") if p.name.startswith(".") or p.name in ("lease.json", "stop")]
    assert left == [] or (finished and left == ["lease.json"])  # a finished run is left as it is


@pytest.mark.parametrize(
    ("way", "side"), once([*TRAINING, *RENAMES], lambda way: way not in RENAMES or way.count in RENAMES_IN_CI)
)
def test_training_killed_at_an_effect_recovers(way, side, tmp_path):
    run, screen = tmp_path / "run", tmp_path / "screen"
    STARTED.append((way, side))
    way.ready(run)
    train_killed(way, run, f"{way.effect}:{side}:{way.count}", screen)
    summed_up = [("run.summary", "after"), ("run.report", "before"), ("run.report", "after"), ("run.release", "before")]
    recovers(way, run, screen, finished=(way.effect, side) in summed_up)
    RECOVERED.append((way, side))


def prepare_killed(way, out, point, screen, main=None):
    main = main or way.main or prepare_job
    assert job("prepare", main, preparing(out), point, screen) == KILLED, screen.read_text()


def prepares(out, screen):
    assert job("prepare", prepare_job, preparing(out), screen=screen) == 0, screen.read_text()
    manifest = read_manifest(str(out))
    assert manifest.checksum == dataset()
    verify(str(out), manifest, how="checksum")
    assert sorted(p.name for p in out.parent.iterdir()) == ["out", "screen"]


@pytest.mark.parametrize(("way", "side"), once(PREPARING))
def test_prepare_killed_at_an_effect_recovers(way, side, tmp_path):
    out, screen = tmp_path / "out", tmp_path / "screen"
    STARTED.append((way, side))
    way.ready(out)
    prepare_killed(way, out, f"{way.effect}:{side}:{way.count}", screen)
    prepares(out, screen)
    RECOVERED.append((way, side))


@pytest.fixture(scope="module")
def bucket():
    """A folder in an object store: a server on loopback that the environment names."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    surroundings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in surroundings.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("crashes")
        yield "s3://crashes"
    server.stop()


@pytest.mark.parametrize(("way", "side"), once(IN_A_STORE))
def test_a_job_in_an_object_store_killed_at_an_effect_recovers(way, side, bucket, tmp_path):
    place, screen, point = f"{bucket}/{way}-{side}", tmp_path / "screen", f"{way.effect}:{side}:{way.count}"
    STARTED.append((way, side))
    if way.effect.startswith("prepare"):
        prepare_killed(way, f"{place}/out", point, screen)
        assert job("prepare", prepare_job, preparing(f"{place}/out"), screen=screen) == 0, screen.read_text()
        assert read_manifest(f"{place}/out").checksum == dataset()
        assert storage.names(place) == ["out"]
    else:
        train_killed(way, f"{place}/run", point, screen)
        assert job("train", train_job, given(f"{place}/run"), screen=screen) == 0, screen.read_text()
        told = json.loads(storage.read_bytes(f"{place}/run/summary.json"))
        assert told["parameters_sha256"] == summary(undisturbed())["parameters_sha256"]
        (tmp_path / "metrics.jsonl").write_bytes(storage.read_bytes(f"{place}/run/metrics.jsonl"))
        assert lines(tmp_path, "upper", "valid") == lines(undisturbed(), "upper", "valid")
    RECOVERED.append((way, side))


# ---- killed while it recovers, too ----------------------------------------------------------------------------------

CHAINED_IN_CI = ("checkpoint.rows", "checkpoint.complete", "checkpoint.drop", "run.forget", "run.unstop", "run.weights")
CHAINED_IN_CI += ("prepare.shard", "prepare.clear")


def chained(ways):
    def marks(way):
        return [] if way.effect in CHAINED_IN_CI else [pytest.mark.soak]

    return [pytest.param(way, id=str(way), marks=marks(way)) for way in ways if way.recovery != "-"]


@pytest.mark.parametrize("way", chained([*TRAINING, *RENAMES]))
def test_training_killed_again_while_it_recovers(way, tmp_path):
    run, screen = tmp_path / "run", tmp_path / "screen"
    STARTED.append((way, "twice"))
    way.ready(run)
    train_killed(way, run, f"{way.effect}:before:{way.count}", screen)
    train_killed(way, run, f"{way.recovery or way.effect}:after", screen, train_job)
    recovers(way, run, screen)
    RECOVERED.append((way, "twice"))


@pytest.mark.parametrize("way", chained(PREPARING))
def test_prepare_killed_again_while_it_recovers(way, tmp_path):
    out, screen = tmp_path / "out", tmp_path / "screen"
    STARTED.append((way, "twice"))
    way.ready(out)
    prepare_killed(way, out, f"{way.effect}:before:{way.count}", screen)
    prepare_killed(way, out, f"{way.recovery or way.effect}:after", screen, prepare_job)
    prepares(out, screen)
    RECOVERED.append((way, "twice"))


def test_all_that_were_killed_recovered():
    """Of those that this process ran; which there are is asked above."""
    print(f"{len(RECOVERED)} of {len(STARTED)} recovered")
    assert RECOVERED == STARTED


def test_what_a_running_job_prepares_is_left_alone(tmp_path):
    out, screen = tmp_path / "out", tmp_path / "screen"
    killed_before(out, "seed=9")
    killed_before(tmp_path / "other")  # has moved its dataset, and its folder is another's
    (left,) = tmp_path.glob("out.unfinished-*")
    holder = json.loads((left / "started").read_text())
    for change in ({"process": os.getppid()}, {"host": "elsewhere"}):
        import psutil

        since = psutil.Process(os.getppid()).create_time()
        (left / "started").write_text(json.dumps(holder | {"since": since} | change))
        assert job("prepare", prepare_job, preparing(out), screen=screen) == 0, screen.read_text()
        assert left.is_dir()
    assert list(tmp_path.glob("other.unfinished-*"))
    (left / "started").write_text(json.dumps(holder | {"process": os.getppid(), "since": since}))
    assert job("prepare", prepare_job, preparing(tmp_path / "out2"), screen=screen) == 0
    shutil.rmtree(out)
    assert job("prepare", prepare_job, preparing(out, "seed=9"), screen=screen) == 2
    assert "another job prepares this dataset" in screen.read_text()


# ---- two workers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("point", "rank"), [("checkpoint.barrier:before:2", 1), ("checkpoint.complete:after:2", 0)])
def test_one_of_two_workers_dies_at_a_checkpoint(point, rank, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(AssertionError, match=r"has ended|process ended|Connection reset|Connection closed"):
        train(given(run), 2, within=functools.partial(dying_at, point, rank))
    assert steps_of(run) == (3 if rank else 6)
    train(given(run), 2)
    train(given(tmp_path / "whole"), 2)
    same_run(tmp_path / "whole", run)


class dying_at:  # noqa: N801 - a context manager, used like a function
    """In a worker: dies at the point if it has this rank."""

    def __init__(self, point, rank):
        self._told = {"CDR_CRASH": point, "CDR_CRASH_RANK": str(rank)}

    def __enter__(self):
        import torch.distributed as dist

        os.environ.update(self._told, RANK=str(dist.get_rank()))

    def __exit__(self, *_):
        for name in (*self._told, "RANK"):
            os.environ.pop(name, None)
