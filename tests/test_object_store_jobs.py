"""Jobs on an object store: the bits are those of a local run; faults, secrets and kills end as they should."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import subprocess
import sys
import time

import pytest

from cdr_dist.data import retries, storage
from cdr_dist.data.dataset import SPLITS, read_manifest
from cdr_dist.data.prepare import options_from_words, prepare
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.data.shards import verify
from cdr_dist.errors import UserError
from cdr_dist.training import lease
from cdr_dist.training.checkpoint import newest
from cdr_dist.training.evaluation_job import evaluate_run
from cdr_dist.training.job import train_job
from cdr_dist.training.lease import Lease
from cdr_dist.training.run_folder import RunFolder
from tests.crashes import KILLED as KILLED_BY
from tests.crashes import job
from tests.datasets import USERS, rated, scratch
from tests.faulty_store import LONGEST_S, seeded
from tests.runs import KILLED, summary, train, words
from tests.stores import (
    FAST_FAULTS,
    PLANTED,
    QUICK_WORDS,
    RECIPE,
    ROOT,
    upload,
)


def test_prepare_and_train_through_faults_give_the_bits_of_a_local_run(store, s3, undisturbed, tmp_path):
    logs = {role: storage.join(s3, f"logs/{role}.parquet") for role in ("source", "target")}
    for role, uri in logs.items():
        storage.write_bytes(uri, (scratch() / "rated-logs" / f"{role}.parquet").read_bytes())
    store.plan = seeded(8, FAST_FAULTS, most=2)
    out = storage.join(s3, "dataset")
    given = [f"{role}={uri}" for role, uri in logs.items()] + [f"out={out}", f"rows_per_shard={USERS}", "seed=8"]
    manifest = prepare(options_from_words([*given, *QUICK_WORDS, "partitions=2"]))
    local = read_manifest(str(rated()))
    assert [s.sha256 for split in SPLITS for s in manifest.shards[split]] == [
        s.sha256 for split in SPLITS for s in local.shards[split]
    ]
    assert storage.names(s3) == ["dataset", "logs"]
    assert storage.names(out) == ["manifest.json", *sorted([*SPLITS, "users", "vocab"])]
    assert prepare(options_from_words([*given, *QUICK_WORDS])) == read_manifest(out) == manifest
    train(words(out, tmp_path / "run", *RECIPE, *QUICK_WORDS))
    assert summary(tmp_path / "run")["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert summary(tmp_path / "run")["throughput"]["replica_fallbacks"] == 0
    assert sum(request.times > 0 for request in store.seen) > 50


@contextlib.contextmanager
def surrounded(values):
    """A worker of a pool that began earlier has an environment of that time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def test_two_workers_whose_server_stalls_give_the_bits_of_a_local_run(store, s3, tmp_path):
    steps = ("recipe=joint", "trainer.max_steps=6")
    train(words(rated(), tmp_path / "local", *steps), 2)
    upload(rated(), s3)
    store.reset()
    stalling = ("/manifest.json", "/train/part-00000.parquet", "/train/part-00002.parquet", "/test/part-00000.parquet")
    store.plan = lambda request: "stall" if request.times == 0 and request.path.endswith(stalling) else None
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    more = ("storage.deadline_s=1", "storage.tries=5", "storage.backoff_s=0.02")
    train(words(s3, tmp_path / "run", *steps, *more), 2, within=functools.partial(surrounded, aws))
    assert summary(tmp_path / "run")["parameters_sha256"] == summary(tmp_path / "local")["parameters_sha256"]
    assert len(store.stalled_s) >= len(stalling)
    assert max(store.stalled_s) < LONGEST_S / 2  # after LONGEST_S it ends by itself


def test_a_server_that_stalls_during_a_run_ends_it_with_one_line(store, s3, tmp_path):
    upload(rated(), s3)
    store.plan = lambda request: "stall" if request.path.endswith("train/part-00002.parquet") and request.span else None
    start = time.monotonic()
    more = ["trainer.verify=size", "storage.deadline_s=1", "storage.tries=3", "storage.backoff_s=0.02"]
    with pytest.raises(UserError, match=r"train/part-00002.parquet: no answer within 1 s, 3 tries$"):
        train(words(s3, tmp_path / "run", *RECIPE, *more))
    assert time.monotonic() - start < 30  # most of it is the start of a run


