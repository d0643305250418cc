"""tools/hypergradient_cosine.py: more terms come nearer to the converged hypergradient, in length and direction."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from hypergradient_cosine import against

from tests.datasets import rated
from tests.forks import python

TOOL = Path(__file__).parents[1] / "tools" / "hypergradient_cosine.py"


def test_cosine_and_ratio_of_norms():
    one = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]])}
    other = {"b": torch.tensor([[10.0]]), "a": torch.tensor([0.0, 0.0])}
    assert against(one, other) == pytest.approx((0.8, 0.5))
    assert math.isnan(against(one, {"a": torch.zeros(2), "b": torch.ones(1, 1) * math.nan})[0])


def test_the_tool_measures_on_a_training():
    given = [f"data={rated()}", "batch.size=64", "damping=0.1,0.5", "every=5", "steps=3", "trainer.epochs=4"]
    theta = "hypergradient.theta=[user,target_item]"
    done = python([TOOL, *given, theta])
    assert done.code == 0, done.error
    for line in done.out.splitlines()[-2:]:
        assert "3 of 3" in line
        found = [tuple(map(float, of)) for of in re.findall(r"([\d.]+) \(([\d.]+); ([\d.e-]+)\)", line)]
        assert len(found) == 4
        ratios = [ratio for _, _, ratio in found]
        assert ratios == sorted(ratios)
        assert 0 < ratios[0] < ratios[-1] <= 1.01
        assert found[-1][0] >= found[0][0] - 1e-3 > 0


def test_a_bad_number_is_a_mistake():
    done = python([TOOL, "damping=x"])
    assert (done.code, len(done.error.splitlines())) == (2, 1)
