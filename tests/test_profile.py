"""Backward passes, counted through autograd's engine: of every kind as many as the method has."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import profile_backward

from cdr_dist.bilevel import hypergradient as module
from cdr_dist.configuration import from_words
from cdr_dist.errors import UserError
from tests.datasets import rated, sequenced
from tests.problem import replaced
from tests.runs import words

UPPER = {
    "dev gradient": 1,
    "train gradient with graph": 1,
    "mixed: by weight": 1,
    "mixed: perceptron": 1,
}


_FILES = {file.stem: file.read_text() for file in (Path(__file__).parents[1] / "configs" / "recipe").glob("*.yaml")}
_OF_SEQUENCES = {name for name, text in _FILES.items() if "transfer:" in text or "pretrain:" in text}
RECIPES = sorted(_FILES.keys() - _OF_SEQUENCES)
SEQUENTIAL = sorted(_OF_SEQUENCES - {"uaf_oracle"})  # which asks for planted sequences
MODELS = {"CoNet": [], "a user's own": ["model=custom", "model._target_=tests.backbones.Shared"]}


def counted(tmp_path, *more):
    (found,) = profiled(tmp_path, *more).values()
    return {name: of["passes"] for name, of in found["kinds"].items() if of.get("passes")}, found


def profiled(tmp_path, *more):
    return profile_backward.profile(from_words(words(rated(), tmp_path / "run", *more)), 1)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_with_any_backbone(tmp_path, recipe, model):
    passes, found = counted(tmp_path, f"recipe={recipe}", *MODELS[model])
    upper = UPPER if recipe == "biao" else {}
    lower = {"biao": 7, "gradient_cosine": 2 + 1}.get(recipe, 1)  # the tables take both gradients in one more
    assert passes == {"lower backward": lower, **upper}
    assert found["expected"]["the options"] == sum(passes.values())


@pytest.mark.parametrize("recipe", SEQUENTIAL)
def test_every_recipe_of_sequences(tmp_path, recipe):
    more = ["model=nextitnet", "model.dilations=[1,1]", "batch.size=64", "batch.sequences=16", f"recipe={recipe}"]
    more += ["batch.history_length=8"]
    found = profile_backward.profile(from_words(words(sequenced(), tmp_path / "run", *more)), 1)
    phases = {"pretrain": {"pretrain"}, "uaf": {"pretrain", "finetune"}}.get(recipe, {"finetune"})
    assert found.keys() == phases
    for of in found.values():
        assert {n: kind["passes"] for n, kind in of["kinds"].items() if kind.get("passes")} == {"lower backward": 1}


@pytest.mark.parametrize("terms", [0, 3])
def test_biao(tmp_path, terms):
    """interval + K + 3, the last one in two: from the gradient to the weights, and from the weights to phi."""
    passes, found = counted(tmp_path, "recipe=biao", f"hypergradient.terms={terms}")
    products = {"Hessian-vector product": terms} if terms else {}
    assert passes == {"lower backward": 7, **UPPER, **products}
    assert found["expected"]["interval + K + 3 (the true count)"] == 7 + terms + 3 == sum(passes.values()) - 1
    assert all(of["ms"] > 0 for of in found["kinds"].values())
    assert found["kinds"]["lower backward"]["mflop"] > 0


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (["hypergradient.precondition=block"], {"Hessian-vector product": 3}),
        (["hypergradient.mode=local", "hypergradient.theta=[dense]"], {"Hessian-vector product": 2}),
        (["batch.accumulate=4"], {"Hessian-vector product": 2, "lower backward": 7 * 5}),
        (["batch.accumulate=60"], {"Hessian-vector product": 2, "lower backward": 7 * 33}),
        (["upper.warm_up_epochs=1"], {"Hessian-vector product": 2}),
    ],
)
def test_options_that_change_the_count(tmp_path, options, more):
    """Parts of 64 rows: 60 would be of two rows, which makes 32."""
    passes, found = counted(tmp_path, "recipe=biao", "hypergradient.terms=2", *options)
    assert passes == {"lower backward": 7, **UPPER, **more}
    assert found["expected"]["the options"] == sum(passes.values())
    block = "hypergradient.precondition=block" in options
    assert found["expected"][f"interval + K + {3 + block} (the true count)"] == 7 + 2 + 3 + block


@pytest.mark.parametrize(("inverse", "products"), [("identity", 0), ("conjugate_gradient", 2)])
def test_every_inverse_counts_its_products(tmp_path, inverse, products):
    options = ["hypergradient.terms=2", f"hypergradient.inverse={inverse}", "hypergradient.damping=0.5"]
    passes, found = counted(tmp_path, "recipe=biao", *options)
    assert passes == {"lower backward": 7, **UPPER, **({"Hessian-vector product": products} if products else {})}
    assert found["expected"]["the options"] == sum(passes.values())


def test_weights_that_pass_a_gradient_on_are_counted_in_parts(tmp_path):
    released = ["preset=as_released", "upper.interval=7", "upper.dev_batch_size=64", "upper.head_refresh=dev:2"]
    passes, found = counted(tmp_path, "recipe=biao", *released, "batch.accumulate=2")
    assert passes["lower backward"] == 7 * 4
    assert found["expected"]["the options"] == sum(passes.values())


def test_every_phase_is_profiled_or_the_one_that_is_named(tmp_path):
    config, warm = (from_words(words(rated(), tmp_path / "run", f"recipe={name}")) for name in ("biao", "joint"))
    config.recipe.phases.insert(0, dataclasses.replace(warm.recipe.phases[0], name="warm"))
    found = profile_backward.profile(config, 1, str(tmp_path / "trace.json"))
    assert {n: sum(k.get("passes", 0) for k in of["kinds"].values()) for n, of in found.items()} == {
        "warm": 1,
        "train": 11,
    }
    assert {file.name for file in tmp_path.glob("trace*")} == {"trace-warm.json", "trace-train.json"}
    assert list(profile_backward.profile(config, 1, phase="train")) == ["train"]
    with pytest.raises(UserError, match="phase=wram: the recipe has no such phase"):
        profile_backward.profile(config, 1, phase="wram")


def test_flops_are_those_of_the_products(tmp_path):
    """Both towers as one; the user's part enters the first layer once."""
    of = profiled(tmp_path, "recipe=joint", "tables.width=4", "model.hidden=[7,3]")["train"]["kinds"]
    assert of["lower forward"]["mflop"] * 1e6 == pytest.approx(2 * 64 * (5 * 4 * 14 + 14 * 6 + 2 * 3), rel=1e-9)
    assert of["lower backward"]["mflop"] == pytest.approx(2 * of["lower forward"]["mflop"], rel=1e-9)


