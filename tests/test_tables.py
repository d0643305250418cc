"""Sharded tables: equal on any number of workers, the fused optimiser, padding, the lookup that only reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cdr_dist.embeddings import tables as module
from cdr_dist.embeddings.initialisation import normal_rows
from cdr_dist.embeddings.options import TableOptions, TableSpec
from cdr_dist.embeddings.tables import ShardedTables
from cdr_dist.embeddings.workers import world_size
from cdr_dist.errors import UserError
from tests import reference
from tests.problem import make, modules, part_of, replaced, sharded
from tests.processes import on_workers

SPECS = [TableSpec("a", 100, 8, 0.1), TableSpec("b", 3, 8, 0.1)]


def built(rank, by_shard=False):
    def of_shard(seed, name, first_row, rows, width, std):
        return normal_rows(seed, name, 0, rows, width, std)

    with replaced(module, "normal_rows", of_shard if by_shard else normal_rows):
        tables = ShardedTables(SPECS, TableOptions(width=8), seed=5, device=torch.device("cpu"))
    found = tables.read({"a": torch.arange(100), "b": torch.tensor([2, 0])})
    return found, {t: tables.unsharded(t) for t in ("a", "b")}


@pytest.mark.parametrize("workers", [2, 3])
def test_initial_rows_do_not_depend_on_the_number_of_workers(workers):
    ((one, whole),) = on_workers(1, built)
    for found, unsharded in on_workers(workers, built):
        assert all(torch.equal(found[t], one[t]) for t in one)
        assert unsharded["a"] is None or all(torch.equal(unsharded[t], whole[t]) for t in whole)
    assert whole["b"].shape == (3, 8)


def test_initialisation_by_shard_is_seen():
    ((one, _),) = on_workers(1, built)
    (found, _), _ = on_workers(2, built, True)
    assert not torch.equal(found["a"], one["a"])


def test_initial_values_are_normal_and_independent():
    values = normal_rows(1, "x", 0, 4000, 8, 0.5).double()
    assert abs(values.mean()) < 4 * 0.5 / 32000**0.5
    assert abs(values.std() - 0.5) < 0.01
    assert abs(torch.corrcoef(values.T) - torch.eye(8)).max() < 0.08
    assert torch.equal(normal_rows(1, "x", 1000, 10, 8, 0.5), values[1000:1010].float())


def stepped(rank, steps, read_between):
    """The sharded model's joint training on this worker's part -> unsharded tables of worker 0."""
    problem = make(rows=150, batch=30, fillers=0)
    tables = sharded(problem, lr=0.1)
    model, _, _ = modules(problem, dtype=torch.float32)
    for step in range(steps):
        batch = part_of(problem.batches[step % 2], rank, world_size())
        from cdr_dist.embeddings.features import ids_by_table, rows_by_feature

        ids = ids_by_table(batch.train, model.spec().features)
        if read_between:
            tables.read(ids)
        embedded = rows_by_feature(tables.rows(ids), batch.train, model.spec().features)
        if read_between:
            tables.read({"user": ids["user"][:3]})
        target, source = model.losses(model(embedded, batch), batch)
        loss = (batch.weight * target).sum() + (batch.source_valid * source).sum()
        (loss / batch.global_rows).backward()
    return {t: tables.unsharded(t) for t in problem.tables}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("read_between", [False, True])
def test_fused_row_wise_adagrad_equals_the_reference(workers, read_between):
    """Ten steps on the tables alone; lookups that only read change nothing, and id 0 never trains."""
    problem = make(rows=150, batch=30, fillers=0)
    start = problem.tables["user"][0].clone()
    found = on_workers(workers, stepped, 10, read_between)[0]
    reference.train(
        problem.tables, problem.dense, problem.batches[:2], 10, 0.1, 0.0, lambda _, b: reference.joint_weights(b, 1.0)
    )
    for table, wanted in problem.tables.items():
        assert torch.allclose(found[table].double(), wanted.detach(), atol=2e-6), table
    assert np.array_equal(found["user"][0].numpy(), start.detach().float().numpy())


def decayed(rank, weight_decay):
    tables = ShardedTables(
        SPECS, TableOptions(width=8, lr=0.1, weight_decay=weight_decay), seed=5, device=torch.device("cpu")
    )
    ids = torch.arange(1, 100)
    before = tables.read({"a": ids})["a"]
    tables.rows({"a": torch.tensor([7, 90])})["a"].sum().backward()
    return before, tables.read({"a": ids})["a"]


@pytest.mark.parametrize("workers", [1, 2])
def test_weight_decay_takes_its_share_of_the_trained_rows_only(workers):
    """All values of a row have one gradient, so the first step of Adagrad is lr; decay adds lr x decay x row."""
    before, after = on_workers(workers, decayed, 0.5)[0]
    expected = before.clone()
    for row in (6, 89):
        expected[row] -= 0.1 + 0.1 * 0.5 * before[row]
    assert torch.allclose(after, expected, atol=1e-6)


def test_options_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="for rowwise_adagrad only"):
        TableOptions(optimiser="sgd", weight_decay=0.1)
    with pytest.raises(UserError, match="must not be negative"):
        TableOptions(weight_decay=-0.1)
    with pytest.raises(UserError, match="multiple of 4"):
        TableOptions(width=10)
    with pytest.raises(UserError, match="did you mean 'adagrad'"):
        TableOptions(optimiser="adagrat")
    with pytest.raises(UserError, match="no Adam on CPU"):
        ShardedTables(SPECS, TableOptions(width=8, optimiser="adam"), 1, torch.device("cpu"))


def asked_by_one(rank):
    """Worker 0 asks for rows, the others for none, reading and training."""
    tables = ShardedTables(SPECS, TableOptions(width=8, lr=0.1), seed=5, device=torch.device("cpu"))
    ids = torch.tensor([1, 2] if rank == 0 else [], dtype=torch.int64)
    before = tables.read({"a": ids, "b": ids})
    trained = tables.rows({"a": ids, "b": ids})
    sum(rows.sum() for rows in trained.values()).backward()
    return before, tables.read({"a": ids, "b": ids})


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_worker_may_ask_for_nothing(workers):
    (before, after), *others = on_workers(workers, asked_by_one)
    for table in before:
        assert torch.allclose(after[table], before[table] - 0.1, atol=1e-5)
    assert all(rows.shape == (0, 8) for found in others for part in found for rows in part.values())


def joined(rank):
    specs = [TableSpec(name, 9, 4, 0.1) for name in ("a", "b")]
    tables = ShardedTables(specs, TableOptions(width=4), seed=1, device=torch.device("cpu"))
    whole = tables.read({name: torch.arange(9) for name in ("a", "b")})
    one, two = torch.tensor([3, 0, 8]), torch.tensor([4, 4, 1])
    found, other = tables.read_joined([[("a", one), ("a", two)], [("b", two[:1])]])
    torch.testing.assert_close(found, torch.cat([whole["a"][one], whole["a"][two]], dim=1))
    torch.testing.assert_close(other, whole["b"][two[:1]])
    assert not whole["a"][0].any()
    return found.tolist()


def test_rows_are_read_side_by_side_also_of_one_table_twice():
    (one,) = on_workers(1, joined)
    assert on_workers(2, joined) == [one, one]


def beyond(_rank):
    specs = [TableSpec(name, 9, 4, 0.1) for name in ("a", "b")]
    tables = ShardedTables(specs, TableOptions(width=4), seed=1, device=torch.device("cpu"))
    for wrong in (-1, 10**6):
        with pytest.raises(IndexError, match="table b"):
            tables.read({"b": torch.tensor([wrong])})


def test_an_id_beyond_its_table_is_named():
    on_workers(1, beyond)
