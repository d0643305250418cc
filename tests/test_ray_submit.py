"""`ray job submit` to a running head with tokens on: runs on S3; in a soak a whole life, with a job that is stopped."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import polars as pl
import psutil
import pytest

from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.synthetic import planted_logs
from cdr_dist.training import checkpoint
from tests import datasets
from tests.processes import free_port
from tests.runs import lines, summary, train, words
from tests.stores import QUICK_WORDS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MORE = ["recipe=biao", "trainer.max_steps=200", "trainer.epochs=20", "evaluation.patience=0", "hypergradient.alpha=0.1"]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class Head:
    """`ray start --head --block` as a child; it and all that it started are gone at the end of the block."""

    def __init__(self, folder):
        token = folder / "token"
        token.write_text(secrets.token_hex(24))
        token.chmod(0o600)
        self.port, dashboard, self.metrics = free_port(), free_port(), free_port()
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",  # what `ray job stop` waits after SIGTERM; 3 by default
            "RAY_metrics_report_interval_ms": "500",
            "COLUMNS": "200",
        }
        self.address = f"http://127.0.0.1:{dashboard}"
        self._said = folder / "head.txt"
        # Sockets' paths must be short.
        self._temporary = Path("/tmp") / f"cdr-{secrets.token_hex(3)}"
        given = [f"--port={self.port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", "--num-cpus=4"]
        given += [f"--metrics-export-port={self.metrics}"]
        given += [f"--temp-dir={self._temporary}", "--disable-usage-stats"]
        with self._said.open("w") as out:
            self._process = subprocess.Popen(
                [BIN / "ray", "start", "--head", "--block", *given], env=self.environment, stdout=out, stderr=out
            )
        self._started = {}

    def __enter__(self):
        """Until it takes a job: it answers before its agent is there to start one."""
        end = time.monotonic() + 120
        while self.cli("submit", "--no-wait", "--", "true", check=False).returncode:
            assert self._process.poll() is None, self._said.read_text()
            assert time.monotonic() < end, self._said.read_text()
            time.sleep(1)
        return self

    def __exit__(self, *_):
        self._look()
        self._process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._process.kill()
        self._process.wait(30)
        for process in self._started.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)

    @contextlib.contextmanager
    def watched(self, wanted):
        """Looks at what Prometheus would, all the time -> a list that gets the first line with each of the texts."""
        found, over = {}, threading.Event()

        def look():
            while not over.wait(0.3):
                with contextlib.suppress(OSError):
                    page = urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=5).read().decode()
                    for line in page.splitlines():
                        for text in wanted:
                            if text in line and not line.startswith("#"):
                                found.setdefault(text, line)

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join(10)

    def cli(self, *given, check=True, timeout=400, environment=None):
        """`ray job …`, from the project's folder."""
        command, *rest = given
        done = subprocess.run(
            [BIN / "ray", "job", command, "--address", self.address, *rest],
            cwd=ROOT,
            env=environment or self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        self._look()
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def submit(self, name, *command, check=True, wait=True):
        """The exit code, and what the job itself said."""
        how = [] if wait else ["--no-wait"]
        done = self.cli(
            "submit", "--submission-id", name, "--working-dir", ".", *how, "--", "python", *command, check=check
        )
        return done.returncode, self.said(name) if wait else ""

    def said(self, name):
        """A job's log without Ray's own lines; asked for as `ray job logs` does, which loads Ray for it."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        asked = urllib.request.Request(f"{self.address}/api/jobs/{name}/logs")
        asked.add_header("Authorization", f"Bearer {token}")
        with urllib.request.urlopen(asked, timeout=60) as answer:
            log = json.load(answer)["logs"]
        assert "\r" not in log
        ours = log.partition("Running entrypoint for job")[2].partition("\n")[2]
        return [line for line in ours.splitlines() if line and "\x1b[" not in line and " -- " not in line]

    def _look(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            self._started |= {p.pid: p for p in psutil.Process(self._process.pid).children(recursive=True)}


@pytest.fixture(scope="module")
def head(proxy, tmp_path_factory):
    """It gets the store's address and credentials as a pod would, from its environment."""
    with Head(tmp_path_factory.mktemp("head")) as started:
        yield started


def test_a_submitted_job_gives_the_bits_of_two_local_workers(head, store, tmp_path):
    run = "s3://bucket/submitted/once"
    asked = [*words(datasets.rated(), run, *MORE), *QUICK_WORDS, "trainer.workers=2"]
    with head.watched(["ray_cdr_dist_step", 'name="target_loss"']) as seen:
        _, said = head.submit("once", "jobs/train.py", *asked)
    assert f'run="{run}"' in seen["ray_cdr_dist_step"]
    assert 'split="train"' in seen['name="target_loss"']
    assert said[-1].startswith("biao: test AUC 0."), said
    assert all(line.startswith("biao seed 8  step ") for line in said[:-1]), said
    as_two_local_workers(run, tmp_path)


@pytest.mark.soak
def test_jobs_of_a_whole_life_end_well_and_one_that_is_stopped_goes_on(head, store, tmp_path):
    logs, base = planted_logs(datasets.SHAPE), "s3://bucket/submitted"
    for role in ("source", "target"):
        path = tmp_path / f"{role}.parquet"
        getattr(logs, role).write_parquet(path)
        storage.write_bytes(f"{base}/logs/{role}.parquet", path.read_bytes())
    given = [f"{role}={base}/logs/{role}.parquet" for role in ("source", "target")]
    data, run = f"{base}/data", f"{base}/run"

    _, said = head.submit("prepare", "jobs/prepare.py", *given, f"out={data}", "rows_per_shard=300", "workers=2")
    assert any(line.startswith("users ") and "300" in line for line in said), said
    assert [s.sha256 for s in read_manifest(data).shards["train"]] == [
        s.sha256 for s in read_manifest(str(datasets.rated())).shards["train"]
    ]

    asked = [*words(data, run, *MORE), *QUICK_WORDS, "trainer.workers=2", "trainer.checkpoint_every=0"]
    head.submit("train-1", "jobs/train.py", *asked, wait=False)
    end = time.monotonic() + 200
    while (reached := step_of(run)) < 19:
        assert time.monotonic() < end, head.said("train-1")
        time.sleep(0.2)
    head.cli("stop", "train-1")
    assert "stopped; the same command continues" in head.said("train-1")[-1]
    assert not storage.exists(f"{run}/summary.json")
    kept = step_of(run)
    assert kept >= reached

    _, said = head.submit("train-2", "jobs/train.py", *asked)
    assert said[-1].startswith("biao: test AUC 0."), said
    assert all(line.startswith("biao seed 8  step ") for line in said[:-1]), said
    shown = [int(line.split()[4]) for line in said[:-1]]
    assert min(shown) >= kept, "it goes on where it was stopped, if need be with that step's validation"
    found = as_two_local_workers(run, tmp_path)

    _, said = head.submit("evaluate", "jobs/evaluate.py", f"run={run}")
    assert json.loads("".join(said))["metrics"] == found["metrics"]["test"]

    _, said = head.submit("recommend", "jobs/recommend.py", f"run={run}", "top=5", f"out={base}/top5", "workers=2")
    assert said[0].startswith(f"{base}/top5: up to 5 items for 300 users"), said
    parts = [name for name in storage.names(f"{base}/top5") if name.startswith("part-")]
    rows = pl.concat(pl.read_parquet(storage.read_bytes(f"{base}/top5/{name}")) for name in parts)
    assert rows["user_id"].n_unique() == 300
    assert set(rows["item_id"].list.len()) == {5}


def test_what_a_worker_finds_wrong_is_one_line_of_the_log_and_no_success(head, store, tmp_path):
    """A damaged page that the size does not show."""
    dataset = datasets.copied(datasets.rated(), tmp_path)
    shard = dataset / "train" / "part-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[100:2000] = bytes(1900)
    shard.write_bytes(content)
    given = [*words(dataset, tmp_path / "run", *MORE), "trainer.workers=2", "trainer.verify=size"]
    code, (line,) = head.submit("wrong", "jobs/train.py", *given, check=False)
    assert code == 1
    assert line.startswith(f"train: {shard}: cannot be read ("), line
    assert "failed with exit code 2" in head.cli("status", "wrong").stdout
    assert not (tmp_path / "run").exists()


def test_a_wrong_token_and_a_cluster_that_is_not_there_are_one_line(head, tmp_path):
    (tmp_path / "token").write_text(secrets.token_hex(24))
    wrong = head.environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    refused = head.cli("list", check=False, environment=wrong)
    assert refused.returncode != 0
    assert "raysubmit" not in refused.stdout
    given = words(datasets.rated(), tmp_path / "run", "trainer.workers=2")
    asked = [  # side by side: each waits for a quarter of a minute
        ("train", given, head.port, "answers, but does not let this program in; is the cluster's token in "),
        ("prepare", preparing(tmp_path), free_port(), "no Ray cluster answers there (Connection refused)"),
    ]
    started = [
        subprocess.Popen(
            [sys.executable, ROOT / "jobs" / f"{job}.py", *more],
            env=wrong | {"RAY_ADDRESS": f"127.0.0.1:{port}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for job, more, port, _ in asked
    ]
    for process, (job, _, port, message) in zip(started, asked, strict=True):
        out, error = process.communicate(timeout=120)
        assert (process.returncode, out) == (2, ""), error
        (line,) = error.splitlines()
        assert line.startswith(f"{job}: RAY_ADDRESS=127.0.0.1:{port}: {message}"), line
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "prepared").exists()


def as_two_local_workers(run, folder):
    """Trains the same undisturbed and compares -> the run's summary."""
    undisturbed = folder / "undisturbed"
    train(words(datasets.rated(), undisturbed, *MORE), 2)
    found = json.loads(storage.read_bytes(f"{run}/summary.json"))
    for name in ("parameters_sha256", "metrics", "best", "steps"):
        assert found[name] == summary(undisturbed)[name], name
    assert written_lines(run) == lines(undisturbed, "upper", "valid")
    return found


def preparing(folder):
    for role in ("source", "target"):
        getattr(planted_logs(datasets.SHAPE), role).write_parquet(folder / f"{role}.parquet")
    logs = [f"{role}={folder / role}.parquet" for role in ("source", "target")]
    return [*logs, f"out={folder / 'prepared'}", "workers=2"]


def step_of(run):
    found = checkpoint.newest(f"{run}/checkpoints")
    return found.step if found else 0


def written_lines(run):
    found = [json.loads(line) for line in storage.read_bytes(f"{run}/metrics.jsonl").decode().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in found if line["split"] in ("upper", "valid")]
