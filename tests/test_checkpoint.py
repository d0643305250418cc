"""Checkpoints: what is written in the background, by other numbers of workers, by two jobs at once; damage at rest."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data import storage
from cdr_dist.errors import UserError
from cdr_dist.training import checkpoint, lease
from cdr_dist.training.checkpoint import COMPLETE, DENSE, Checkpoints
from cdr_dist.training.launch import train as train_alone
from cdr_dist.training.lease import Lease
from cdr_dist.training.lower import Lower
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests.datasets import rated
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import KILLED, newest, same_run, train, words


def finished(folder):
    """A run of ten steps -> its words."""
    given = words(rated(), folder, "recipe=biao", "trainer.max_steps=10")
    train(given)
    return given


# ---- in the background ----------------------------------------------------------------------------------------------


class writing_late:  # noqa: N801 - a context manager, used like a function
    """Rows of the checkpoint of step 10 are written only after step 13."""

    def __init__(self, views=False):
        self._views, self._late, self._run, self._write = views, threading.Event(), Lower.run, checkpoint.write_rows

    def __enter__(self):
        def run(update, stop_wanted):
            values = self._run(update, stop_wanted)
            if update._session.passes["lower"] >= 13:
                self._late.set()
            return values

        def write(*arguments):
            if "step-00000010" in arguments[0]:
                assert self._late.wait(60)
            return self._write(*arguments)

        Lower.run, checkpoint.write_rows = run, write
        if self._views:
            self._parts, parts = Checkpoints._make_room, checkpoint.parts_of
            Checkpoints._make_room = lambda c: c._copy.update({k: Same(v) for k, (_, v) in parts(c._session).items()})

    def __exit__(self, *_):
        Lower.run, checkpoint.write_rows = self._run, self._write
        if self._views:
            Checkpoints._make_room = self._parts


class Same(torch.Tensor):
    """Tables themselves where a copy should be."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_subclass(cls, values)

    def copy_(self, _):
        return self


def late_run(run, within):
    given = words(rated(), run, "recipe=biao", "trainer.checkpoint_every=10")
    assert train(given, killed_after=15, within=within) == [KILLED]
    assert newest(run).name == "step-00000010"
    train(given)


def test_a_checkpoint_holds_the_rows_of_its_step_however_late_it_is_written(tmp_path):
    train(words(rated(), tmp_path / "whole", "recipe=biao"))
    late_run(tmp_path / "late", writing_late)
    same_run(tmp_path / "whole", tmp_path / "late")
    with pytest.raises((AssertionError, UserError)):  # other bits, or bits that changed between checksum and write
        _late_and_equal(tmp_path, functools.partial(writing_late, views=True))


def _late_and_equal(tmp_path, within):
    late_run(tmp_path / "views", within)
    same_run(tmp_path / "whole", tmp_path / "views")


# ---- damage at rest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["rows-00000-of-00001.bin", "rows-00000-of-00001.json", "dense.pt", "place.json", COMPLETE]
)
def test_one_bit_that_flips_in_any_file_is_found(name, tmp_path):
    given = finished(tmp_path / "run")
    path = newest(tmp_path / "run") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="step-00000010: damaged checkpoint") as error:
        train([*given, "trainer.max_steps=20"])
    assert "\n" not in str(error.value)


class Writes:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return Path.touch, (self._path,)


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path):
    """Its checksums are right: who can write a checkpoint can write them, too."""
    given = finished(tmp_path / "run")
    path, written = newest(tmp_path / "run"), tmp_path / "written"
    state = torch.load(path / DENSE, weights_only=True)
    torch.save(state | {"more": Writes(written)}, path / DENSE)
    content = (path / DENSE).read_bytes()
    listed = json.loads((path / COMPLETE).read_text()) | {DENSE: [len(content), storage.sha256(content)]}
    (path / COMPLETE).write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"step-00000010: damaged checkpoint \(dense.pt holds what is not") as error:
        train([*given, "trainer.max_steps=20"])
    assert "\n" not in str(error.value)
    assert not written.exists()
    torch.load(path / DENSE, weights_only=False)
    assert written.exists()


# ---- one job at a time ----------------------------------------------------------------------------------------------


