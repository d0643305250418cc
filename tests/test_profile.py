"""Backward passes, counted through autograd's engine: of every kind as many as the method has."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import profile_backward

from cdr_dist.bilevel import hypergradient as module
from cdr_dist.configuration import from_words
from tests.datasets import rated
from tests.problem import replaced
from tests.runs import words

UPPER = {
    "dev gradient": 1,
    "train gradient with graph": 1,
    "mixed: by weight": 1,
    "mixed: perceptron": 1,
}


def counted(tmp_path, *more):
    found = profile_backward.profile(from_words(words(rated(), tmp_path / "run", *more)), 1)
    return {name: of["passes"] for name, of in found["kinds"].items() if of.get("passes")}, found


@pytest.mark.parametrize("terms", [0, 3])
def test_biao(tmp_path, terms):
    """interval + K + 3, the last one in two: from the gradient to the weights, and from the weights to phi."""
    passes, found = counted(tmp_path, "recipe=biao", f"hypergradient.terms={terms}")
    products = {"Hessian-vector product": terms} if terms else {}
    assert passes == {"lower backward": 7, **UPPER, **products}
    assert found["expected"]["interval + K + 3 (the true count)"] == 7 + terms + 3 == sum(passes.values()) - 1
    assert all(of["ms"] > 0 for of in found["kinds"].values())
    assert found["kinds"]["lower backward"]["mflop"] > 0


def test_as_released(tmp_path):
    """The head is trained on 100 batches before every upper step, and weights take part in the second order."""
    given = [
        "recipe=biao",
        "preset=as_released",
        "upper.interval=7",
        "upper.dev_batch_size=64",
        "upper.head_refresh=dev:9",
    ]
    passes, _ = counted(tmp_path, *given)
    assert passes == {
        "lower backward": 7,
        "head backward": 9,
        "dev gradient": 1,
        "train gradient with graph": 1,
        "Hessian-vector product": 3,
        "mixed: perceptron": 1,
    }


def test_joint_and_a_count_that_changed(tmp_path):
    assert counted(tmp_path, "recipe=joint")[0] == {"lower backward": 1}
    product = module._Problem.hessian_vector

    def twice(self, vector):
        product(self, vector)
        return product(self, vector)

    with replaced(module._Problem, "hessian_vector", twice):
        passes, _ = counted(tmp_path, "recipe=biao", "hypergradient.terms=3")
    assert passes["Hessian-vector product"] == 6


def test_the_command_prints_a_table_and_writes_trace_and_json(tmp_path, monkeypatch, capsys):
    given = words(rated(), tmp_path / "run", "recipe=biao", "hypergradient.terms=1")
    given = [word for word in given if not word.startswith("run=")]
    more = ["cycles=1", f"trace={tmp_path}/trace.json", f"json={tmp_path}/table.json"]
    profile_backward.main([*given, *more])
    shown = capsys.readouterr().out
    assert "| Hessian-vector product" in shown
    assert "12 counted; 10 by interval + K + 2 (the paper); 11 by interval + K + 3 (the true count)" in shown
    assert "cdr.lower backward" in (tmp_path / "trace.json").read_text()
    assert json.loads((tmp_path / "table.json").read_text())["kinds"]["lower backward"]["passes"] == 7
