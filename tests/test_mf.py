"""BPR-MF: its loss against a double loop, and what a run of it needs."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.errors import UserError
from cdr_dist.models.mf import MatrixFactorisation
from cdr_dist.training.checks import check_before_start
from tests.datasets import rated, sampled
from tests.runs import lines, summary, train, words

GIVEN = ["model=mf", "recipe=target_only"]


def test_bpr_is_the_log_sigmoid_of_every_pair():
    model = MatrixFactorisation(3)
    embedded = {
        name: torch.randn(6, 3, generator=torch.Generator().manual_seed(i))
        for i, name in enumerate(model.spec().features)
    }
    labels = SimpleNamespace(label=torch.tensor([1.0, 0, 0, 1, 0, 0]))
    output = model(embedded, labels)
    found, source = model.losses(output, labels)
    score = [float(v[0] + (u[1:] * v[1:]).sum()) for u, v in zip(*embedded.values(), strict=True)]
    expected = [0.0 if i % 3 == 0 else math.log1p(math.exp(-(score[i - i % 3] - score[i]))) for i in range(6)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    assert source is None


def test_a_worker_without_rows_takes_part_in_the_backward_pass():
    model = MatrixFactorisation(3)
    embedded = {name: torch.zeros(1, 3, requires_grad=True) for name in model.spec().features}
    labels = SimpleNamespace(label=torch.zeros(1))
    model.losses(model(embedded, labels), labels)[0].sum().backward()
    assert not any(of.grad.any() for of in embedded.values())


def test_it_learns_who_likes_what(tmp_path):
    for name, data, more in (("bpr", sampled(), []), ("bce", rated(), ["model.loss=bce"])):
        given = [*GIVEN, *more, "tables.lr=0.3", "trainer.max_steps=100", "trainer.epochs=40", "evaluation.patience=0"]
        given += ["evaluation.every=100", "trainer.checkpoint_every=0"]
        train(words(data, tmp_path / name, *given, "trainer.log_every=20"))
        losses = [line["values"]["target_loss"] for line in lines(tmp_path / name, "train")]
        assert losses[-1] < 0.5 * losses[0], name


def test_two_workers_train_as_one(tmp_path):
    for workers in (1, 2):
        train(words(sampled(), tmp_path / f"{workers}", *GIVEN), workers)
    one, two = (summary(tmp_path / f"{workers}")["metrics"]["valid"]["auc"] for workers in (1, 2))
    assert one == pytest.approx(two, abs=1e-3)


def test_it_has_no_source(tmp_path):
    with pytest.raises(UserError, match="model=mf reads the target alone"):
        check_before_start(from_words(words(rated(), tmp_path, "model=mf", "recipe=joint")), str(rated()))


def test_a_pairwise_loss_needs_negatives_of_each_positive(tmp_path):
    with pytest.raises(UserError, match=r"model.loss=bpr: .* has rated rows .*take model.loss=bce"):
        check_before_start(from_words(words(rated(), tmp_path, *GIVEN)), str(rated()))
    check_before_start(from_words(words(rated(), tmp_path, *GIVEN, "model.loss=bce")), str(rated()))