def held(run, process, since, host=None, **more):
    run.mkdir(exist_ok=True)
    holder = {"token": "other", "host": host or socket.gethostname(), "process": process, "since": since}
    (run / lease.FILE).write_text(json.dumps(holder | more))


@pytest.fixture
def other_process():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.stdin.close()
    process.wait(20)


def test_a_run_that_another_job_works_on_is_refused(other_process, tmp_path):
    run = tmp_path / "run"
    held(run, other_process.pid, psutil.Process(other_process.pid).create_time())
    config = from_words(words(rated(), run, "recipe=joint"))
    with pytest.raises(UserError, match=f"another job works here .process {other_process.pid} on "):
        train_alone(config, config.data, quiet=True)
    assert [path.name for path in run.iterdir()] == [lease.FILE]


@pytest.mark.parametrize("holder", ["ended", "another of the same number"])
def test_a_holder_that_died_does_not_hold(holder, other_process, tmp_path):
    run = tmp_path / "run"
    started = psutil.Process(other_process.pid).create_time()
    if holder == "ended":
        other_process.stdin.close()
        other_process.wait(20)
    held(run, other_process.pid, started if holder == "ended" else started - 100)
    config = from_words(words(rated(), run, "recipe=joint", "trainer.max_steps=2"))
    assert train_alone(config, config.data, quiet=True)["steps"] == 2
    assert not (run / lease.FILE).exists()


def test_a_holder_on_another_host_is_alive_while_its_lease_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "PATIENCE_S", 2.5)
    run = tmp_path / "run"
    held(run, 1, 0.0, host="elsewhere", beats=0)
    with Lease(str(run)):  # nothing moved for as long as our patience
        pass
    held(run, 1, 0.0, host="elsewhere", beats=0)
    beat = threading.Timer(0.5, held, (run, 1, 0.0), {"host": "elsewhere", "beats": 1})
    beat.start()
    with pytest.raises(UserError, match="process 1 on elsewhere"), Lease(str(run)):
        pass
    beat.join()


def test_a_stale_job_that_wakes_up_writes_no_checkpoint(tmp_path):
    """Its lease is taken at step 12: what it had written before stays, and it ends."""
    run = tmp_path / "run"
    config = from_words(words(rated(), run, "recipe=biao", "trainer.checkpoint_every=5", "trainer.checkpoint=in_place"))
    original = Lower.run

    def taken(update, stop_wanted):
        if update._session.passes["lower"] == 12:
            held(run, os.getpid(), 0.0)
        return original(update, stop_wanted)

    with replaced(Lower, "run", taken), pytest.raises(UserError, match="another job has taken over here"):
        train_alone(config, config.data, quiet=True)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-00000005", "step-00000010"]
    assert json.loads((run / lease.FILE).read_text())["token"] == "other"


def test_a_step_that_is_saved_again_keeps_the_checkpoint_until_the_new_one_is_complete(tmp_path):
    given = finished(tmp_path / "run")
    config = from_words(given)

    def again(rank):
        session = Session(config, config.data, [u for phase in phases_of(config) for u in phase.cycle])
        kept = Checkpoints(f"{tmp_path}/run/checkpoints", session, 1)
        progress = kept.load(kept.newest())
        with replaced(checkpoint, "write_rows", broken), pytest.raises(UserError, match="earlier ones are intact"):
            kept.save(progress)
        assert [s.attempt for s in checkpoint.complete(f"{tmp_path}/run/checkpoints")] == [0]
        kept.save(progress)
        assert [s.attempt for s in checkpoint.complete(f"{tmp_path}/run/checkpoints")] == [1]
        session.close()

    on_workers(1, again)


def broken(*_):
    raise OSError("no room")


def alone(config, act):
    """Runs `act(checkpoints, progress of the newest)` in one worker."""

    def inside(rank):
        session = Session(config, config.data, [u for phase in phases_of(config) for u in phase.cycle])
        kept = Checkpoints(f"{config.run}/checkpoints", session, 1)
        act(kept, kept.load(kept.newest()))
        session.close()

    on_workers(1, inside)


