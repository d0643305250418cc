"""Backbones that read histories, whose rows train: every recipe, any number of workers, parts, resumes, upper steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from cdr_dist.bilevel.hypergradient import hypergradient
from cdr_dist.bilevel.lookup import ResidentRows
from cdr_dist.bilevel.options import HypergradientOptions
from cdr_dist.bilevel.perceptron import PerceptronInput, normalised
from cdr_dist.configuration import from_words
from cdr_dist.data.candidates import Candidates
from cdr_dist.data.keyed import with_more
from cdr_dist.models.dasl import DASL
from cdr_dist.models.minet import MiNet
from cdr_dist.models.nextitnet import NextItNet
from cdr_dist.models.pairs import pair_scorer
from cdr_dist.training.launch import alone
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests.datasets import rated, sampled
from tests.problem import history, make, modules, part_of, sharded
from tests.processes import on_workers
from tests.runs import same_run, summary, train, words

MODELS = {
    "minet": ["model=minet", "model.hidden=[16,8]", "model.attention=8"],
    "dasl": ["model=dasl", "model.hidden=[8]", "model.memory=8", "model.recent=4"],
}
both = pytest.mark.parametrize("name", list(MODELS))
weighed = pytest.mark.parametrize("name", [*MODELS, "nextitnet_mtl"])

ITEM_FEATURES = ("target_item", "target_category")


def small(name, width):
    """Of a width, with random parameters, in float64."""
    torch.manual_seed(3)
    if name == "minet":
        model = MiNet(width, hidden=(6, 4), attention=5, rank=2).double()
    elif name == "nextitnet_mtl":
        model = NextItNet(width, source=True, dilations=(1, 2), loss="bce", categories=True).double()
    else:
        model = DASL(width, hidden=(6,), memory=5, recent=3).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


@pytest.mark.parametrize("name", [*MODELS, "sconet"])
@pytest.mark.parametrize("recipe", ["target_only", "source_features", "joint", "biao"])
def test_it_trains_with_every_recipe_on_any_number_of_workers(name, recipe, tmp_path):
    model = MODELS.get(name, [f"model={name}"])
    for workers in (1, 2):
        train(words(rated(), tmp_path / f"{workers}", *model, f"recipe={recipe}"), workers)
    one, two = (summary(tmp_path / f"{workers}")["metrics"]["valid"] for workers in (1, 2))
    assert one["auc"] == pytest.approx(two["auc"], abs=1e-3)
    assert one["auc"] != 0.5


@both
def test_histories_train_their_rows(name, tmp_path):
    """An item that is in histories only moves."""
    config = from_words(words(rated(), tmp_path, *MODELS[name], "recipe=joint"))
    (phase,) = phases_of(config)
    with alone():
        session = Session(config, str(rated()), phase.cycle)
        (update,) = phase.cycle
        update.bind(session)
        update.run(False)  # after which the head, zero at first, lets gradients through
        batch = session.lower.peek().batch
        (_, table) = session.tables.shards()["source_item"]
        before = table.clone()
        update.run(False)
        moved = set((table != before).any(1).nonzero().flatten().tolist())
        session.close()
    looked_up = set(batch.train["source_item"].values().tolist())
    read = set(batch.histories["source"].item.tolist())
    assert read - looked_up
    assert len(moved & (read - looked_up)) > 0.9 * len(read - looked_up)
    assert moved <= (read | looked_up)


@both
def test_a_step_in_parts_is_the_step(name, tmp_path):
    for parts in (1, 3):
        more = [f"batch.accumulate={parts}", "recipe=joint", "trainer.max_steps=4"]
        train(words(rated(), tmp_path / f"{parts}", *MODELS[name], *more))
    one, three = (summary(tmp_path / f"{parts}")["metrics"]["valid"]["logloss"] for parts in (1, 3))
    assert one == pytest.approx(three, abs=1e-6)


@both
def test_a_resume_repeats_the_run(name, tmp_path):
    train(words(rated(), tmp_path / "whole", *MODELS[name], "recipe=biao"))
    train(words(rated(), tmp_path / "cut", *MODELS[name], "recipe=biao"), killed_after=23)
    train(words(rated(), tmp_path / "cut", *MODELS[name], "recipe=biao"))
    same_run(tmp_path / "whole", tmp_path / "cut")


def upper(rank, workers, name, precondition):
    """The hypergradient of a random problem, over this worker's part of the batches."""
    problem, model = problem_of(name)
    _, perceptron, _ = modules(problem)
    tables = sharded(problem)
    train_part, dev_part = (with_features(part_of(b, rank, workers), model) for b in problem.batches[:2])
    options = HypergradientOptions(theta=["dense", "tables"], terms=2, alpha=0.1, precondition=precondition)
    found = hypergradient(model, perceptron, None, tables, train_part, dev_part, options)
    return {key: g.tolist() for key, g in found.phi.items()}, found.norms.tolist()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def problem_of(name):
    """A random problem with tables more, source_user and source_output, and the model over it."""
    problem = make(rows=60, batch=24, history=4)
    problem.tables["source_user"] = problem.tables["user"].detach().flip(0).requires_grad_()
    problem.tables["source_output"] = problem.tables["source_item"].detach().flip(0).requires_grad_()
    return problem, small(name, problem.tables["user"].shape[1])


