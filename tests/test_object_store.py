"""Object storage: every kind of fault is survived or told in one line, in time; the bits are those of a local run.

The store is moto's server, or a real one that CDR_TEST_S3 names (`make test-s3`), behind a proxy that breaks answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import pyarrow as pa
import pytest
from moto.server import ThreadedMotoServer

from cdr_dist.data import object_store, retries, storage
from cdr_dist.data.dataset import SPLITS, read_manifest
from cdr_dist.data.options import StorageOptions
from cdr_dist.data.prepare import options_from_words, prepare
from cdr_dist.data.prepare_job import prepare_job
from cdr_dist.data.replicas import Replicas
from cdr_dist.data.shards import ShardReader, verify
from cdr_dist.errors import UserError
from cdr_dist.training import lease
from cdr_dist.training.checkpoint import newest
from cdr_dist.training.evaluation_job import evaluate_run
from cdr_dist.training.job import train_job
from cdr_dist.training.lease import Lease
from cdr_dist.training.run_folder import RunFolder
from tests.crashes import KILLED as KILLED_BY
from tests.crashes import job
from tests.datasets import USERS, copied, edited, rated, scratch
from tests.faulty_store import LONGEST_S, FaultyStore, seeded
from tests.runs import KILLED, summary, train, words

ROOT = Path(__file__).parents[1]
PLANTED = {
    "AWS_ACCESS_KEY_ID": "planted-key-id-0123",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+0123456789",
    "AWS_SESSION_TOKEN": "planted//token+0123456789",
}
QUICK = StorageOptions(deadline_s=10.0, tries=4, backoff_s=0.02)
QUICK_WORDS = ["storage.deadline_s=10", "storage.tries=4", "storage.backoff_s=0.02"]
FAULTS = ["reset", "stall", "trickle", "lost", "truncate", "short", "500", "502", "503"]
FAST_FAULTS = [fault for fault in FAULTS if fault not in ("stall", "trickle")]


@pytest.fixture(scope="module")
def proxy():
    """The proxy before the store; the environment of this process names it. The bucket is named `bucket`."""
    with pytest.MonkeyPatch.context() as patch:
        server = None
        if real := os.environ.get("CDR_TEST_S3"):
            host, _, port = real.removeprefix("http://").partition(":")
        else:
            server = ThreadedMotoServer(port=0, verbose=False)
            server.start()
            host, port = server.get_host_and_port()
            for name, value in PLANTED.items():
                patch.setenv(name, value)
        store = FaultyStore(host, int(port))
        patch.setenv("AWS_ENDPOINT_URL", store.url)
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        # Many stores send no checksums; where they do, the client would notice damage before we can.
        patch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
        make_bucket()
        yield store
        store.close()
        if server is not None:
            server.stop()


def make_bucket():
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    if not fs.exists("bucket"):
        fs.mkdir("bucket")


@pytest.fixture
def store(proxy):
    """The proxy without a fault, and short deadlines."""
    rated()  # made by prepare, with storage options of its own
    before = storage.options()
    proxy.reset()
    storage.use(QUICK)
    yield proxy
    proxy.reset()
    storage.use(before)


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path, store):
    """The URI of an empty folder."""
    uri = str(tmp_path) if request.param == "local" else fresh(request)
    yield uri
    storage.remove_folder(uri)


@pytest.fixture
def s3(request, store):
    uri = fresh(request)
    yield uri
    store.reset()
    storage.remove_folder(uri)


def fresh(request):
    return f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}"


def scripted(faults):
    """These faults for the first requests, then none."""
    left = deque(faults)
    return lambda request: left.popleft() if left else None


def upload(local, uri):
    for file in sorted(Path(local).rglob("*")):
        if file.is_file():
            storage.write_bytes(storage.join(uri, str(file.relative_to(local))), file.read_bytes())
    return uri


def uploads_under_way():
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True).list_multipart_uploads("bucket")


# ---- files ----------------------------------------------------------------------------------------------------------


def test_files_and_folders(folder):
    one, two = storage.join(folder, "a/one"), storage.join(folder, "a/b/two")
    assert storage.names(folder) == []
    assert storage.is_empty(folder)
    storage.write_bytes(one, b"0123456789")
    storage.write_bytes(two, b"")
    assert storage.names(folder) == ["a"]
    assert storage.names(storage.join(folder, "a")) == ["b", "one"]
    assert storage.files(folder) == [two, one]
    assert [storage.exists(storage.join(folder, name)) for name in ("a", "a/one", "a/o", "c")] == [
        True,
        True,
        False,
        False,
    ]
    assert (storage.size(one), storage.read_bytes(one), storage.read_bytes(two)) == (10, b"0123456789", b"")
    assert storage.read_range(one, 3, 6) == b"345"
    with storage.open_input(one) as file:
        assert (file.seek(-4, 2), file.read(2), file.read(), file.read()) == (6, b"67", b"89", b"")
    storage.write_bytes(one, b"anew")
    assert storage.read_bytes(one) == b"anew"
    storage.move_folder(storage.join(folder, "a"), storage.join(folder, "c"), last="one")
    assert storage.names(folder) == ["c"]
    assert storage.read_bytes(storage.join(folder, "c/one")) == b"anew"
    storage.remove_file(storage.join(folder, "c/one"))
    storage.remove_file(storage.join(folder, "c/one"))
    assert storage.files(folder) == [storage.join(folder, "c/b/two")]
    storage.remove_folder(storage.join(folder, "c"))
    assert storage.is_empty(storage.join(folder, "c"))
    with pytest.raises(UserError, match=r"^\S+/a/one: not found$"):
        storage.read_bytes(one)


def write(uri, content, fails=False):
    folder = uri.rsplit("/", 1)[0]
    with storage.open_output(uri) as file:
        file.write(content[:2])
        file.write(content[2:])
        assert not [name for name in storage.names(folder) if not name.endswith(".part")]
        if fails:
            raise KeyError


@pytest.mark.parametrize("size", [3, 12 << 20], ids=["small", "multipart"])
def test_an_output_appears_whole_or_not_at_all(folder, size, monkeypatch):
    monkeypatch.setattr(object_store.ObjectUpload, "piece_bytes", 5 << 20)  # S3's least
    uri, content = storage.join(folder, "file"), os.urandom(size)
    with pytest.raises(KeyError):
        write(uri, content, fails=True)
    assert storage.names(folder) == []
    write(uri, content)
    assert storage.read_bytes(uri) == content
    assert storage.names(folder) == ["file"]
    if folder.startswith("s3:"):
        assert not uploads_under_way()


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived(store, s3, fault, monkeypatch):
    monkeypatch.setattr(object_store.ObjectUpload, "piece_bytes", 5 << 20)
    slow = fault in ("stall", "trickle")
    content = os.urandom(6 << 20 if fault in ("lost", "truncate") else 1000)
    if slow:
        storage.use(StorageOptions(deadline_s=0.5, tries=4, backoff_s=0.02))
    uri = storage.join(s3, "file")
    store.plan = lambda request: fault if request.times == 0 else None
    storage.write_bytes(uri, content)
    assert storage.read_bytes(uri) == content
    if not slow:
        assert storage.names(s3) == ["file"]
        storage.remove_file(uri)
        assert not storage.exists(uri)
    assert sum(request.times > 0 for request in store.seen) >= 3


@pytest.mark.parametrize("fault", ["reset", "stall", "trickle", "503", "truncate", "short"])
def test_a_fault_that_stays_is_one_line_in_time(store, s3, fault):
    storage.write_bytes(storage.join(s3, "file"), bytes(1000))
    storage.use(StorageOptions(deadline_s=0.5, tries=3, backoff_s=0.02))
    store.plan = lambda request: fault
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"^{s3}/file: .*3 tries\)?$") as error:
        storage.read_range(storage.join(s3, "file"), 0, 1000)
    assert time.monotonic() - start < 3 * 0.5 + 5
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["denied", "missing", "no bucket"])
def test_what_no_try_can_cure_is_asked_once(store, what):
    uri = "s3://bucket-of-nobody/x" if what == "no bucket" else "s3://bucket/nothing"
    store.plan = lambda request: "403" if what == "denied" else None
    with pytest.raises(
        UserError, match=f"^{uri}: " + (r"cannot be read \(Access Denied\)$" if what == "denied" else "not found$")
    ):
        storage.read_range(uri, 0, 10)
    assert len(store.seen) == 1
    if what != "missing":
        with pytest.raises(UserError, match=f"^{uri}: cannot be written"):
            storage.write_bytes(uri, b"")
        assert len(store.seen) == 2


def test_back_off_doubles_with_jitter_and_ends():
    storage.use(StorageOptions(backoff_s=0.5))
    waits = [[retries.wait_s(tried) for _ in range(200)] for tried in range(1, 10)]
    for tried, some in enumerate(waits):
        longest = min(30.0, 0.5 * 2**tried)
        assert longest / 2 <= min(some) < 0.6 * longest
        assert 0.9 * longest < max(some) <= longest
    storage.use(StorageOptions())


# ---- prepare and train ----------------------------------------------------------------------------------------------

RECIPE = ["recipe=joint", "trainer.max_steps=25"]


@pytest.fixture(scope="module")
def undisturbed():
    """Of a local run."""
    run = scratch() / "undisturbed"
    train(words(rated(), run, *RECIPE))
    return summary(run)


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
    assert storage.names(out) == ["manifest.json", *sorted([*SPLITS, "vocab"])]
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


# ---- shards ----------------------------------------------------------------------------------------------------------


def rows_of(reader):
    from cdr_dist.data.lanes import Piece

    return pa.concat_tables([reader.read(Piece(i, 0, n)) for i, n in enumerate(reader.row_groups)])


def test_damaged_answers_are_read_again_from_a_file_opened_anew(store, s3):
    upload(rated(), s3)
    manifest = read_manifest(s3)
    expected = rows_of(ShardReader(str(rated()), manifest, "train", ["item", "target_history_item"]))
    for faults in (
        ["zeros"],
        [None, "zeros"],
        [None, "truncate"],
        [None, "short", "zeros"],
        ["zeros", "zeros", "reset"],
    ):
        reader = ShardReader(s3, manifest, "train", ["item", "target_history_item"])
        store.plan = scripted(faults)
        assert rows_of(reader).equals(expected), faults
    store.plan = lambda request: "zeros" if request.path.endswith(".parquet") else None
    with pytest.raises(UserError, match=rf"^{s3}/train/part-00000.parquet: cannot be read \(.*, 4 tries\)$"):
        rows_of(ShardReader(s3, manifest, "train", ["item"]))


AHEAD = """
import sys
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.shards import ShardReader
manifest = read_manifest(sys.argv[1])
reader = ShardReader(sys.argv[2], manifest, "train", ["item"])
reader.plan("lane", range(len(reader.row_groups)))
"""


@pytest.mark.parametrize("fault", [None, "stall", "reset"])
def test_a_process_ends_at_once_while_it_reads_ahead(store, s3, fault):
    upload(rated(), s3)
    store.plan = lambda request: fault if request.path.endswith(".parquet") else None
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    command = [sys.executable, "-c", AHEAD, str(rated()), s3]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - start < 25  # the default deadline is 30 s


def test_a_row_group_costs_few_requests_and_no_more_bytes_than_it_has(store, s3):
    upload(rated(), s3)
    manifest = read_manifest(s3)
    reader = ShardReader(s3, manifest, "train", ["item"])
    store.reset()
    rows_of(reader)
    shards = manifest.shards["train"]
    assert len(store.seen) <= 2 * len(shards)
    asked = [request.span.removeprefix("bytes=").split("-") for request in store.seen]
    assert sum(int(stop) - int(start) + 1 for start, stop in asked) <= 2 * sum(shard.bytes for shard in shards)


# ---- replicas --------------------------------------------------------------------------------------------------------


@pytest.fixture
def regions(store, s3):
    """A dataset in us, with a whole copy in eu."""
    us, eu = storage.join(s3, "us"), storage.join(s3, "eu")
    upload(rated(), us)
    upload(rated(), eu)
    storage.write_bytes(storage.join(us, "replicas.json"), json.dumps({"eu": eu, "us": us}).encode())
    return us, eu


def in_region(name):
    storage.use(dataclasses.replace(QUICK, region=name))


def paths(store):
    return {request.path.rsplit("/", 3)[-3] for request in store.seen if request.path.endswith(".parquet")}


@pytest.mark.parametrize(("region", "expected"), [("eu", "eu"), ("us", "us"), ("mars", "us"), (None, "us")])
def test_a_worker_reads_the_replica_of_its_region(store, regions, region, expected):
    in_region(region)
    manifest = read_manifest(regions[0])
    replicas = Replicas(regions[0], manifest)
    store.reset()
    rows_of(ShardReader(regions[0], manifest, "train", ["item"], replicas=replicas))
    assert paths(store) == {expected}
    assert replicas.fallbacks == 0


@pytest.mark.parametrize("fault", ["503", "stall", "zeros", "missing"])
def test_a_replica_that_fails_is_replaced_and_counted(store, regions, fault):
    us, eu = regions
    storage.use(StorageOptions(1.0 if fault == "stall" else 10.0, 2, 0.02, region="eu"))
    manifest = read_manifest(us)
    if fault == "missing":
        storage.remove_folder(storage.join(eu, "train"))
    expected = rows_of(ShardReader(str(rated()), manifest, "train", ["item"]))
    replicas = Replicas(us, manifest)
    store.reset()
    store.plan = lambda request: fault if "/eu/train/" in request.path and fault != "missing" else None
    assert rows_of(ShardReader(us, manifest, "train", ["item"], replicas=replicas)).equals(expected)
    assert replicas.fallbacks == len(manifest.shards["train"])
    assert sum("/eu/train/" in request.path for request in store.seen) <= 4  # a place that failed is asked last


def test_a_run_counts_its_fall_backs(store, regions, undisturbed, tmp_path):
    store.plan = lambda request: "503" if "/eu/train/" in request.path else None
    train(words(regions[0], tmp_path / "run", *RECIPE, *QUICK_WORDS, "storage.region=eu", "storage.tries=2"))
    found = summary(tmp_path / "run")
    assert found["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert found["throughput"]["replica_fallbacks"] >= len(read_manifest(regions[0]).shards["train"])


def test_all_replicas_dead_is_one_line(store, regions):
    in_region("eu")
    manifest = read_manifest(regions[0])
    replicas = Replicas(regions[0], manifest)
    store.plan = lambda request: "503" if request.path.endswith(".parquet") else None
    with pytest.raises(UserError, match=r"/eu/train/part-00000.parquet: .*; nor from 1 other place.*: \S+/us/train/"):
        rows_of(ShardReader(regions[0], manifest, "train", ["item"], replicas=replicas))


@pytest.mark.parametrize("how", ["manifest", "shard"])
def test_a_stale_replica_is_refused(store, regions, how, tmp_path):
    us, eu = regions
    in_region("eu")
    if how == "manifest":
        other = edited(copied(rated(), tmp_path), seed=9)
        storage.write_bytes(storage.join(eu, "manifest.json"), (other / "manifest.json").read_bytes())
    else:
        shard = storage.join(eu, "train/part-00001.parquet")
        storage.write_bytes(shard, storage.read_bytes(shard)[:-7] + b"changed")
    with pytest.raises(
        UserError, match={"manifest": f"^{eu}: a stale replica", "shard": f"^{eu}/train/part-00001"}[how]
    ):
        verify(us, read_manifest(us))


class Guarded(dict):
    """Of places that failed: one thread's look at it must not meet another's entry."""

    def __init__(self, lock):
        super().__init__()
        self._lock = lock

    def items(self):
        assert self._lock.locked()
        return super().items()

    def __setitem__(self, place, since):
        assert self._lock.locked()
        super().__setitem__(place, since)


def test_threads_that_read_ahead_note_failures_one_after_another():
    folder = str(rated())
    replicas = Replicas(folder, read_manifest(folder))
    replicas._failed = Guarded(replicas._lock)
    with pytest.raises(storage.StorageError):
        replicas.read("nothing", storage.read_bytes)
    assert list(dict(replicas._failed)) == [folder]


@pytest.mark.parametrize("content", ["[]", "{", '{"eu": 3}', '{"eu": ""}', '"eu"'])
def test_a_damaged_list_of_replicas_is_named(content, tmp_path):
    (tmp_path / "replicas.json").write_text(content)
    with pytest.raises(UserError, match=f"^{tmp_path}/replicas.json: "):
        Replicas(str(tmp_path), None)  # type: ignore[arg-type]


# ---- runs, and a kill in the middle of a move -----------------------------------------------------------------------


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
        with pytest.raises(UserError, match="another job has taken this run over"):
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
