"""A lower step in parts is the same step, in less memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cdr_dist.bilevel import perceptron as perceptron_module
from cdr_dist.bilevel.perceptron import BehaviouralPerceptron, normalised
from cdr_dist.configuration import from_words
from cdr_dist.training import accumulation, lower
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests.datasets import rated, sampled, scratch
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import distances, lines, train, words

MORE = ["trainer.max_steps=50", "evaluation.patience=0", "trainer.log_every=10"]
RELEASED = ["preset=as_released", "upper.dev_batch_size=64", "upper.head_refresh=lower", "hypergradient.terms=1"]


@functools.cache
def trained(recipe, parts, workers=1, more=(), within=None):
    name = f"parts-{recipe}-{parts}-{workers}-{len(more)}-{getattr(within, '__name__', '')}"
    run = scratch() / name
    given = words(rated(), run, f"recipe={recipe}", *more, *MORE, f"batch.accumulate={parts}")
    train(given, workers, within=within)
    return run


def with_unequal_weights():
    """The perceptron starts with random last layers: as it usually starts, all behaviours weigh the same."""

    def only_gamma(self):
        return {"gamma_raw": torch.tensor(1.0)}

    return replaced(BehaviouralPerceptron, "initial_values", only_gamma)


def furthest(a, b):
    return max(distances(a, b).values())


@pytest.mark.parametrize(("parts", "workers"), [(2, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("recipe", ["joint", "biao"])
def test_parts_give_the_parameters_of_the_whole(recipe, parts, workers):
    """Tables, their statistics, dense parameters, perceptron and optimisers after 50 steps, short ones among them."""
    within = with_unequal_weights if recipe == "biao" else None
    whole, found = (trained(recipe, n, workers, within=within) for n in (1, parts))
    assert furthest(whole, found) < 1e-5
    losses = [[line["values"]["loss"] for line in lines(run, "train")] for run in (whole, found)]
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_parts_never_cut_a_positive_from_its_negatives(tmp_path):
    """A factorisation reads no histories, which tell of other backbones where a row ends; 86 rows of three, in 4 parts.

    What all items have in common drops out of the loss: its gradient is rounding, which Adam makes steps of.
    """
    given = ["model=mf", "recipe=target_only", "model.loss=bpr", "batch.negatives=2", "batch.size=258"]
    for parts in (1, 4):
        train(words(sampled(), tmp_path / str(parts), *given, "trainer.max_steps=9", f"batch.accumulate={parts}"))
    found = distances(tmp_path / "1", tmp_path / "4")
    assert max(of for name, of in found.items() if name.startswith("tables.")) < 1e-5


def test_weights_that_pass_a_gradient_on_do_so_in_parts():
    """perceptron.item_gradient, as released: the item's row gets a gradient through the weights of the whole batch."""
    assert from_words(RELEASED).perceptron.item_gradient
    whole = trained("biao", 1, 1, tuple(RELEASED), within=with_unequal_weights)
    assert furthest(whole, trained("biao", 3, 1, tuple(RELEASED), within=with_unequal_weights)) < 1e-5

    lost = trained("biao", 3, 1, tuple(RELEASED), within=without_the_gradient_of_weights)
    assert furthest(whole, lost) > 1e-4


def without_the_gradient_of_weights():
    original = accumulation.backward_in_parts

    def detached(rows, batch, features, weights, losses, parts):
        return original(rows, batch, features, lambda embedded: weights(embedded).detach(), losses, parts)

    stack = contextlib.ExitStack()
    stack.enter_context(with_unequal_weights())
    stack.enter_context(replaced(lower, "backward_in_parts", detached))
    return stack


def test_an_update_of_the_tables_for_every_part_is_seen():
    assert furthest(trained("joint", 1), trained("joint", 4, within=with_an_update_for_every_part)) > 1e-3


def with_an_update_for_every_part():
    """What adding up gradients of backward passes through the lookup would do."""

    def naive(rows, batch, features, weights, losses, parts):
        for start, stop in accumulation._bounds(len(batch), parts):
            only = torch.zeros(len(batch)).index_fill_(0, torch.arange(start, stop), 1.0)
            embedded = accumulation.rows_by_feature(rows, batch.train, features)
            part = dataclasses.replace(batch, weight=batch.weight * only)
            weighed = weights(embedded)
            found = losses(embedded, part, weighed * only)
            found[0].backward(retain_graph=True)
        return [x.detach() for x in losses(embedded, batch, weighed)]

    return replaced(lower, "backward_in_parts", naive)


def test_weights_over_a_part_instead_of_the_whole_are_seen():
    whole = trained("biao", 1, within=with_unequal_weights)
    assert furthest(whole, trained("biao", 4, within=with_weights_over_parts)) > 1e-3


def with_weights_over_parts():
    """A softmax over each quarter of the rows, with a quarter of gamma each."""

    def parted(score, valid, gamma):
        return torch.cat(
            [
                normalised(score[a:b], valid[a:b], gamma * (b - a) / len(score))
                for a, b in accumulation._bounds(len(score), 4)
            ]
        )

    stack = contextlib.ExitStack()
    stack.enter_context(with_unequal_weights())
    stack.enter_context(replaced(perceptron_module, "normalised", parted))
    return stack


def test_there_may_be_more_parts_than_rows(tmp_path):
    given = words(sampled(), tmp_path / "run", "recipe=biao", "batch.accumulate=1000", "trainer.max_steps=20")
    assert train(given)[0]["steps"] == 20


@pytest.mark.parametrize("recipe", ["joint", "biao"])
def test_it_takes_less_memory(recipe):
    peaks = [on_workers(1, peak_of_a_step, recipe, parts)[0] for parts in (1, 2, 8)]
    assert peaks[1] < 0.9 * peaks[0], peaks
    assert peaks[2] < 0.6 * peaks[0], peaks


def peak_of_a_step(rank, recipe, parts):
    """Bytes that the operators of one lower step held at a time, above what was held before.

    The looked-up rows of the whole batch and their gradients are among them, so towers wide enough to tell.
    """
    given = [f"data={rated()}", f"recipe={recipe}", "batch.size=1200", f"batch.accumulate={parts}", "tables.width=64"]
    config = from_words([*given, "trainer.workers=1", "model.hidden=[512,256,64]"])
    (phase,) = phases_of(config)
    session = Session(config, config.data, phase.cycle)
    phase.cycle[0].bind(session)
    try:
        phase.cycle[0].run(False)  # optimisers make their state
        session.lower.peek()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            phase.cycle[0].run(False)
    finally:
        session.close()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