def with_features(batch, model):
    """A batch with what the model reads besides the rows' own features."""
    more = {f"{d}_history_{p}": getattr(of, p) for d, of in batch.histories.items() for p in ("item", "category")}
    candidates = torch.arange(2, 40)
    more |= {"source_user": batch.user, "source_next": batch.source_item, "source_softmax": candidates}
    batch.candidates = {"source": Candidates(candidates, torch.linspace(-1, 1, len(candidates)))}
    batch.train = with_more(batch.train, {f: (ids, None) for f, ids in more.items() if f in model.spec().features})
    batch.source_before = batch.histories["source"].lengths // 2
    return batch


@weighed
@pytest.mark.parametrize("precondition", ["none", "block"])
def test_the_upper_step_on_two_workers_equals_one(name, precondition):
    ((one, norms),) = on_workers(1, upper, 1, name, precondition)
    for found, found_norms in on_workers(2, upper, 2, name, precondition):
        assert found_norms == pytest.approx(norms, rel=1e-9)
        for phi, value in found.items():
            torch.testing.assert_close(tensor(value), tensor(one[phi]), rtol=1e-8, atol=1e-12)


@weighed
def test_the_upper_step_equals_dense_tables(name):
    """Histories' rows are part of theta: all tables whole, one graph, no lookup of ours."""
    problem, model = problem_of(name)
    _, perceptron, _ = modules(problem)
    tables = {key: t.detach().float().double().requires_grad_() for key, t in problem.tables.items()}
    train_batch, dev_batch = (with_features(part_of(b, 0, 1), model) for b in problem.batches[:2])

    def rows(table, ids):
        return tables[table][ids] * (ids != 0).unsqueeze(1)

    def embedded(batch):
        spec = model.spec().features
        return {
            f: rows(spec[f], ids)
            for f, ids in zip(batch.train.keys(), batch.train.values().split(batch.train.length_per_key()), strict=True)
            if f in spec
        }

    seen = embedded(train_batch)
    given = PerceptronInput(
        item=torch.cat([seen["source_item"], seen["source_category"]], 1).detach(),
        history={
            d: torch.cat([rows(f"{d}_item", of.item), rows(f"{d}_category", of.category)], 1).detach()
            for d, of in train_batch.histories.items()
        },
        position={d: of.position for d, of in train_batch.histories.items()},
        lengths={d: of.lengths for d, of in train_batch.histories.items()},
    )
    weights = normalised(perceptron(given), train_batch.source_valid, perceptron.gamma)
    target, source = model.losses(model(seen, train_batch), train_batch)
    loss = (train_batch.weight * target).sum() / train_batch.global_rows + (weights * source).sum()
    theta = [p for n, p in model.named_parameters() if not n.startswith(model.heads())] + list(tables.values())
    gradient = torch.autograd.grad(loss, theta, create_graph=True, materialize_grads=True)
    dev_target, _ = model.losses(model(embedded(dev_batch), dev_batch), dev_batch)
    v = torch.autograd.grad(
        (dev_batch.weight * dev_target).sum() / dev_batch.global_rows, theta, materialize_grads=True
    )
    total = list(v)
    for _ in range(2):
        product = torch.autograd.grad(gradient, theta, v, retain_graph=True, materialize_grads=True)
        v = [a - 0.1 * h for a, h in zip(v, product, strict=True)]
        total = [a + b for a, b in zip(total, v, strict=True)]
    phi = dict(perceptron.named_parameters())
    expected = torch.autograd.grad(gradient, list(phi.values()), total, materialize_grads=True)
    ((found, _),) = on_workers(1, upper, 1, name, "none")
    for key, value in zip(phi, expected, strict=True):
        torch.testing.assert_close(tensor(found[key]), -value, rtol=1e-8, atol=1e-12)