def test_older_checkpoints_that_cannot_be_removed_cost_nothing(tmp_path):
    config = from_words(finished(tmp_path / "run"))

    def act(kept, progress):
        progress.step = 11
        kept.save(progress)
        progress.step = 12
        with replaced(storage, "remove_folder", broken):
            kept.save(progress)
        assert [s.step for s in checkpoint.complete(f"{config.run}/checkpoints")] == [10, 12]  # the best, the newest
        assert Path(f"{config.run}/checkpoints/step-00000011").exists()
        progress.step = 13
        kept.save(progress)
        assert sorted(p.name[-2:] for p in Path(f"{config.run}/checkpoints").iterdir()) == ["10", "13"]

    alone(config, act)


def test_what_one_worker_cannot_write_no_worker_completes(tmp_path):
    config = from_words(finished(tmp_path / "run"))
    on_workers(2, save_where_worker_1_cannot, config)
    assert [p.name for p in Path(f"{config.run}/checkpoints").iterdir()] == ["step-00000010"]


def save_where_worker_1_cannot(rank, config):
    session = Session(config, config.data, [u for phase in phases_of(config) for u in phase.cycle])
    kept = Checkpoints(f"{config.run}/checkpoints", session, 1)
    progress = kept.load(kept.newest())
    progress.step = 11
    fails = replaced(checkpoint, "write_rows", broken) if rank else contextlib.nullcontext()
    with fails, pytest.raises(UserError, match=r"no room.*earlier ones are intact"):
        kept.save(progress)
    session.close()


def test_a_job_that_lost_its_lease_removes_nothing(tmp_path):
    """It finds out when its files are there: by then the folder may be another job's."""
    config = from_words(finished(tmp_path / "run"))

    def act(kept, progress):
        asked = []

        def lost():
            asked.append(True)
            if len(asked) == 2:  # not when it begins, but when it would complete the checkpoint
                raise lease.LeaseLostError("lost")

        kept._still_ours, progress.step = lost, 11
        with pytest.raises(UserError, match="lost"):
            kept.save(progress)
        assert {p.name for p in Path(f"{config.run}/checkpoints/step-00000011").iterdir()} == {
            "rows-00000-of-00001.bin",
            "rows-00000-of-00001.json",
            "dense.pt",
            "place.json",
        }

    alone(config, act)


@pytest.mark.parametrize(("error", "words"), [(storage.StorageError, "no answer"), (storage.NotFoundError, "damaged")])
def test_a_store_that_does_not_answer_is_not_a_damaged_checkpoint(error, words, tmp_path):
    given = finished(tmp_path / "run")

    read = storage.read_range

    def fails(uri, *span):
        if uri.endswith("rows-00000-of-00001.bin"):
            raise error("no answer within 60 s")
        return read(uri, *span)

    with replaced(storage, "read_range", fails), pytest.raises(UserError, match=words) as told:
        train([*given, "trainer.max_steps=20"])
    assert ("delete it" in str(told.value)) == (words == "damaged")


def test_a_lease_lives_through_a_store_that_does_not_answer_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.02)
    answer = storage.read_bytes
    silent = threading.Event()

    def read(uri):
        if silent.is_set():
            raise storage.StorageError(f"{uri}: no answer within 60 s")
        return answer(uri)

    monkeypatch.setattr(storage, "read_bytes", read)
    with Lease(str(tmp_path)) as held:
        silent.set()
        time.sleep(0.2)
        with pytest.raises(storage.StorageError):
            lease.check(str(tmp_path / lease.FILE), held.token)
        silent.clear()
        first = json.loads((tmp_path / lease.FILE).read_text())["beats"]
        time.sleep(0.2)
        assert json.loads((tmp_path / lease.FILE).read_text())["beats"] > first
        silent.set()  # nor does its end raise anything


@pytest.mark.parametrize("shown", [1, 9])
def test_a_lease_that_shows_nothing_for_a_moment_is_not_lost(shown, tmp_path, monkeypatch):
    """While a sign of life replaces the one before; one that never says who holds it again is."""
    with lease.Lease(str(tmp_path)) as held:
        whole, asked = storage.read_bytes, []

        def flickering(uri, *more):
            asked.append(uri)
            return b"" if len(asked) <= shown else whole(uri, *more)

        monkeypatch.setattr(storage, "read_bytes", flickering)
        monkeypatch.setattr(lease.time, "sleep", lambda _: None)
        if shown < lease.READS:
            lease.check(str(tmp_path / lease.FILE), held.token)
        else:
            with pytest.raises(lease.LeaseLostError):
                lease.check(str(tmp_path / lease.FILE), held.token)
