"""Whatever a step makes is made where its inputs are: shown without a GPU (tests/pretended.py), and with one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cdr_dist.bilevel.hypergradient import hypergradient
from cdr_dist.bilevel.options import HypergradientOptions
from cdr_dist.embeddings.exchange import RowExchange
from cdr_dist.embeddings.tables import ShardedTables
from cdr_dist.training import weighting
from tests.datasets import rated, sequenced
from tests.pretended import DEVICE, Pretended, held, moved, pretending
from tests.problem import make, modules, part_of, replaced
from tests.runs import SEQUENTIAL, summary, train, words

CPU = torch.device("cpu")


class PlainTables:
    """The lookups of `ShardedTables` on one worker, of which nothing is trained."""

    def __init__(self, tables, device):
        self._weights = {name: table.detach().float().to(device) for name, table in tables.items()}

    device = DEVICE
    read_joined = ShardedTables.read_joined  # which takes no short cut off the CPU

    def read(self, ids):
        return {
            t: self._weights[t].index_select(0, of).masked_fill((of == 0).unsqueeze(1), 0.0) for t, of in ids.items()
        }

    def rows_per_worker(self, table):
        return len(self._weights[table])


def upper(device, **options):
    """The hypergradient of a random problem that is on a device, its values brought back."""
    with pretending():
        problem = make(rows=150, width=4, batch=60, towers=(8, 4), history=5, fillers=2)
        model, perceptron, head = (module.to(device) for module in modules(problem))
        train, dev = (part_of(b, 0, 1).to(device) for b in problem.batches[:2])
        given = HypergradientOptions(**{"theta": ["dense", "tables"], "terms": 3, **options})
        found = hypergradient(model, perceptron, head, PlainTables(problem.tables, device), train, dev, given)
        assert {value.device for value in (*found.phi.values(), found.norms)} == {device}
        return {name: held(value) for name, value in {**found.phi, "norms": found.norms}.items()}


@pytest.mark.parametrize(
    "options", [{"mode": "exact"}, {"mode": "local"}, {"precondition": "block"}, {"theta": ["user"]}]
)
def test_an_upper_step_stays_on_its_device(options):
    there, here = upper(DEVICE, **options), upper(CPU, **options)
    assert all(torch.equal(there[name], value) for name, value in here.items())


def test_an_exchange_and_its_counts_stay_on_their_device():
    """One that has rows of a table, and one that has none of it."""
    with pretending():
        some, none = torch.tensor([2, 5, 9], device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
        first, empty = RowExchange({"a": some}, {"a": 10}), RowExchange({"a": none}, {"a": 10})
        rows = moved(torch.ones(3, 2))
        pulled = [first.pull(empty, {"a": rows[:0]}), empty.pull(first, {"a": rows}), first.pull(first, {"a": rows})]
        assert [held(of["a"]).sum().item() for of in pulled] == [0, 0, 6]
        assert all(isinstance(of["a"], Pretended) for of in (*pulled, first.copies(), empty.copies()))


def test_the_kept_kinds_of_a_batch_stay_on_its_device():
    manifest = SimpleNamespace()
    session = SimpleNamespace(
        config=SimpleNamespace(upper=SimpleNamespace(gamma0=0.5)), folder="", manifest=manifest, device=DEVICE
    )
    with pretending(), replaced(weighting, "usefulness_by_category", lambda *_: ["", "helpful", "harmful"]):
        batch = part_of(make(rows=40, width=4, batch=8, towers=(4,), history=2, fillers=0).batches[0], 0, 1)
        batch.train["source_category"].values().remainder_(3)
        kinds = weighting.OfKinds(["helpful"])
        kinds.bind(session)
        found = kinds.weights(batch.to(DEVICE), {})
        wanted = (batch.train["source_category"].values() == 1) * batch.source_valid * (0.5 / batch.global_rows)
    assert isinstance(found, Pretended)
    torch.testing.assert_close(held(found), wanted)
    assert 0 < wanted.count_nonzero() < len(wanted)


def test_what_cuda_refuses_is_refused_here():
    with pretending():
        there = moved(torch.ones(3))
        assert held(there + torch.tensor(1.0)).tolist() == [2, 2, 2]
        with pytest.raises(AssertionError, match="a tensor of the CPU"):
            there + torch.ones(3)


# ---- with a GPU -----------------------------------------------------------------------------------------------------


RATED = ["upper.interval=4", "evaluation.every=10"]
ON_RATED = {
    **{name: [f"recipe={name}"] for name in ("target_only", "joint", "gradient_cosine", "oracle", "source_features")},
    **{f"biao of {name}": ["recipe=biao", f"model={name}"] for name in ("conet", "sconet", "minet", "dasl")},
    "block": ["recipe=biao", "hypergradient.precondition=block", "evaluation.full_ks=[10]"],
    "local": ["recipe=biao", "hypergradient.mode=local"],
    "of users": ["recipe=biao", "hypergradient.theta=[user]"],
}
ON_SEQUENCES = {
    "full softmax": ["recipe=pretrain", "softmax.negatives=0"],
    "gru": ["recipe=uaf", "recipe.transfer.policy=gru"],
    "biao": ["recipe=biao", "model=nextitnet_mtl", "upper.interval=4"],
    **{name: [f"recipe={name}"] for name in ("pretrain", "uaf", "mtl")},
}
needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def as_good_as_on_the_cpu(dataset, folder, *given):
    """It trains, validates, writes a checkpoint, goes on from it, and is as good as on the CPU."""
    found = {}
    for device in ("cpu", "cuda"):
        for steps in (10, 20):
            more = [*given, f"trainer.device={device}", f"trainer.max_steps={steps}"]
            train(words(dataset, folder / device, *more))
        found[device] = summary(folder / device)["metrics"]["test"]
    assert found["cuda"] == pytest.approx(found["cpu"], abs=0.02, nan_ok=True)


@needs_a_gpu
@pytest.mark.parametrize("given", [pytest.param(given, id=name) for name, given in ON_RATED.items()])
def test_a_run_on_a_gpu(given, tmp_path):
    as_good_as_on_the_cpu(rated(), tmp_path, *RATED, *given)


@needs_a_gpu
@pytest.mark.parametrize("given", [pytest.param(given, id=name) for name, given in ON_SEQUENCES.items()])
def test_a_sequential_run_on_a_gpu(given, tmp_path):
    as_good_as_on_the_cpu(sequenced(), tmp_path, *SEQUENTIAL, *given)
