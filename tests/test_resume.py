"""Laws 2, 3 and 4 for whole runs: killed anywhere and resumed, on any number of workers; incomplete checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.feed import Feed
from cdr_dist.embeddings import tables as tables_module
from cdr_dist.embeddings.initialisation import normal_rows
from cdr_dist.errors import UserError
from cdr_dist.jobs import run_job
from cdr_dist.training import checkpoint
from cdr_dist.training.checkpoint import COMPLETE, Checkpoints, Progress
from cdr_dist.training.job import train_job
from cdr_dist.training.lower import Lower
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests.datasets import rated, rows_of, sampled, scratch
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import KILLED, distances, lines, newest, same_run, steps_of, summary, tensors, train, words

ROOT = Path(__file__).parents[1]


def test_speed_leaves_out_the_first_steps_of_every_start_and_what_they_waited_for(tmp_path, monkeypatch):
    given = words(rated(), tmp_path / "run", "recipe=joint")
    whole = Feed.peek

    def slow(feed):
        feed.waited_s += 5.0 * ((feed.place.epoch, feed.place.step) < (2, 18))
        return whole(feed)

    monkeypatch.setattr(Feed, "peek", slow)
    for most, counted in ((18, False), (36, False), (60, True)):
        train([*given, f"trainer.max_steps={most}"])
        found = summary(tmp_path / "run")["throughput"]
        assert (found["examples_per_s"] is not None) == counted
    assert 0 <= found["stall_share"] < 1


PLACES = {
    "inside a cycle": (4, 6, False),
    "right before an upper update": (7, 8, False),
    "right after an upper update": (8, 10, False),
    "while an upper update ends": (13, 14, True),
    "before the short last step of an epoch": (18, 18, False),
    "at the end of an epoch": (19, 21, False),
    "in the second epoch": (26, 29, False),
}
"""(step of the newest checkpoint, lower updates after which the run dies, whether it dies in an upper update)"""


@functools.cache
def uninterrupted(recipe, workers=1, *more):
    run = scratch() / f"{recipe}-{workers}-{len(more)}-{'-'.join(more).replace('/', '_')}"
    train(words(rated(), run, f"recipe={recipe}", *more), workers)
    return run


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("recipe", ["joint", "biao"])
def test_killed_anywhere_and_resumed_gives_the_same_bits(recipe, place, tmp_path):
    check_resume(recipe, PLACES[place], tmp_path / "run")


@pytest.mark.parametrize("recipe", ["joint", "biao"])
def test_two_workers_killed_and_resumed_give_the_same_bits(recipe, tmp_path):
    check_resume(recipe, (13, 16, False), tmp_path / "run", workers=2)


def check_resume(recipe, place, run, workers=1, within=None):
    at, dies_after, in_upper = place
    given = words(rated(), run, f"recipe={recipe}")
    # Only the checkpoint at `at` is there when the run dies: a cadence is free to differ.
    first = train(
        [*given, f"trainer.checkpoint_every={at}"], workers, dies_after, in_upper and recipe == "biao", within
    )
    assert first == [KILLED] * workers
    assert newest(run).name == f"step-{at:08d}"
    train(given, workers, within=within)
    same_run(uninterrupted(recipe, workers), run)


def test_killed_again_and_again_gives_the_same_bits(tmp_path):
    run = tmp_path / "run"
    given = words(rated(), run, "recipe=biao")
    for step in range(1, 22, 2):
        assert train([*given, "trainer.checkpoint_every=1"], killed_after=step) == [KILLED]
    train(given)
    same_run(uninterrupted("biao"), run)


OTHER_WAYS = {
    "a refreshed head": ["upper.head_refresh=dev:2", "upper.optimiser=adam"],
    "a rotating hold-out": ["upper.dev=rotating", "upper.hold_out=0.5"],
    "a dev set apart": ["upper.dev=split", "upper.split=0.2"],
}


@pytest.mark.parametrize("way", OTHER_WAYS)
def test_negatives_and_other_upper_levels_resume_too(way, tmp_path):
    more = ["recipe=biao", "evaluation.ks=[1,3]", *OTHER_WAYS[way]]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(words(sampled(), whole, *more))
    assert train(words(sampled(), run, *more, "trainer.checkpoint_every=9"), killed_after=15) == [KILLED]
    train(words(sampled(), run, *more))
    same_run(whole, run)


def test_more_steps_continue_a_finished_run(tmp_path):
    run = tmp_path / "run"
    train(words(rated(), run, "recipe=biao", "trainer.max_steps=10"))
    assert summary(run)["steps"] == 10
    train(words(rated(), run, "recipe=biao"))
    # It was measured once more, at step 10; every bit of the parameters is the same.
    assert summary(run)["parameters_sha256"] == summary(uninterrupted("biao"))["parameters_sha256"]
    assert lines(run, "upper") == lines(uninterrupted("biao"), "upper")


# ---- other numbers of workers -------------------------------------------------------------------------------------

LONG = (
    "trainer.max_steps=200",
    "trainer.epochs=20",
    "upper.interval=20",
    "upper.lr=5",
    "hypergradient.alpha=0.1",
    "evaluation.every=100",
)
SEEDS = (2, 3, 4)


@pytest.mark.parametrize("workers", [2, 3])
def test_whole_runs_agree_on_any_number_of_workers(workers):
    """To 1e-5, unless a ReLU whose input is 0 to all digits falls to the other side: its jump then grows.

    That is so with about one seed in three, on one machine or another; an error of ours would be there with every seed.
    """
    for seed in SEEDS:
        one, many = (uninterrupted("biao", n, *LONG, f"seed={seed}") for n in (1, workers))
        assert summary(one)["upper_steps"] == summary(many)["upper_steps"] == 9
        apart = distances(one, many)
        if max(apart.values()) < 1e-5:
            return
    pytest.fail(f"{apart}")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
def test_resumed_on_another_number_of_workers(before, after, tmp_path):
    """Exactly-once rows of every epoch, and tensors close to those of the uninterrupted run."""
    run, seen = tmp_path / "run", tmp_path / "seen"
    seen.mkdir()
    given = words(rated(), run, "recipe=biao")
    within = functools.partial(recording, str(seen))
    first = train([*given, "trainer.checkpoint_every=25"], before, killed_after=25, within=within)
    assert first == [KILLED] * before
    train(given, after, within=within)
    examples = pl.concat([pl.read_parquet(path) for path in seen.glob("*.parquet")])
    assert sorted(rows_of(rated(), "train")["example_id"]) == sorted(examples.filter(pl.col("epoch") == 1)["example"])
    assert sorted(rows_of(rated(), "train")["example_id"]) == sorted(examples.filter(pl.col("epoch") == 0)["example"])
    apart = distances(uninterrupted("biao"), run)
    assert max(apart.values()) < 1e-4, apart


class recording:  # noqa: N801 - a context manager, used like a function
    """Writes the examples that every lower update of this worker trains on."""

    def __init__(self, folder):
        self._folder, self._rows, self._run = folder, [], Lower.run

    def __enter__(self):
        original, rows = self._run, self._rows

        def run(update, stop_wanted):
            fed = update._session.lower.peek()
            values = original(update, stop_wanted)
            kept = fed.batch.weight > 0
            rows.extend((fed.place.epoch, example) for example in fed.batch.example[kept].tolist())
            return values

        Lower.run = run

    def __exit__(self, *_):
        Lower.run = self._run
        frame = pl.DataFrame(self._rows, schema={"epoch": pl.Int64, "example": pl.Int64}, orient="row")
        with tempfile.NamedTemporaryFile(dir=self._folder, suffix=".parquet", delete=False) as out:
            frame.write_parquet(out)


def saved_again(rank, given, start, end):
    """Loads the newest checkpoint of `start` and saves it in `end`."""
    config = from_words(given)
    session = Session(config, config.data, [u for phase in phases_of(config) for u in phase.cycle])
    old, new = (Checkpoints(f"{run}/checkpoints", session, 1) for run in (start, end))
    new.save(old.load(old.newest()))
    session.close()


def test_loaded_by_two_then_one_then_three_workers_nothing_changes(tmp_path):
    given = words(rated(), tmp_path / "2", "recipe=biao", "trainer.max_steps=10")
    train(given, 2)
    for start, end in ((2, 1), (1, 3)):
        on_workers(end, saved_again, given, str(tmp_path / str(start)), str(tmp_path / str(end)))
    first, *others = (tensors(tmp_path / str(n)) for n in (2, 1, 3))
    assert len(list(newest(tmp_path / "3").glob("rows-*.bin"))) == 3
    assert any(name.endswith("user.state0") and bool(value.any()) for name, value in first.items())
    for other in others:
        assert other.keys() == first.keys()
        assert [name for name in first if not torch.equal(first[name], other[name])] == []


# ---- incomplete and damaged checkpoints -----------------------------------------------------------------------------


def killed_run(run, *more):
    """Dead after step 17 with checkpoints at 5, 10 and 15."""
    given = words(rated(), run, "recipe=biao", "trainer.keep=5", *more)
    assert train([*given, "trainer.checkpoint_every=5"], killed_after=17) == [KILLED]
    return given


@pytest.mark.parametrize("damage", ["no mark", "cut short", "no tables"])
def test_an_incomplete_checkpoint_is_passed_over(damage, tmp_path):
    run = tmp_path / "run"
    given = killed_run(run)
    last = newest(run)
    assert last.name == "step-00000015"
    (last / COMPLETE).unlink()
    if damage == "cut short":
        for path in [p for p in last.rglob("*") if p.is_file()]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "no tables":
        for path in last.glob("rows-*"):
            path.unlink()
    shutil.copytree(last, run / "checkpoints" / "step-00000016")  # and what a kill while writing leaves
    train(given)
    same_run(uninterrupted("biao"), run)
    assert not (run / "checkpoints" / "step-00000016").exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    given = killed_run(tmp_path / "run")
    last = newest(tmp_path / "run")
    (last / "dense.pt").write_bytes((last / "dense.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"step-00000015: damaged checkpoint .* the one before"):
        train(given)
    shutil.rmtree(last)
    train(given)
    same_run(uninterrupted("biao"), tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def check_no_room(run, fills, frees, reason, how="in_place"):
    """Checkpoints at 5 and 10; no room from step 12 on; with room again, the run ends as if nothing had been.

    In the background, that of step 10 may still be on its way when the room ends.
    """
    given = words(rated(), run, "recipe=biao", "trainer.checkpoint_every=5", f"trainer.checkpoint={how}")
    try:
        with at_step(12, fills), pytest.raises(UserError, match="checkpoint could not be written") as error:
            train(given)
    finally:
        frees()
    assert f"({reason})" in str(error.value)
    assert "\n" not in str(error.value)
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left in (["step-00000005", "step-00000010"], ["step-00000005"] if how == "background" else None)
    train(given)
    same_run(uninterrupted("biao"), run)


@pytest.mark.parametrize("how", ["in_place", "background"])
def test_a_full_disk_costs_no_checkpoint(how, small_disk):
    def fill():
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as out:
            while True:
                out.write(b"x" * 4096)
                out.flush()

    # Room for metrics.jsonl is not what runs out first: a page is left of it.
    check_no_room(small_disk / "run", fill, (small_disk / "filler").unlink, "No space left on device", how)


def test_a_file_size_limit_costs_no_checkpoint(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    check_no_room(tmp_path / "run", lambda: limit((8192, before[1])), lambda: limit(before), "File too large")


# ---- told to stop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [5, 19, 40], ids=["inside a cycle", "at a validation", "at the last step"])
def test_told_to_stop_it_finishes_the_step_and_continues_later(step, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    given = words(rated(), run, "recipe=biao")
    monkeypatch.setattr("sys.argv", ["train.py", *given])
    with at_step(step - 2, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        assert run_job("train", None, train_job) == 143
    assert capsys.readouterr().err.splitlines()[-1] == f"train: {run}: stopped; the same command continues"
    assert newest(run).name == f"step-{step:08d}"
    assert run_job("train", None, train_job) == 0
    same_run(uninterrupted("biao"), run)
    capsys.readouterr()
    assert run_job("train", None, train_job) == 0
    assert capsys.readouterr().err == f"{run}: already finished (40 steps)\n"


@contextlib.contextmanager
def at_step(step, do):
    """Calls `do` before the lower update that follows `step` of them."""
    run = Lower.run

    def does(self, stop_wanted):
        if self._session.passes["lower"] == step:
            do()
        return run(self, stop_wanted)

    with replaced(Lower, "run", does):
        yield


def test_the_job_stopped_then_killed_ends_with_the_same_bits(tmp_path):
    """The real thing: jobs/train.py, Ctrl-C, again, SIGTERM, again, SIGKILL, again."""
    run = tmp_path / "run"
    more = ("trainer.max_steps=200", "trainer.epochs=20", "evaluation.patience=0")
    given = [*words(rated(), run, "recipe=biao", *more), "trainer.checkpoint_every=10"]
    assert ended_at(10, given, run, signal.SIGINT) == 130
    assert ended_at(steps_of(run) + 20, given, run, signal.SIGTERM) == 143
    assert ended_at(steps_of(run) + 40, given, run, signal.SIGKILL) == -signal.SIGKILL
    assert 60 <= steps_of(run) < 200
    train(given)
    same_run(uninterrupted("biao", 1, *more), run)


def ended_at(step, given, run, told):
    """Starts the job, sends it a signal once it has a checkpoint at `step` or later, and returns its exit code."""
    job = subprocess.Popen([sys.executable, ROOT / "jobs" / "train.py", *given], stderr=subprocess.PIPE, text=True)
    while steps_of(run) < step and job.poll() is None:
        time.sleep(0.005)
    job.send_signal(told)
    error = job.communicate(timeout=60)[1]
    assert "Traceback" not in error, error
    return job.returncode


# ---- mutations that the claims above must catch --------------------------------------------------------------------


def without_fused_state():
    whole = checkpoint.parts_of
    return replaced(checkpoint, "parts_of", lambda s: {k: v for k, v in whole(s).items() if k[1] == "weights"})


def without_position():
    whole = Progress.from_json

    def lost(text):
        progress = whole(text)
        progress.position = 0
        return progress

    return replaced(Progress, "from_json", staticmethod(lost))


def without_dev_place():
    whole = Progress.from_json

    def lost(text):
        progress = whole(text)
        progress.dev = type(progress.dev)()
        return progress

    return replaced(Progress, "from_json", staticmethod(lost))


@pytest.mark.parametrize("within", [without_fused_state, without_position, without_dev_place])
def test_a_checkpoint_that_forgets_is_seen(within, tmp_path):
    with pytest.raises(AssertionError):
        check_resume("biao", (17, 18, False), tmp_path / "run", within=within)


def by_shard():
    return replaced(tables_module, "normal_rows", lambda seed, name, first, *rest: normal_rows(seed, name, 0, *rest))


def test_initialisation_by_shard_is_seen(tmp_path):
    train(words(rated(), tmp_path / "run", "recipe=biao"), 2, within=by_shard)
    assert max(distances(uninterrupted("biao"), tmp_path / "run").values()) > 1e-4
    assert tensors(tmp_path / "run").keys() == tensors(uninterrupted("biao")).keys()
