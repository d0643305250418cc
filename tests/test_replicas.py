"""Two workers whose copies of the dense parameters drift apart are noticed."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist

from cdr_dist.training.lower import Lower
from tests.datasets import rated
from tests.problem import replaced
from tests.runs import train, words


@contextlib.contextmanager
def one_bit_flips():
    """On worker 1, in the last bit of one bias, at the end of step 8: another step's rounding might hide it."""
    original = Lower.run

    def run(update, stop_wanted):
        values = original(update, stop_wanted)
        s = update._session
        if s.passes["lower"] == 8 and dist.get_rank() == 1:
            s.model.target_head.bias.data.view(torch.int32).bitwise_xor_(1)
        return values

    with replaced(Lower, "run", run):
        yield


def test_a_bit_that_differs_between_workers_ends_the_run(tmp_path):
    given = words(rated(), tmp_path / "run", "recipe=biao", "trainer.max_steps=10", "trainer.compare_every=4")
    with pytest.raises(AssertionError, match="step 8: dense parameters differ between workers"):
        train(given, 2, within=one_bit_flips)
    train(given, 2)