@both
def test_pairs_scored_row_by_row_carry_their_histories(name):
    model = small(name, 3)
    lists = {"target": [[4, 2], [], [2, 2, 7]], "source": [[5], [9, 3, 5], []]}
    histories = {d: history(of) for d, of in lists.items()}
    sizes = {f: len(histories[f.partition("_")[0]].item) if "_history_" in f else 6 for f in model.spec().features}
    embedded = {f: torch.randn(rows, 3, dtype=torch.float64) for f, rows in sizes.items()}
    for f in {"user", "source_user"} & embedded.keys():  # rows that share a history are of one user
        embedded[f] = embedded[f][::2].repeat_interleave(2, 0)
    batch = SimpleNamespace(label=None, source_label=None, histories=histories, source_before=torch.zeros(6).long())
    scorer = pair_scorer(model)
    items = {f: torch.randn(5, 3, dtype=torch.float64) for f in ITEM_FEATURES}
    found = scorer.logits(scorer.row_part(embedded, batch)[:, None], scorer.item_part(items))
    for column in range(5):
        same = {f: items[f][column].expand(6, -1) for f in ITEM_FEATURES}
        torch.testing.assert_close(found[:, column], model({**embedded, **same}, batch).target_logit)
    assert found.std() > 0.01


def test_a_row_counts_for_every_row_of_the_batch_whose_history_holds_it():
    problem, model = problem_of("minet")
    batch = with_features(part_of(problem.batches[0], 0, 1), model)
    weight = torch.rand(len(batch), dtype=torch.float64)
    rows = ResidentRows(batch.train, model.spec().features)
    found = rows.counts(weight, batch.histories)
    expected = {t: torch.zeros(60, dtype=torch.float64) for t in rows.unique}
    for i, w in enumerate(weight):
        for feature in ("user", "target_item", "target_category", "source_item", "source_category"):
            expected[feature][batch.train[feature].values()[i]] += w
        for domain, of in batch.histories.items():
            own = of.position.split(of.lengths.tolist())[i]
            for part in ("item", "category"):
                for place in own:
                    expected[f"{domain}_{part}"][getattr(of, part)[place]] += w
    for table, ids in rows.unique.items():
        torch.testing.assert_close(found[table], expected[table][ids])


@both
def test_positives_are_ranked_among_all_items_on_any_number_of_workers(name, tmp_path):
    for workers in (1, 2):
        more = ["recipe=joint", "evaluation.full_ks=[5]", "trainer.max_steps=12"]
        train(words(sampled(), tmp_path / f"{workers}", *MODELS[name], *more), workers)
    one, two = (summary(tmp_path / f"{workers}")["metrics"]["test"]["full_ndcg@5"] for workers in (1, 2))
    assert 0 < one < 1
    assert one == pytest.approx(two, abs=0.02)