def test_a_bucket_that_is_not_there_is_named(store):
    logs = [f"{role}={scratch() / 'rated-logs' / role}.parquet" for role in ("source", "target")]
    with pytest.raises(UserError, match=r"^s3://bucket-of-nobody/out: cannot be written \(.*[Bb]ucket"):
        prepare(options_from_words([*logs, "out=s3://bucket-of-nobody/out", *QUICK_WORDS]))


QUICK_END = ["storage.deadline_s=0.5", "storage.tries=2", "storage.backoff_s=0.02"]
NO_ANSWER = {
    "dead": r"cannot be (read|listed) \(Could not connect to the endpoint URL: .*, 2 tries\)",
    "stall": r"no answer within 0.5 s, 2 tries",
    "403": r"cannot be (read|listed) \((Forbidden|Access Denied)\)",
    "503": r"cannot be (read|listed) \((Service Unavailable|Please reduce your request rate.), 2 tries\)",
}


@pytest.mark.parametrize("server", NO_ANSWER)
def test_a_server_that_never_answers_is_told_in_one_line(store, server, tmp_path, monkeypatch):
    store.plan = lambda request: server
    if server == "dead":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{dead_port()}")
    start = time.monotonic()
    with pytest.raises(UserError, match=f"^s3://bucket/s.tsv: {NO_ANSWER[server]}$"):
        prepare(options_from_words([*LOGS, *QUICK_END]))
    with pytest.raises(UserError, match=f"^s3://bucket/set/manifest.json: {NO_ANSWER[server]}$"):
        train_job(["data=s3://bucket/set", f"run={tmp_path / 'run'}", "trainer.workers=0", *QUICK_END])
    assert time.monotonic() - start < 2 * 2 * 0.5 + 10
    assert not (tmp_path / "run").exists()


LOGS = ["source=s3://bucket/s.tsv", "target=s3://bucket/t.tsv", "out=s3://bucket/out"]


@pytest.mark.parametrize(("job", "server"), [("prepare", "stall"), ("train", "dead")])
def test_a_job_ends_with_two(store, job, server, tmp_path):
    """No traceback, no hang at exit."""
    given = LOGS if job == "prepare" else ["data=s3://bucket/set", f"run={tmp_path / 'run'}", "trainer.workers=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    store.plan = lambda request: server
    if server == "dead":
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{dead_port()}"
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *given, *QUICK_END]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(rf"{job}: s3://bucket/\S+: {NO_ANSWER[server]}", line), line
    assert not [value for value in credentials() if value in line]


def dead_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def credentials():
    """Those of the environment; a shorter one, of a test server, may be part of any word."""
    return [value for name in PLANTED if len(value := os.environ.get(name, "")) >= retries.SHORTEST_SECRET]


def put_in_files(folder, monkeypatch):
    """The credentials of the environment move to a profile of the standard file, whose default one is nobody's."""
    mine = {name: os.environ[name] for name in PLANTED if name in os.environ}
    lines = [f"{name.lower()} = {value}" for name, value in mine.items()]
    nobody = ["aws_access_key_id = nobody", "aws_secret_access_key = nobody"]
    (folder / "credentials").write_text("\n".join(["[default]", *nobody, "[chosen]", *lines]))
    for name in mine:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "chosen")


@pytest.mark.parametrize("place", ["environment", "files"])
def test_credentials_are_found_and_nowhere_left(store, s3, place, tmp_path_factory, tmp_path, monkeypatch):
    """By prepare, a run and a run that fails: not in what they write, nor on the screen."""
    planted, key_id = credentials(), os.environ["AWS_ACCESS_KEY_ID"]
    if place == "files":
        put_in_files(tmp_path_factory.mktemp("home"), monkeypatch)
    logs = [f"{role}={scratch() / 'rated-logs' / role}.parquet" for role in ("source", "target")]
    data, run, screen = storage.join(s3, "dataset"), storage.join(s3, "run"), tmp_path / "screen"
    given = [*logs, f"out={data}", f"rows_per_shard={USERS}", "seed=8", *QUICK_WORDS]
    store.reset()
    assert job("prepare", prepare_job, given, screen=screen) == 0
    few = ("recipe=joint", "trainer.max_steps=3")
    assert job("train", train_job, words(data, run, *few, *QUICK_WORDS), screen=screen) == 0
    store.plan = lambda request: "403" if request.path.endswith("manifest.json") else None
    assert job("train", train_job, words(data, tmp_path / "failed", *few, *QUICK_WORDS), screen=screen) == 2
    assert {request.key_id for request in store.seen} == {key_id}
    store.plan = lambda request: None
    left = {uri: storage.read_bytes(uri) for uri in [*storage.files(s3), *storage.files(str(tmp_path))]}
    assert {f"{data}/manifest.json", f"{run}/config.yaml", f"{run}/summary.json", str(screen)} < left.keys()
    assert re.search(rb"manifest.json: cannot be read .(Access Denied|Forbidden)", left[str(screen)])
    assert planted
    for uri, content in left.items():
        assert not [value for value in planted if value.encode() in content], uri


