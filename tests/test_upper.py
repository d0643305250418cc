"""What the upper level samples and how it steps: source draws, dev behaviours, AdaGradNorm."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cdr_dist.bilevel.optimiser import AdaGradNorm
from cdr_dist.data.batch import BatchBuilder
from cdr_dist.data.dataset import read_manifest
from cdr_dist.data.feature_names import DOMAINS, ROW_FEATURES
from cdr_dist.data.hold_out import HoldOut
from cdr_dist.data.options import BatchOptions
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.stream import Place
from cdr_dist.models.protocol import cross_entropy
from cdr_dist.training.accumulation import Part
from cdr_dist.training.lower import add_head_gradient
from tests import datasets


@pytest.fixture(params=["rated", "sampled"])
def data(request):
    return str(getattr(datasets, request.param)())


def opened(folder):
    manifest = read_manifest(folder)
    table = pq.read_table(f"{folder}/{manifest.shards['train'][0].path}")
    return table, BatchBuilder(folder, manifest, BatchOptions(), seed=8, features=ROW_FEATURES[:5], histories=DOMAINS)


def column(batch, name):
    return batch.train[name].values().numpy()


def test_every_draw_is_the_same_rows_with_other_source_behaviours(data):
    table, make = opened(data)
    once, thrice = (
        make.train(StoredRows.of(table), Place(), table.num_rows),
        make.train(StoredRows.of(table), Place(), table.num_rows, draws=3),
    )
    assert len(thrice) == 3 * len(once)

    def by_draw(values):  # a row's draws stand after one another, each with the row's negatives
        return values.reshape(table.num_rows, 3, make.expansion).swapaxes(0, 1).reshape(3, -1)

    assert thrice.global_rows == 3 * once.global_rows
    for name in ("user", "target_item", "target_category"):
        assert np.array_equal(by_draw(column(thrice, name)), np.tile(column(once, name), (3, 1)))
    drawn = by_draw(column(thrice, "source_item"))
    assert np.array_equal(drawn[0], column(once, "source_item"))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.mean(drawn[one] == drawn[other]) < 0.3  # ten candidates a user
    own = dict(zip(table["user"].to_pylist(), table["source_candidates_item"].to_pylist(), strict=True))
    for user, item, positive in zip(
        column(thrice, "user"), column(thrice, "source_item"), thrice.source_label.tolist(), strict=True
    ):
        assert item in own[user] or not positive


@pytest.mark.parametrize("hold_out", [None, HoldOut(seed=8, share=0.5, epochs=1)])
def test_dev_behaviours_of_a_row_are_different_ones(data, hold_out):
    table, make = opened(data)
    k, each = make.expansion, 3
    batch = make.dev_of_same_users(StoredRows.of(table), 0, table.num_rows, hold_out, each)
    counts = batch.weight[::k].numpy().reshape(-1, each)
    items = column(batch, "target_item")[::k].reshape(-1, each)
    number = np.array([len(peers) for peers in table["target_candidates_item"].to_pylist()])
    most = number - 1 if hold_out is None else None
    assert counts[:, 0].mean() > 0.9
    for row in range(table.num_rows):
        peers = table["target_candidates_item"][row].as_py()
        found = items[row, counts[row] > 0].tolist()
        # an item that a user has twice may come twice
        assert all(found.count(item) <= peers.count(item) for item in found)
        if most is not None:
            assert len(found) == min(each, most[row])


def test_adagrad_norm_shares_one_falling_step_size():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))
    other = torch.nn.Parameter(torch.ones(1))
    optimiser = AdaGradNorm([{"params": [a, b]}, {"params": [other], "lr": 0.0}], lr=0.5)
    for number in (1, 2):
        a.grad, b.grad, other.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0]), torch.tensor([7.0])
        optimiser.step()
        step = sum(0.5 / (25.0 * n) ** 0.5 for n in range(1, number + 1))
        assert torch.allclose(a, torch.tensor([-3.0 * step, 0.0]))
        assert torch.allclose(b, torch.tensor([-4.0 * step]))
    assert other.item() == 1.0
    again = AdaGradNorm([{"params": [a, b]}, {"params": [other]}], lr=0.5)
    again.load_state_dict(optimiser.state_dict())
    assert again.param_groups[0]["square"] == 50.0


def test_adagrad_norm_does_not_depend_on_the_scale_of_the_loss():
    ends = []
    for scale in (1.0, 1e-6):
        x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimiser = AdaGradNorm([x], lr=0.3)
        for _ in range(20):
            x.grad = scale * x.detach() * torch.tensor([1.0, 3.0])
            optimiser.step()
        ends.append(x.detach().clone())
    assert torch.allclose(*ends, atol=1e-5)
    x = torch.nn.Parameter(torch.ones(1))
    x.grad = torch.zeros(1)
    AdaGradNorm([x], lr=1.0).step()
    assert x.item() == 1.0


def test_the_extra_heads_gradient_is_that_of_its_loss():
    """Written down in `lower`, against autograd's; it is added to what is there, and rows of weight 0 do not count."""
    random = torch.Generator().manual_seed(0)
    features, label = torch.randn(6, 3, generator=random), torch.tensor([1.0, 0, 1, 1, 0, 0])
    rows = Part(label, label, torch.tensor([1.0, 1, 1, 0, 1, 1]), {}, label, label)
    head = torch.nn.Linear(3, 1)
    loss = (rows.weight * cross_entropy(head(features).squeeze(1), label)).sum() / 10
    wanted = torch.autograd.grad(loss, list(head.parameters()))
    for parameter in head.parameters():
        parameter.grad = torch.ones_like(parameter)
    add_head_gradient(head, features, rows, 10)
    for parameter, gradient in zip(head.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, 1 + gradient)
