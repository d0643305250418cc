"""make soak: a run that is killed a hundred times at random moments ends with the bits of one that never was."""

from __future__ import annotations

import os
import random

import pytest

from cdr_dist.training.job import train_job
from tests.crashes import KILLED, job
from tests.datasets import rated
from tests.runs import same_run, steps_of, words

KILLS = int(os.environ.get("CDR_KILLS", "100"))
SEED = int(os.environ.get("CDR_SEED", "8"))


def given(run):
    often = ("trainer.checkpoint_every=5", "trainer.keep=2", "evaluation.every=100", "evaluation.patience=0")
    return words(
        rated(), run, "recipe=biao", "upper.interval=7", "trainer.max_steps=6000", "trainer.epochs=400", *often
    )


@pytest.mark.soak
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    draw, run, screen = random.Random(SEED), tmp_path / "run", tmp_path / "screen"
    kills = 0
    for _ in range(20 * KILLS):
        if kills == KILLS:
            break
        # A job takes about a second to its first step; most of them get some steps further.
        code = job("train", train_job, given(run), screen=screen, killed_after_s=draw.uniform(0.05, 3.0))
        assert code in (0, KILLED), screen.read_text()
        assert code == KILLED, f"done after {kills} kills, at step {steps_of(run)}: more steps are needed"
        kills += 1
    print(f"{kills} kills, the last at a checkpoint of step {steps_of(run) if (run / 'checkpoints').exists() else 0}")
    assert job("train", train_job, given(run), screen=screen) == 0, screen.read_text()
    assert "Traceback" not in screen.read_text()
    assert job("train", train_job, given(tmp_path / "whole")) == 0
    same_run(tmp_path / "whole", run)
