"""A backbone of a user's own: what the contract allows works, what it forbids is one line."""

from __future__ import annotations

import torch

from cdr_dist.embeddings.initialisation import initialise_dense
from tests.backbones import Shared
from tests.datasets import rated
from tests.problem import replaced
from tests.runs import same_run, summary, train, words

OWN = ["model=custom", "trainer.max_steps=60", "evaluation.every=20", "hypergradient.theta=[user,topic]"]


def own(run, *more, name="Shared"):
    return words(rated(), run, *OWN, f"model._target_=tests.backbones.{name}", *more)


def test_one_table_for_two_features_trains_with_biao_on_any_number_of_workers(tmp_path):
    """The perceptron reads histories from the tables that the backbone names."""
    for workers in (1, 2):
        train(own(tmp_path / f"{workers}", "recipe=biao", "dense.lr=0.01"), workers)
    one, two = (summary(tmp_path / f"{workers}") for workers in (1, 2))
    assert one["upper_steps"] == two["upper_steps"] > 0
    assert abs(one["metrics"]["valid"]["auc"] - two["metrics"]["valid"]["auc"]) < 1e-3
    assert one["metrics"]["valid"]["auc"] != 0.5  # a norm whose weights started at 0 scores everything alike


def test_norms_and_constants_keep_the_values_of_their_constructor():
    model = Shared(4)
    model.constant = torch.nn.Parameter(torch.full((3, 2), 0.5))
    with torch.no_grad():
        model.source_head.weight.zero_()
    initialise_dense(model, 8)
    assert model.tower[1].weight.eq(1).all()
    assert model.constant.eq(0.5).all()
    assert model.source_head.weight.eq(0).all()
    assert model.tower[0].bias.eq(0).all()
    first = model.tower[0].weight.clone()
    initialise_dense(again := Shared(4), 8)
    assert torch.equal(first, again.tower[0].weight)


def test_a_resume_repeats_dropout(tmp_path):
    more = ["recipe=joint", "+model.dropout=0.5"]
    train(own(tmp_path / "whole", *more))
    train(own(tmp_path / "cut", *more), killed_after=33)
    train(own(tmp_path / "cut", *more))
    same_run(tmp_path / "whole", tmp_path / "cut")
    train(own(tmp_path / "none", "recipe=joint"))
    assert summary(tmp_path / "none")["parameters_sha256"] != summary(tmp_path / "whole")["parameters_sha256"]


def test_dropout_differs_from_step_to_step():
    from cdr_dist.training import loop

    drawn = []
    for step in (1, 2, 2):
        loop.seed_step(8, 0, step)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    with replaced(loop, "key", lambda *_: 0):
        loop.seed_step(8, 0, 1)
        assert not torch.equal(torch.rand(3), drawn[0])
