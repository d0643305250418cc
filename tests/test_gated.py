"""The gate of gradient_cosine, against gradients of dense tables over the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from cdr_dist.configuration import from_words
from cdr_dist.models.protocol import cross_entropy
from cdr_dist.training.launch import alone
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests.datasets import rated
from tests.processes import on_workers
from tests.runs import lines, same_run, summary, tensors, train, words

GIVEN = ["recipe=gradient_cosine", "trainer.log_every=10", "model.hidden=[8]", "tables.width=8"]
SIGN = "recipe.phases=[{name:train,cycle:[{update:{_target_:cdr_dist.training.gated.GatedLower,gate:sign}}]}]"


def steps(rank, workers, given, count):
    """Values of the first steps, on this worker."""
    config = from_words(given)
    session = Session(config, str(rated()), phases_of(config)[0].cycle)
    (update,) = phases_of(config)[0].cycle
    update.bind(session)
    found = [update.run(False) for _ in range(count)]
    session.close()
    return found


def by_dense_tables(given, after):
    """The cosine of the step after some steps: both gradients of whole tables, by plain autograd."""
    config = from_words(given)
    with alone():
        session = Session(config, str(rated()), phases_of(config)[0].cycle)
        (update,) = phases_of(config)[0].cycle
        update.bind(session)
        for _ in range(after):
            update.run(False)
        batch = session.lower.peek().batch
        tables = {name: session.tables.unsharded(name).double().requires_grad_() for name in session.tables.specs}
        model = session.model.double()
        session.close()
    embedded = {
        feature: functional.embedding(batch.train[feature].values(), tables[table], padding_idx=0)
        for feature, table in model.spec().features.items()
    }
    output = model(embedded, batch)
    losses = (
        cross_entropy(output.target_logit, batch.label).mean(),
        (batch.source_valid * cross_entropy(output.source_logit, batch.source_label)).mean(),
    )
    shared = [p for name, p in model.named_parameters() if not name.startswith(model.heads())]
    inputs = [*shared, *tables.values()]
    one, other = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)])
        for loss in losses
    )
    return float(functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_cosine_is_that_of_dense_tables_over_the_whole_batch(workers, tmp_path):
    given = words(rated(), tmp_path / "run", *GIVEN)
    expected = by_dense_tables(given, after=6)
    for found in on_workers(workers, steps, workers, given, 7):
        assert found[-1]["gradient_cosine"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-3


def test_an_open_gate_is_joint_training_and_a_closed_one_is_without_the_source_loss(tmp_path, monkeypatch):
    from cdr_dist.training.gated import GatedLower

    def run(name, *more):
        train(words(rated(), tmp_path / name, "model.hidden=[8]", "trainer.max_steps=12", *more))
        return tensors(tmp_path / name)

    for cosine, recipe in ((1.0, "joint"), (-0.5, "source_features")):
        with monkeypatch.context() as patched:
            patched.setattr(GatedLower, "_cosine", lambda *_, c=cosine: c)
            gated = run(f"gated-{recipe}", "recipe=gradient_cosine")
        plain = run(recipe, f"recipe={recipe}")
        plain = {name: of for name, of in plain.items() if "source_head" not in name and "optimiser" not in name}
        assert "dense.model.target_head.weight" in plain or len(plain) > 10
        for name, of in plain.items():
            torch.testing.assert_close(gated[name], of, rtol=1e-4, atol=1e-6, msg=name)


def test_the_gate_is_the_positive_part_or_the_sign(tmp_path):
    for given in (words(rated(), tmp_path, *GIVEN), words(rated(), tmp_path, *GIVEN, SIGN)):
        with alone():
            found = steps(0, 1, given, 12)
        cosines = [of["gradient_cosine"] for of in found]
        gates = [of["gate"] for of in found]
        assert gates == [float(c > 0) if given[-3] == SIGN or SIGN in given else max(0.0, c) for c in cosines]


def test_two_workers_train_as_one_and_a_resume_repeats_the_run(tmp_path):
    for workers in (1, 2):
        train(words(rated(), tmp_path / f"{workers}", *GIVEN), workers)
    one, two = (summary(tmp_path / f"{workers}") for workers in (1, 2))
    assert one["metrics"]["valid"]["logloss"] == pytest.approx(two["metrics"]["valid"]["logloss"], abs=1e-4)
    assert one["backward_passes"]["lower"] == one["backward_passes"]["predicted"] == 2 * one["steps"]
    train(words(rated(), tmp_path / "cut", *GIVEN), killed_after=44)
    train(words(rated(), tmp_path / "cut", *GIVEN))
    same_run(tmp_path / "1", tmp_path / "cut")
    assert "gradient_cosine" in lines(tmp_path / "1", "train")[0]["values"]
