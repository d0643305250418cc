"""Laws 6 and 7: what BIAO and CoNet become at their limits."""

from __future__ import annotations

import contextlib

import torch

from cdr_dist.bilevel.perceptron import BehaviouralPerceptron
from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import read_manifest
from cdr_dist.embeddings.initialisation import initialise_dense
from cdr_dist.models.conet import CoNet
from cdr_dist.training.checks import build_model
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests import datasets, reference
from tests.problem import make, replaced
from tests.processes import on_workers
from tests.runs import tensors, train, words

STEPS = 15


def trained(rank, data, recipe, within=None, extra=()):
    """(table rows, dense parameters) of the base model after a few lower updates, without Ray or a run folder."""
    given = [f"data={data}", f"recipe={recipe}", "batch.size=64", "trainer.workers=1", "upper.interval=1000"]
    given += ["upper.dev=reordered", *extra]  # a hold-out would leave rows out of the lower level
    config = from_words(given)
    with within() if within else contextlib.nullcontext():
        (phase,) = phases_of(config)
        session = Session(config, data, phase.cycle)
        phase.cycle[0].bind(session)
        for _ in range(STEPS):
            phase.cycle[0].run(False)
        session.close()
    tables = {name: shard.clone() for name, (_, shard) in session.tables.shards().items()}
    return tables, {n: p.detach().clone() for n, p in session.model.named_parameters()}


def gamma_at_zero():
    """relu(0): the perceptron gives every behaviour weight 0."""
    return replaced(BehaviouralPerceptron, "gamma", property(lambda self: self.gamma_raw.detach() * 0))


def closest(a, b):
    return max(float((x[n] - y[n]).abs().max()) for x, y in zip(a, b, strict=True) for n in x)


def test_gamma_zero_equals_base_0():
    data = str(datasets.rated())
    (biao,) = on_workers(1, trained, data, "biao", gamma_at_zero)
    (base,) = on_workers(1, trained, data, "source_features")
    (joint,) = on_workers(1, trained, data, "joint")
    assert closest(biao, base) == 0
    assert closest(joint, base) > 1e-3


def test_equal_weights_equal_base():
    """Every user of the data has source behaviours, so gamma / valid rows is joint's gamma0 / B."""
    data = str(datasets.rated())
    (biao,) = on_workers(1, trained, data, "biao")
    (joint,) = on_workers(1, trained, data, "joint")
    (other,) = on_workers(1, trained, data, "biao", None, ["perceptron.gamma_initial=2"])
    assert closest(biao, joint) < 1e-5
    assert closest(other, joint) > 1e-3


def test_the_trained_model_has_the_parameters_of_its_base_model():
    shapes = []
    for recipe in ("joint", "biao"):
        model = build_model(from_words([f"recipe={recipe}"]))
        shapes.append({n: tuple(p.shape) for n, p in model.named_parameters()})
    assert shapes[0] == shapes[1]
    single = build_model(from_words(["recipe=target_only"]))
    assert {n.split(".")[0] for n, _ in single.named_parameters()} == {"target_tower", "target_head"}


def test_no_terms_is_the_one_step_gradient():
    """K = 0: the slope of the dev loss after one small step of SGD on the train loss, by finite differences."""
    problem = make(rows=20, batch=10, towers=(6, 4), history=4)
    train, dev = problem.batches[:2]
    phi, _ = reference.hypergradient(*problem[:3], train, dev, 0, 1.0, dev_head=problem.dev_head, heads=problem.heads)
    theta = reference.shared_names(problem.tables, problem.dense)
    both = {**problem.tables, **problem.dense}

    def after_a_step(gamma_raw, rate):
        moved = {**problem.phi, "gamma_raw": gamma_raw}
        loss = reference.biao_loss(problem.tables, problem.dense, moved, train, heads=problem.heads)
        gradient = torch.autograd.grad(loss, [both[n] for n in theta])
        new = {n: (both[n] - rate * g).detach() for n, g in zip(theta, gradient, strict=True)}
        tables, dense = reference.replace(problem.tables, new), reference.replace(problem.dense, new)
        return float(reference.dev_loss(tables, dense, problem.dev_head, dev))

    rate, step, gamma = 1e-4, 1e-3, problem.phi["gamma_raw"].detach()
    slope = (after_a_step(gamma + step, rate) - after_a_step(gamma - step, rate)) / (2 * step * rate)
    assert abs(slope - float(phi["gamma_raw"])) < 1e-3 * abs(slope)


# ---- CoNet ---------------------------------------------------------------------------------------------------------


class Labels:
    label = source_label = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])


