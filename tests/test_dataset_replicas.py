"""Datasets with replicas in regions: the own one is read, another one where it fails, a stale one is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.options import StorageOptions
from cdr_dist.data.replicas import Replicas
from cdr_dist.data.shards import ShardReader, verify
from cdr_dist.errors import UserError
from tests.datasets import copied, edited, rated
from tests.runs import summary, train, words
from tests.stores import (
    QUICK,
    QUICK_WORDS,
    RECIPE,
    rows_of,
    upload,
)


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