@pytest.mark.parametrize("place", ["environment", "files"])
def test_clients_words_are_told_without_credentials(store, place, tmp_path, monkeypatch):
    for name in PLANTED:
        monkeypatch.setenv(name, f"planted-{place}-{name}")
    if place == "files":
        put_in_files(tmp_path, monkeypatch)
        store.plan = lambda request: "403"
        with pytest.raises(UserError, match="cannot be"):
            storage.read_bytes("s3://bucket/file")
    said = (
        'no way to "http://me:planted@host/b?X-Amz-Signature=planted" with '
        f"{' '.join(f'planted-{place}-{name}' for name in PLANTED)}; "
        "Credential=planted/2026, Signature=planted\nplanted"
    )
    with pytest.raises(UserError) as error, storage.naming("file"):
        raise OSError(said)
    assert "planted" not in str(error.value)
    assert str(error.value).startswith('file: cannot be read (no way to "http://***@host/b" with *** *** ***; ')
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__


def test_a_secret_in_a_uri_is_refused_unseen(tmp_path):
    with pytest.raises(UserError, match="credentials come from the environment") as error:
        train(words("s3://key:planted@bucket/dataset", tmp_path / "run"))
    assert "planted" not in str(error.value)


def test_a_run_in_the_store_killed_and_resumed_ends_as_a_local_one(store, s3, tmp_path):
    more = ("recipe=biao", "upper.interval=4", "trainer.max_steps=20")
    train(words(rated(), tmp_path / "local", *more))
    store.plan = seeded(8, FAST_FAULTS, most=1)
    run = storage.join(s3, "run")
    given = words(rated(), run, *more, *QUICK_WORDS)
    assert train([*given, "trainer.checkpoint_every=6"], killed_after=15) == [KILLED]
    assert newest(storage.join(run, "checkpoints")).step == 12
    train(given)
    there, local = RunFolder(run), RunFolder(str(tmp_path / "local"))
    for key in ("parameters_sha256", "metrics", "best", "steps", "upper_steps"):
        assert there.summary()[key] == local.summary()[key], key
    assert [timeless(line) for line in there.lines()] == [timeless(line) for line in local.lines()]
    assert any(name.startswith("events.") for name in storage.names(there.file("tensorboard")))
    assert sum(request.times > 0 for request in store.seen) > 20
    step, found = evaluate_run(run, "test")
    assert (step, found["auc"]) == (local.summary()["best"]["step"], local.summary()["metrics"]["test"]["auc"])


def timeless(line):
    """Of metrics.jsonl; the mean of the training losses is over fewer steps after a resume."""
    return {k: v for k, v in line.items() if k != "time" and (k != "values" or line["split"] != "train")}


def test_two_jobs_on_one_run_in_the_store(store, s3, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_S", 2.5)
    with Lease(s3) as first:
        lease.check(storage.join(s3, lease.FILE), first.token)
        with pytest.raises(UserError, match="another job has taken over here"):
            lease.check(storage.join(s3, lease.FILE), "other")
    assert storage.names(s3) == []


def test_prepare_killed_while_it_moves_its_files_goes_on(store, s3, tmp_path):
    logs = [f"{role}={scratch() / 'rated-logs' / role}.parquet" for role in ("source", "target")]
    out = storage.join(s3, "dataset")
    given = [*logs, f"out={out}", f"rows_per_shard={USERS}", "seed=8", *QUICK_WORDS]
    assert job("prepare", prepare_job, given, "prepare.moved_file:after:3") == KILLED_BY
    assert storage.names(s3) != ["dataset"]
    assert not storage.exists(storage.join(out, "manifest.json"))
    screen = tmp_path / "screen"
    assert job("prepare", prepare_job, given, screen=screen) == 0, screen.read_text()
    verify(out, read_manifest(out), how="checksum")
    assert storage.names(s3) == ["dataset"]
    local = read_manifest(str(rated()))
    assert [s.sha256 for s in read_manifest(out).shards["train"]] == [s.sha256 for s in local.shards["train"]]