def embedded(seed=0, width=4):
    random = torch.Generator().manual_seed(seed)
    names = ("user", "target_item", "target_category", "source_item", "source_category")
    return {n: torch.randn(5, width, generator=random) for n in names}


def conet(source=True):
    model = CoNet(4, (8, 6), source=source)
    initialise_dense(model, seed=3)
    for name in ("target_head", "source_head")[: 1 + source]:  # heads start at zero, which hides everything
        torch.nn.init.normal_(getattr(model, name).weight, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_without_crossing_the_towers_are_independent_and_equal_the_single_domain_model():
    both, single, given = conet(), conet(source=False), embedded()
    single.target_head.weight.data.copy_(both.target_head.weight)
    for cross in both.cross:
        torch.nn.init.zeros_(cross.weight)
    # Up to rounding: the joined towers are a wider matrix product.
    torch.testing.assert_close(both(given, Labels).target_logit, single(given, Labels).target_logit)
    moved = given | {"source_item": given["source_item"] + 1}
    assert torch.equal(both(moved, Labels).target_logit, both(given, Labels).target_logit)
    assert not torch.equal(conet()(moved, Labels).target_logit, conet()(given, Labels).target_logit)


def test_swapping_the_domains_swaps_the_outputs():
    model, given = conet(), embedded()
    before = model(given, Labels)
    for a, b in ((model.target_tower, model.source_tower), (model.target_head, model.source_head)):
        x, y = a.state_dict(), {n: p.clone() for n, p in b.state_dict().items()}
        b.load_state_dict(x)
        a.load_state_dict(y)
    swapped = {
        {"target": "source", "source": "target"}.get(n.split("_")[0], "user") + n[len(n.split("_")[0]) :]: v
        for n, v in given.items()
    }
    after = model(swapped, Labels)
    assert torch.allclose(after.target_logit, before.source_logit, atol=1e-6)
    assert torch.allclose(after.source_logit, before.target_logit, atol=1e-6)


def test_initial_loss_is_near_ln_2_and_no_tower_starts_dead():
    """Over 50 seeds: every unit of the last layers is alive for some input, and the loss is that of a coin."""
    for seed in range(50):
        model = CoNet(12)
        initialise_dense(model, seed)
        random = torch.Generator().manual_seed(seed)
        given = {n: 0.1 * torch.randn(256, 12, generator=random) for n in embedded()}
        output = model(given, Labels)
        loss = torch.nn.functional.softplus(-output.target_logit).mean()
        assert abs(float(loss) - 0.6931) < 1e-3
        assert (output.target_features > 0).any(0).sum() >= 4


def test_the_single_domain_variant_reads_no_source_feature():
    assert not [f for f in conet(source=False).spec().features if f.startswith("source")]
    assert read_manifest(str(datasets.rated())).rows.keys() >= set(conet().spec().tables)


def test_without_cross_layers_the_towers_are_independent_and_with_all_of_them_it_is_conet():
    given = embedded()
    for layers in (None, 2, 1, 0):
        model, whole = CoNet(4, (8, 6), cross_layers=layers), conet()
        model.load_state_dict({n: p for n, p in whole.state_dict().items() if n in model.state_dict()})
        for cross in list(whole.cross)[2 if layers is None else layers :]:
            torch.nn.init.zeros_(cross.weight)
        assert len(model.cross) == (2 if layers is None else layers)
        torch.testing.assert_close(model(given, Labels), whole(given, Labels))
        sum(map(torch.sum, model.losses(model(given, Labels), Labels))).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_sparse_cross_units_pay_for_their_size_once():
    plain, sparse, given = conet(), CoNet(4, (8, 6), sparsity=0.25), embedded()
    sparse.load_state_dict(plain.state_dict())
    size = sum(float(h.weight.abs().sum()) for h in plain.cross)
    losses = [model.losses(model(given, Labels), Labels) for model in (plain, sparse)]
    torch.testing.assert_close(losses[1][0].mean() - losses[0][0].mean(), torch.tensor(0.25 * size), rtol=1e-4, atol=0)
    assert torch.equal(losses[0][1], losses[1][1])


def test_sparsity_shrinks_the_cross_units_of_a_run(tmp_path):
    sizes = {}
    for model in ("conet", "sconet"):
        train(words(datasets.rated(), tmp_path / model, f"model={model}", "recipe=joint"))
        of = tensors(tmp_path / model)
        sizes[model] = sum(float(v.abs().sum()) for name, v in of.items() if "cross" in name and "model" in name)
    assert 0 < sizes["sconet"] < 0.9 * sizes["conet"]
