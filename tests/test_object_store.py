"""Files and shards in an object store: every kind of fault is survived or told in one line, in time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from cdr_dist.data import object_store, retries, storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.options import StorageOptions
from cdr_dist.data.shards import ShardReader
from cdr_dist.data.sources import table
from cdr_dist.errors import UserError
from tests.datasets import rated
from tests.stores import (
    FAULTS,
    ROOT,
    rows_of,
    scripted,
    upload,
    uploads_under_way,
)


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
from cdr_dist.data.sources import table
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


def test_a_wait_that_begins_as_the_process_ends_ends_at_once(monkeypatch):
    over = threading.Event()
    over.set()
    monkeypatch.setattr(retries, "_ending", over)
    with pytest.raises(InterruptedError):
        retries.within_deadline(lambda: time.sleep(3))


def test_no_thread_of_a_decoder_calls_python(s3, monkeypatch):
    upload(rated(), s3)
    reading, read = set(), storage.InputFile.read
    monkeypatch.setattr(
        storage.InputFile, "read", lambda file, count: (reading.add(threading.current_thread()), read(file, count))[1]
    )
    manifest = read_manifest(s3)
    rows_of(ShardReader(s3, manifest, "train", ["item", "target_history_item"]))
    list(table.batches(storage.join(s3, manifest.shards["train"][0].path), ["item", "user"]))
    assert reading == {threading.current_thread()}


def test_fetched_bytes_are_asked_for_once(store, s3):
    uri, content = storage.join(s3, "file"), os.urandom(1 << 20)
    storage.write_bytes(uri, content)
    with storage.open_input(uri) as file:
        store.reset()
        near, far = 50 + file.least, 1 << 19
        file.fetch([(far, far + 200_000), (near, near + 50), (0, 60), (far + 10, far + 20), (-5, 3), (9, 1 << 21)])
        assert len(store.seen) == 2
        for start, stop in [(0, 60), (near, near + 50), (far, far + 200_000), (far + 7, far + 150_000), (30, near)]:
            file.seek(start)
            assert file.read(stop - start) == content[start:stop]
        assert len(store.seen) == 2
        file.fetch([(near, near + 1)])
        file.seek(far)
        assert file.read(200_000) == content[far : far + 200_000]
        assert len(store.seen) == 4


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
