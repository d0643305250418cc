"""The training job on Ray Train workers: the same bits as without Ray, through lost workers and a lost driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.datasets import copied, rated
from tests.runs import lines, same_run, steps_of, train, words

ROOT = Path(__file__).parents[1]
MORE = ["recipe=biao", "trainer.max_steps=300", "trainer.epochs=20", "evaluation.patience=0", "hypergradient.alpha=0.1"]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class Job:
    """jobs/train.py in a process of its own, with every process that it starts; none outlives the test."""

    def __init__(self, given, folder):
        self._files = [folder / "stdout", folder / "stderr"]
        self._run = Path(next(word[4:] for word in given if word.startswith("run=")))
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        with self._files[0].open("w") as out, self._files[1].open("w") as error:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "jobs" / "train.py", *given],
                stdout=out,
                stderr=error,
                env=environment,
                cwd=folder,
            )
        self._started = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._look()
        for process in [psutil.Process(self.process.pid)] if self.process.poll() is None else []:
            process.kill()
        for process in self._started.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(30)

    def workers(self):
        """The processes of the Ray Train workers, among our own descendants."""
        return [p for p in self._look() if "TrainWorker" in _title(p)]

    def until(self, step, timeout=400):
        """Waits for a checkpoint at `step` or later; its step."""
        end = time.monotonic() + timeout
        while (reached := steps_of(self._run)) < step:
            assert self.process.poll() is None, self.error()
            assert time.monotonic() < end, self.error()
            time.sleep(0.01)
        self._look()
        return reached

    def wait(self):
        return self.process.wait(400)

    def out(self):
        return self._files[0].read_text()

    def error(self):
        return self._files[1].read_text()

    def _look(self):
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.process.pid).children(recursive=True)
        self._started |= {p.pid: p for p in found}
        return found


def _title(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def without_ray(tmp_path_factory):
    """The same run on two gloo workers, uninterrupted."""
    run = tmp_path_factory.mktemp("gloo") / "run"
    train(words(rated(), run, *MORE), 2)
    return run


@pytest.mark.soak  # of a cluster that is there already, tests/test_ray_submit.py
def test_two_ray_workers_give_the_bits_of_two_gloo_workers(without_ray, tmp_path):
    """From a folder elsewhere, with paths relative to it; and nothing but our own lines on the screen."""
    (tmp_path / "data").symlink_to(rated())
    given = [*words("data", tmp_path / "run", *MORE), "trainer.workers=2", "trainer.checkpoint_every=10"]
    with Job(given, tmp_path) as job:
        assert job.wait() == 0, job.error()
        assert job.out().startswith("biao: test AUC 0.")
        assert len(job.out().splitlines()) == 1
        first, *shown = job.error().splitlines()
        assert first == "starting a local Ray for 2 workers, about half a minute"
        assert all(line.startswith("biao seed 8  step ") for line in shown), job.error()
        assert len(shown) == len(lines(tmp_path / "run", "train", "valid"))
    same_run(without_ray, tmp_path / "run")


@pytest.mark.soak  # the stop also in tests/test_ray_submit.py
def test_a_lost_worker_and_a_stop_change_no_bit(without_ray, tmp_path):
    run, given = lasting(tmp_path)
    with Job(given, tmp_path) as job:
        job.until(20)
        first = job.workers()
        assert len(first) == 2
        first[1].send_signal(signal.SIGKILL)
        job.until(steps_of(run) + 20)
        assert "starting again from the newest checkpoint (1 of 2 times)" in job.error()
        assert not {p.pid for p in first} & {p.pid for p in job.workers()}
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 143, job.error()
        assert job.error().splitlines()[-1] == f"train: {run}: stopped; the same command continues"
        assert "Traceback" not in job.error()
    assert 40 <= steps_of(run) < 300
    train(given, 2)
    same_run(without_ray, run)


@pytest.mark.soak
def test_a_lost_driver_changes_no_bit(without_ray, tmp_path):
    run, given = lasting(tmp_path)
    with Job(given, tmp_path) as job:
        job.until(20)
        job.process.send_signal(signal.SIGKILL)
        job.wait()
    with Job(given, tmp_path) as job:
        assert job.wait() == 0, job.error()
    same_run(without_ray, run)


@pytest.mark.soak
def test_a_worker_that_hangs_is_noticed_and_changes_no_bit(without_ray, tmp_path):
    run, given = lasting(tmp_path)
    with Job([*given, "trainer.hang_s=15"], tmp_path) as job:
        job.until(20)
        hanging = job.workers()[1]
        hanging.send_signal(signal.SIGSTOP)
        began, reached = time.monotonic(), steps_of(run)
        job.until(reached + 20)
        assert time.monotonic() - began < 120
        assert "starting again from the newest checkpoint (1 of 2 times)" in job.error()
        assert job.wait() == 0, job.error()
        assert not hanging.is_running()
    same_run(without_ray, run)


def lasting(folder):
    """The run, and the words of one that is long enough to be disturbed."""
    run = folder / "run"
    return run, [*words(rated(), run, *MORE), "trainer.workers=2", "trainer.checkpoint_every=10"]


def test_ray_train_still_has_the_handler_of_ctrl_c_that_we_leave_out():
    """`launch._trainer` overrides it; under another name it would abort runs again."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert callable(vars(DataParallelTrainer)["_register_sigint_handler"])


@pytest.mark.soak  # of a cluster that is there already, tests/test_ray_submit.py
def test_what_a_worker_finds_wrong_is_one_line(tmp_path):
    """A damaged page that the size does not show: found by the worker that reads it, while it trains."""
    dataset = copied(rated(), tmp_path)
    shard = dataset / "train" / "part-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[100:2000] = bytes(1900)
    shard.write_bytes(content)
    with Job([*words(dataset, tmp_path / "run"), "trainer.workers=2", "trainer.verify=size"], tmp_path) as job:
        assert job.wait() == 2, job.error()
        assert job.out() == ""
        assert len(job.error().splitlines()) == 2, job.error()
        assert job.error().splitlines()[1].startswith(f"train: {shard}: cannot be read (")
    assert not (tmp_path / "run").exists()
