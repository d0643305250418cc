"""The paper's ablations: parts of the perceptron, other ways from scores to weights, a dev set that is split off."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import OmegaConf

from cdr_dist.bilevel.options import PerceptronOptions
from cdr_dist.bilevel.perceptron import BehaviouralPerceptron, PerceptronInput
from cdr_dist.configuration import from_words
from cdr_dist.data.hold_out import Split
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.stream import Block, Place, Rows
from cdr_dist.embeddings.initialisation import initialise_dense
from tests.datasets import rated, sampled
from tests.processes import on_workers
from tests.runs import summary, train, words
from tests.test_batch import builder
from tests.test_hypergradient import SHAPE, largest_difference, one, ours_with

WIDTH = 3


def seen(rows=4):
    torch.manual_seed(6)
    lengths = torch.tensor([2, 0, 1, 3])
    position = torch.tensor([0, 1, 1, 0, 2, 1])
    return PerceptronInput(
        torch.randn(rows, 2 * WIDTH),
        {d: torch.randn(3, 2 * WIDTH) for d in ("source", "target")},
        {d: position for d in ("source", "target")},
        {d: lengths for d in ("source", "target")},
    )


def perceptron(**options):
    torch.manual_seed(5)
    made = BehaviouralPerceptron(WIDTH, PerceptronOptions(**options))
    for p in made.parameters():
        torch.nn.init.normal_(p)
    return made


def test_a_part_alone_is_the_whole_without_the_other():
    whole, given = perceptron(), seen()
    of_item, of_user = whole.parts(given)
    torch.testing.assert_close(whole(given), of_item * of_user)
    for part, expected in (("global", of_item), ("user", of_user)):
        alone = perceptron(parts=[part])
        alone.load_state_dict({n: whole.state_dict()[n] for n in alone.state_dict()})
        torch.testing.assert_close(alone(given), expected)
    assert not [n for n, _ in perceptron(parts=["global"]).named_parameters() if n.startswith(("attention", "local"))]


@pytest.mark.parametrize("parts", [["global"], ["user"], ["global", "user"]])
@pytest.mark.parametrize("normalisation", ["softmax", "softplus", "sigmoid"])
def test_at_first_all_behaviours_weigh_alike(parts, normalisation):
    made = BehaviouralPerceptron(WIDTH, PerceptronOptions(parts=parts, normalisation=normalisation))
    initialise_dense(made, 8, "perceptron.")
    weights = made.weights(made(seen()), torch.tensor([True, True, False, True]), 4)
    assert weights[2] == 0
    torch.testing.assert_close(weights[[0, 1, 3]], weights[:1].expand(3))
    if normalisation != "sigmoid":
        torch.testing.assert_close(weights.sum(), made.gamma)
    else:
        torch.testing.assert_close(weights[0], made.gamma / 4)


def test_at_random_behaviours_weigh_differently_and_gamma_is_the_same():
    made = BehaviouralPerceptron(WIDTH, PerceptronOptions(start="random", gamma_initial=2.0))
    initialise_dense(made, 8, "perceptron.")
    weights = made.weights(made(seen()), torch.ones(4, dtype=torch.bool), 4)
    torch.testing.assert_close(weights.sum(), torch.tensor(2.0))
    assert weights.max() > 1.01 * weights.min()


RELEASED = {
    "batch": {"size": 64},
    "dense": {"lr": 0.01},
    "perceptron": {"start": "random", "gamma": "relu", "padding": 50, "item_gradient": True, "local_hidden": [32, 16]},
    "hypergradient": {"terms": 3, "alpha": 1.0, "inverse": "neumann", "theta": ["dense", "tables"]},
    "upper": {
        **{"dev": "reordered", "dev_batch_size": 256, "head_refresh": "dev:100", "source_draws": 1, "interval": 100},
        **{"optimiser": "sgd", "lr": 0.01, "gamma_lr": None, "clip": 10.0, "decay_gamma": True, "dev_head": "extra"},
    },
    "trainer": {"epochs": 5},
}
PAPER = {
    "hypergradient": {"terms": 3, "theta": ["dense", "tables"]},
    "upper": {
        **{"dev": "reordered", "dev_head": "own", "source_draws": 1, "optimiser": "sgd", "lr": 0.01, "interval": 100},
        **{"gamma_lr": None, "weight_decay": 0.0},
    },
    "perceptron": {"padding": None, "item_gradient": False},
}


@pytest.mark.parametrize(("preset", "expected"), [("as_paper", PAPER), ("as_released", RELEASED)])
def test_a_preset_says_what_its_source_does(preset, expected):
    config = OmegaConf.to_container(OmegaConf.structured(from_words(["data=x", "recipe=biao", f"preset={preset}"])))
    for group, values in expected.items():
        assert {name: config[group][name] for name in values} == values


def test_weights_rise_with_their_scores_and_sum_to_gamma_or_stand_alone():
    score, valid = torch.tensor([-2.0, 0.0, 3.0, 9.0]), torch.tensor([True, True, True, False])
    found = {n: perceptron(normalisation=n) for n in ("softmax", "softplus", "sigmoid")}
    for name, made in found.items():
        weights = made.weights(score, valid, 4)
        assert 0 < weights[0] < weights[1] < weights[2]
        assert weights[3] == 0
        if name == "sigmoid":
            torch.testing.assert_close(weights[1:2], made.weights(score[1:2], valid[1:2], 4))
            torch.testing.assert_close(weights[1], made.gamma / 4)
        else:
            torch.testing.assert_close(weights.sum(), made.gamma)


@pytest.mark.parametrize(
    "options",
    [{"parts": ["global"]}, {"parts": ["user"]}, {"normalisation": "softplus"}, {"normalisation": "sigmoid"}],
    ids=str,
)
def test_the_upper_step_on_two_workers_equals_one(options):
    phi_one, _, _ = one(SHAPE, 2, alpha=0.5, perceptron=options)
    assert any(g.abs().max() > 1e-9 for g in phi_one.values())
    for phi, _, _ in on_workers(2, ours_with, 2, SHAPE, 2, {"alpha": 0.5, "perceptron": options}):
        assert largest_difference(phi, phi_one) < 1e-11


@pytest.mark.parametrize("data", [rated, sampled])
def test_a_split_off_dev_set_is_never_trained_on_and_all_there_is_to_dev_batches(data):
    folder = str(data())
    make, split = builder(folder), Split(seed=8, share=0.2)
    train_rows, dev_rows = set(), set()
    for shard in sorted((data() / "train").glob("*.parquet")):
        stored = StoredRows.of(pq.read_table(shard))
        for epoch in (0, 1):
            batch = make.train(stored, Place(epoch), len(stored), split)
            train_rows |= set(batch.example[batch.weight > 0].tolist())
            block = Block(stored, [Rows(stored, Place(epoch, 0), len(stored))])
            (dev,) = make.dev_steps(block, split)
            assert dev.weight.eq(1).all()
            dev_rows |= set(dev.example.tolist())
    every = {i for s in (data() / "train").glob("*.parquet") for i in pq.read_table(s)["example_id"].to_pylist()}
    assert train_rows | dev_rows == every
    assert not train_rows & dev_rows
    assert 0.15 < len(dev_rows) / len(every) < 0.25


def test_a_worker_without_a_row_of_the_dev_set_takes_part():
    folder = str(rated())
    make = builder(folder)
    stored = StoredRows.of(pq.read_table(sorted((rated() / "train").glob("*.parquet"))[0]).slice(0, 2))
    (dev,) = make.dev_steps(Block(stored, [Rows(stored, Place(0, 0), 2)]), Split(seed=8, share=1e-9))
    assert dev.weight.sum() == 0
    assert len(dev) == 1


def test_runs_with_a_split_agree_on_any_number_of_workers(tmp_path):
    for workers in (1, 2):
        more = ["recipe=biao", "upper.dev=split", "upper.split=0.1", "hypergradient.theta=[dense,tables]"]
        train(words(rated(), tmp_path / f"{workers}", *more), workers)
    one_, two = (summary(tmp_path / f"{workers}") for workers in (1, 2))
    assert one_["upper_steps"] == two["upper_steps"] > 0
    assert np.isclose(one_["metrics"]["valid"]["auc"], two["metrics"]["valid"]["auc"], atol=1e-3)