def test_memory_is_what_a_call_holds_at_most():
    class Event:
        def __init__(self, name, start, duration=0, nbytes=0, device="CPU"):
            self.name, self.start_ns, self.duration_ns = (lambda: name), (lambda: start), (lambda: duration)
            self.nbytes, self.flops = (lambda: nbytes << 20), (lambda: 0)
            self.device_type = lambda: type("", (), {"name": device})

    events = [
        Event("cdr.a", 0, 50),
        *(Event("[memory]", t, nbytes=n) for t, n in ((1, 4), (2, -3), (11, 2), (12, -2), (51, 99), (61, 5), (62, -5))),
        Event("[memory]", 3, nbytes=70, device="CUDA"),
        Event("cdr.b", 10, 20),
        Event("cdr.a", 60, 10),
    ]
    costs = profile_backward._costs(events, 2, "cpu")
    assert {kind: (of["calls"], of["mib"], of["peak_mib"]) for kind, of in costs.items()} == {
        "a": (1.0, 4.5, 5.0),
        "b": (0.5, 1.0, 2.0),
    }


def test_as_released(tmp_path):
    """The head is trained on 100 batches before every upper step, and weights take part in the second order."""
    given = [
        "recipe=biao",
        "preset=as_released",
        "upper.interval=7",
        "upper.dev_batch_size=64",
        "upper.head_refresh=dev:9",
    ]
    passes, _ = counted(tmp_path, *given)
    assert passes == {
        "lower backward": 7,
        "head backward": 9,
        "dev gradient": 1,
        "train gradient with graph": 1,
        "Hessian-vector product": 3,
        "mixed: perceptron": 1,
    }


def test_joint_and_a_count_that_changed(tmp_path):
    assert counted(tmp_path, "recipe=joint")[0] == {"lower backward": 1}
    product = module._Problem.hessian_vector

    def twice(self, vector):
        product(self, vector)
        return product(self, vector)

    with replaced(module._Problem, "hessian_vector", twice):
        passes, _ = counted(tmp_path, "recipe=biao", "hypergradient.terms=3")
    assert passes["Hessian-vector product"] == 6


def test_the_command_prints_a_table_and_writes_trace_and_json(tmp_path, monkeypatch, capsys):
    given = words(rated(), tmp_path / "run", "recipe=biao", "hypergradient.terms=1")
    given = [word for word in given if not word.startswith("run=")]
    more = ["cycles=1", "--trace", f"{tmp_path}/trace.json", f"--json={tmp_path}/table.json"]
    profile_backward.main([*given, *more])
    shown = capsys.readouterr().out
    assert "| Hessian-vector product" in shown
    assert "12 counted; 10 by interval + K + 2 (the paper); 11 by interval + K + 3 (the true count)" in shown
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    found = json.loads((tmp_path / "table.json").read_text())["train"]["kinds"]
    assert {f"cdr.{kind}" for kind in found} <= names
    assert set(UPPER) < set(found)
    assert found["lower backward"]["passes"] == 7
    assert 0 < found["lower backward"]["peak_mib"] <= found["lower backward"]["mib"]


def test_options_of_its_own_come_in_three_ways():
    own, rest = profile_backward.own_options(["cycles=3", "--trace", "a", "--json=b", "data=demo", "--check"])
    assert own == {"cycles": "3", "phase": "", "trace": "a", "json": "b"}
    assert rest == ["data=demo", "--check"]
    with pytest.raises(UserError, match="--trace: give a value"):
        profile_backward.own_options(["--trace"])
