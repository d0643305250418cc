"""Whole runs of sequential transfer: laws 2 to 4 in both phases, what is frozen stays, and what fits what."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.batch import Batch
from cdr_dist.data.dataset import SEQUENCES, read_manifest
from cdr_dist.data.demo import dataset_of, write_planted
from cdr_dist.data.planted_sequences import PlantedSequences
from cdr_dist.data.truth import kind_of_user
from cdr_dist.errors import UserError
from cdr_dist.models.encoder import Encoder
from cdr_dist.training.checks import check_before_start
from cdr_dist.training.next_item import NextItem
from cdr_dist.training.session import Session
from cdr_dist.training.start import check_start
from cdr_dist.training.upper import Upper
from cdr_dist.training.weighting import Learned
from cdr_dist.training.worker import phases_of
from tests.datasets import copied, edited, rated, scratch, sequenced
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import KILLED, SEQUENTIAL, distances, lines, newest, same_run, steps_of, summary, tensors, train, words

FINE_TUNED = (
    "finetune_cls",
    "finetune_last1",
    "finetune_last2",
    "finetune_all",
    "peterrec",
    "uaf_hard",
    "uaf_soft",
    "uaf_rl",
    "uaf_random",
)


def given(run: Path, recipe: str, *more: str) -> list[str]:
    return words(sequenced(), run, *SEQUENTIAL, f"recipe={recipe}", *more)


@functools.cache
def finished(recipe: str, workers: int = 1, *more: str) -> Path:
    name = "-".join([recipe, str(workers), *more]).replace("/", "_")
    run = scratch() / f"transfer-{name}"
    train(given(run, recipe, *more), workers)
    return run


def pretrained() -> Path:
    return finished("pretrain")


def stored_sequences() -> list[int]:
    """Numbers of all that there are to train on, in order."""
    files = Path(sequenced(), SEQUENCES[0]).glob("*.parquet")
    return sorted(example for file in files for example in pq.read_table(file)["example_id"].to_pylist())


def test_pre_training_sees_every_sequence_once_an_epoch() -> None:
    stored = stored_sequences()
    seen = [
        example for of in on_workers(2, _sequences_of_an_epoch, given(scratch() / "x", "pretrain")) for example in of
    ]
    assert sorted(seen) == stored
    assert len(set(stored)) == len(stored) > 24


def _sequences_of_an_epoch(rank: int, found: list[str]) -> list[int]:
    config = from_words(found)
    session = Session(config, config.data, [u for p in phases_of(config) for u in p.cycle])
    seen = []
    while session.sequences.place.epoch == 0:
        batch = session.sequences.next().batch
        real = batch.histories["source"].lengths > 0
        seen += batch.example[real].tolist()
    session.close()
    return seen


def of_five_steps() -> list[str]:
    """Batches of which an epoch has five, the last one too short to reach three workers."""
    manifest = read_manifest(str(sequenced()))
    rows = manifest.examples("train")
    size = next(n for n in range(rows // 4, 0, -1) if 0 < rows % n <= 2 and rows // n < 8)
    return [f"batch.size={2 * size}", f"batch.sequences={manifest.examples(SEQUENCES[0]) // 4 - 1}"]


def test_pre_training_resumed_on_another_number_of_workers_sees_every_sequence_once(tmp_path: Path) -> None:
    run, within = given(tmp_path / "run", "pretrain", *of_five_steps()), functools.partial(recording, str(tmp_path))
    assert train([*run, "trainer.checkpoint_every=3"], 1, killed_after=3, within=within) == [KILLED]
    train(run, 2, within=within)
    seen = [[int(line) for line in file.read_text().split()] for file in tmp_path.glob("*.seen")]
    assert len(seen) == 3
    assert sorted(example for of in seen for example in of) == stored_sequences()


@contextlib.contextmanager
def recording(folder: str) -> Iterator[None]:
    """Writes the sequences that every update of pre-training of this worker trains on."""
    original = NextItem.run
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".seen", delete=False) as out:

        def run(update: NextItem, stop_wanted: bool) -> dict[str, float]:
            batch = update._session.sequences.peek().batch
            values = original(update, stop_wanted)
            out.writelines(f"{example}\n" for example in batch.example[batch.histories["source"].lengths > 0].tolist())
            return values

        with replaced(NextItem, "run", run):
            yield


MORE = {
    "pretrain": [],
    "mtl": ["model=nextitnet_mtl"],
    "all positions": ["recipe=joint", "model=nextitnet_mtl", "model.source_positions=all"],
    "biao": ["model=nextitnet_mtl", "upper.interval=2"],
}
"""Words that a recipe of five steps takes; one that is not here fine-tunes."""


def five_steps(recipe: str) -> list[str]:
    return [*MORE.get(recipe, [f"warm_start.run={pretrained()}"]), *of_five_steps()]


@pytest.mark.parametrize(
    ("recipe", "workers"),
    [(of, n) for of in ("pretrain", "peterrec", "uaf_hard", "uaf_rl", "mtl", "all positions") for n in (2, 3)]
    + [(of, 2) for of in ("uaf_random", "finetune_last1", "biao")],
)
def test_runs_agree_on_any_number_of_workers(recipe: str, workers: int) -> None:
    """After few steps: what follows of a rounding error grows with every ReLU whose input is almost 0."""
    one, other = (finished(recipe, n, *five_steps(recipe)) for n in (1, workers))
    assert 4 < steps_of(other) == steps_of(one) < 9
    assert summary(other)["upper_steps"] == summary(one)["upper_steps"] == 2 * (recipe == "biao")
    apart = distances(one, other)
    assert max(apart.values()) < 2e-5, max(apart.items(), key=lambda of: of[1])
    left, right = (summary(run)["metrics"]["test"] for run in (one, other))
    assert left == pytest.approx(right, abs=2e-3)


@pytest.mark.parametrize("recipe", ["pretrain", "peterrec", "uaf_rl", "uaf_random", "mtl"])
def test_every_kind_of_run_killed_and_resumed_gives_the_same_bits(recipe: str, tmp_path: Path) -> None:
    run = given(tmp_path / "run", recipe, *five_steps(recipe))
    assert train([*run, "trainer.checkpoint_every=3"], killed_after=4) == [KILLED]
    assert newest(tmp_path / "run").name == "step-00000003"
    train(run)
    same_run(finished(recipe, 1, *five_steps(recipe)), tmp_path / "run")


def phase_steps(run: Path) -> tuple[int, int]:
    """Steps at which the phases of a run of two end."""
    valid = lines(run, "valid")
    return max(of["step"] for of in valid if of["phase"] == "pretrain"), summary(run)["steps"]


def test_the_planted_truth_decides_for_every_user(tmp_path: Path) -> None:
    """Of a run on planted sequences the shares of fine-tuned copies are those of contrary users."""
    folder = str(tmp_path / "data")
    manifest = write_planted(PlantedSequences(users=300, source_users=0, shortest=6, longest=8), folder)
    users, truth = pl.read_parquet(f"{folder}/vocab/user.parquet"), pl.read_parquet(f"{folder}/truth.parquet")
    contrary = users.join(truth, left_on="key", right_on="user_id").filter(pl.col("kind") == "contrary")["id"]
    found = kind_of_user(folder, manifest)
    assert set(np.flatnonzero(found == 0)) == set(contrary.to_list())
    assert 80 < len(contrary) < 160
    assert set(found) == {0.0, 1.0}
    for recipe, more in (("pretrain", []), ("uaf_oracle", [f"warm_start.run={tmp_path}/pretrain"])):
        train(words(folder, tmp_path / recipe, *SEQUENTIAL, f"recipe={recipe}", *more, "trainer.max_steps=5"))
    test = pl.read_parquet(f"{folder}/test/*.parquet")["user"]
    share = test.is_in(contrary.to_list()).mean()
    policy = summary(tmp_path / "uaf_oracle")["policy"]
    assert policy["tuned_share"]["test"] == pytest.approx([share] * 2)
    assert policy["tuned_sd"]["test"] == pytest.approx([(share * (1 - share)) ** 0.5] * 2)


@pytest.mark.parametrize("where", ["in the first phase", "where it ends", "in the second phase"])
def test_a_run_of_two_phases_killed_and_resumed_gives_the_same_bits(where: str, tmp_path: Path) -> None:
    whole = finished("uaf")
    first, last = phase_steps(whole)
    dies = {"in the first phase": first - 2, "where it ends": first, "in the second phase": first + 4}[where]
    run = given(tmp_path / "run", "uaf")
    every = max(1, dies - 1)
    assert train([*run, f"trainer.checkpoint_every={every}"], 1, dies) == [KILLED]
    assert steps_of(tmp_path / "run") <= dies < last
    train(run)
    same_run(whole, tmp_path / "run")


def test_both_phases_in_one_run_are_the_two_runs(tmp_path: Path) -> None:
    whole, first = finished("uaf"), finished("pretrain")
    second = finished("uaf_hard", 1, f"warm_start.run={first}")
    assert summary(whole)["steps"] == summary(first)["steps"] + summary(second)["steps"]
    x, y = tensors(whole), tensors(second)
    shared = [name for name in y if not name.startswith("dense.optimisers") and "source_output" not in name]
    assert {"tables.source_item.weights", "tables.target_item.weights"} <= set(shared)
    # What a policy draws is drawn by epoch and example, not by step: the runs are one but for their steps' numbers.
    assert [name for name in shared if not torch.equal(x[name], y[name])] == []


@pytest.mark.parametrize("recipe", FINE_TUNED)
def test_what_is_frozen_stays_and_costs_no_state(recipe: str) -> None:
    run = finished(recipe, 1, f"warm_start.run={pretrained()}")
    before, after = tensors(pretrained()), tensors(run)
    model = {
        n.removeprefix("dense.modules.model."): v for n, v in after.items() if n.startswith("dense.modules.model.")
    }
    moved = {
        n
        for n, v in model.items()
        if n.startswith("encoder.blocks") and not torch.equal(v, before["dense.modules.model." + n])
    }
    blocks = {n.split(".")[2] for n in moved}
    wanted = {"finetune_last1": {"1"}, "finetune_last2": {"0", "1"}, "finetune_all": {"0", "1"}, "peterrec": {"0", "1"}}
    assert blocks == wanted.get(recipe, set())
    if recipe == "peterrec":
        assert {n.split(".")[3] for n in moved} == {"norm2"}
    apart = {
        n.split(".")[2]
        for n, v in model.items()
        if ".copies." in n and not torch.equal(v, model[n.replace("copies", "blocks")])
    }
    assert apart == ({"0", "1"} if recipe.startswith("uaf") else set())
    zero_at_first = [v for n, v in model.items() if n.endswith((".up.weight", "policy.head.weight"))]
    assert len(zero_at_first) == {"peterrec": 4, "uaf_hard": 1, "uaf_soft": 1, "uaf_rl": 1}.get(recipe, 0)
    assert all(v.any() for v in zero_at_first)
    items = "tables.source_item.weights"
    assert torch.equal(before[items], after[items]) == (
        recipe in ("finetune_cls", "finetune_last1", "finetune_last2", "peterrec")
    )
    trained = sum(v.numel() for n, v in model.items() if n in moved or not n.startswith("encoder.blocks"))
    if recipe == "peterrec":  # a norm's weights are all trained, moved or not
        trained = sum(v.numel() for n, v in model.items() if "norm2" in n or not n.startswith("encoder.blocks"))
    state = [v for n, v in after.items() if n.startswith("dense.optimisers.model") and n.endswith("exp_avg")]
    assert sum(v.numel() for v in state) <= trained + 16 * len(model)
    assert bool(state) == (recipe != "finetune_cls")


@pytest.mark.parametrize("recipe", ["finetune_last1", "peterrec", "uaf_hard"])
def test_a_step_moves_what_is_trained_and_leaves_no_gradient_elsewhere(recipe: str) -> None:
    ((trained, gradients, moved),) = on_workers(1, _one_step, given(scratch() / "x", recipe))
    assert gradients == trained
    assert moved <= trained
    kinds = {"finetune_last1": {"blocks"}, "peterrec": {"blocks", "adapters1", "adapters2"}}
    assert {n.split(".")[1] for n in moved} == kinds.get(recipe, {"copies", "policy"})


def _one_step(rank: int, found: list[str]) -> tuple[set[str], set[str], set[str]]:
    """Names of parameters: those to be trained, those with gradients, those that a step moved."""
    config = from_words(found)
    (phase,) = phases_of(config)
    session = Session(config, config.data, phase.cycle)
    phase.cycle[0].bind(session)
    before = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    phase.cycle[0].run(False)
    after = dict(session.model.named_parameters())
    session.close()
    gradients = {n for n, p in after.items() if p.grad is not None}
    return set(session.model.trained(False)[0]), gradients, {n for n, p in before.items() if not p.equal(after[n])}


@pytest.mark.parametrize("start", [["pretrain", 1], ["mtl", 1, "model=nextitnet_mtl"]])
def test_copies_begin_as_the_blocks_of_the_run_that_they_start_from(start: list[str], tmp_path: Path) -> None:
    more = ["trainer.max_steps=1", "dense.lr=1e-9", f"warm_start.run={finished(*start)}"]
    train(given(tmp_path / "run", "uaf_hard", *more))
    before, after = tensors(finished(*start)), tensors(tmp_path / "run")
    blocks = [n for n in before if n.startswith("dense.modules.model.encoder.blocks.")]
    assert len(blocks) == 16
    for name in blocks:
        assert torch.allclose(after[name.replace("blocks", "copies")], before[name], rtol=0, atol=1e-7), name


def test_equal_weights_are_joint_training() -> None:
    """Law 6, with the next-item loss as the source's: a perceptron that is all zero weighs every behaviour alike."""
    more = ["model=nextitnet_mtl", *of_five_steps()]
    joint, run = finished("joint", 1, *more), scratch() / "transfer-equal"
    train(given(run, "biao", *more), within=_all_alike)
    x, y = tensors(joint), tensors(run)
    shared = [n for n in x if n.startswith(("tables", "dense.modules.model"))]
    assert max(float((x[n] - y[n]).norm() / x[n].norm().clamp(min=0.1)) for n in shared) < 2e-5


@contextlib.contextmanager
def _all_alike() -> Iterator[None]:
    def alike(self: Learned, batch: Batch, embedded: object) -> torch.Tensor:
        return self._perceptron.weights(torch.zeros(len(batch)), batch.source_valid, batch.global_rows)

    with replaced(Learned, "weights", alike), replaced(Upper, "run", lambda self, stop: {}):
        yield


def test_behaviours_are_weighed_by_next_item_losses() -> None:
    run = finished("biao", 1, "model=nextitnet_mtl", "trainer.epochs=2")
    upper = lines(run, "upper")
    assert upper
    assert all(np.isfinite(of["values"]["hypergradient_norm"]) for of in upper)


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("uaf_hard", [], "recipe=uaf_hard: fine-tunes a pre-trained run; name it, warm_start.run=FOLDER"),
        ("uaf_hard", ["model.dilations=[1,2]"], r"model.dilations is \[1, 4\] there, \[1, 2\] here"),
        ("uaf_hard", ["tables.width=12"], "tables.width is 8 there, 12 here"),
        ("uaf_hard", ["recipe.transfer.policy=lstm"], "recipe.transfer.policy=lstm: choose nextitnet or gru"),
        ("finetune_last2", ["model.dilations=[1]"], "recipe.transfer.last=2: the model has 1 blocks"),
        ("uaf_rl", ["recipe.transfer.decision.reward=x"], "decision.reward=x: choose paper or released"),
        ("pretrain", ["model=conet"], "recipe=pretrain: CoNet has no encoder of sequences; take model=nextitnet"),
    ],
)
def test_a_fine_tune_that_does_not_fit_is_one_line(recipe: str, more: list[str], message: str, tmp_path: Path) -> None:
    start = [] if message.startswith("recipe=uaf_hard: fine") else [f"warm_start.run={pretrained()}"]
    found = [
        w for w in given(tmp_path, recipe, *more, *start) if not (more == ["model=conet"] and w.startswith("model."))
    ]
    with pytest.raises(UserError, match=message):
        _checked(found)


def _checked(found: list[str]) -> None:
    config = from_words(found)
    folder = dataset_of(config.data)
    check_start(config, folder, check_before_start(config, folder))


def test_a_vocabulary_that_is_another_is_named(tmp_path: Path) -> None:
    other = copied(sequenced(), tmp_path)
    manifest = read_manifest(str(other))
    file = other / manifest.vocab["source_item"].path
    keys = pl.read_parquet(file)
    keys.with_columns(pl.col("key").reverse()).write_parquet(file)
    edited(other, seed=9)
    found = given(tmp_path / "run", "uaf_hard", f"warm_start.run={pretrained()}")
    with pytest.raises(UserError, match=r"source_item \S+ was \d+ in .* and is \d+ now"):
        _checked([w for w in found if not w.startswith("data=")] + [f"data={other}"])


def test_a_parameter_that_the_pre_trained_run_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Encoder, "pretrained", lambda self: ["blocks.0.new"])
    with pytest.raises(UserError, match=r"checkpoints/step-\d+: does not fit: has no parameter encoder.blocks.0.new"):
        train(given(tmp_path, "finetune_all", f"warm_start.run={pretrained()}"))


@pytest.mark.parametrize(
    ("preset", "model", "batch"),
    [
        ("uaf_as_paper", {"loss": "bpr", "pooling": "last", "bias": True}, (2 * 256, 256)),
        ("uaf_as_released", {"loss": "bce", "pooling": "mean", "bias": False}, (2 * 128, 128)),
    ],
)
@pytest.mark.parametrize("recipe", ["pretrain", "uaf_hard", "peterrec"])
def test_a_preset_says_what_its_source_does(
    preset: str, model: dict[str, object], batch: tuple[int, int], recipe: str
) -> None:
    config = from_words(["data=x", f"recipe={recipe}", "model=nextitnet", f"preset={preset}"])
    found = {name: config.model[name] for name in ("dilations", *model)}
    assert found == {"dilations": [1, 4] * 4} | model
    assert (config.batch.size, config.batch.sequences) == batch
    assert (config.tables.width, config.dense.lr) == (128, 1e-4)


def test_data_without_sequences_say_how_to_prepare_them(tmp_path: Path) -> None:
    found = [w for w in given(tmp_path, "pretrain") if not w.startswith("data=")]
    with pytest.raises(UserError, match="has no source sequences to pre-train on; prepare it with sequences="):
        _checked([*found, f"data={rated()}", "evaluation.full_ks=[]"])


def test_a_second_phase_goes_on_in_the_second_phase(tmp_path: Path) -> None:
    first, _ = phase_steps(finished("uaf"))
    run = given(tmp_path / "run", "uaf")
    train([*run, "trainer.checkpoint_every=2"], 1, first + 3)
    before = len(lines(tmp_path / "run", "valid"))
    train(run)
    later = lines(tmp_path / "run", "valid")[before:]
    assert newest(tmp_path / "run").name >= f"step-{first:08d}"
    assert {of["phase"] for of in later} == {"finetune"}


@pytest.mark.parametrize("recipe", [*FINE_TUNED, "finetune_zero", "mtl"])
def test_target_items_are_ranked_among_all_by_default(recipe: str) -> None:
    model = "nextitnet_mtl" if recipe == "mtl" else "nextitnet"
    chosen = from_words([f"recipe={recipe}", f"model={model}"]).evaluation
    assert (chosen.metric, 5 in chosen.full_ks) == ("full_mrr@5", True)


@pytest.mark.parametrize(("recipe", "what"), [("pretrain", "sequences"), ("finetune_zero", "source_history")])
def test_sequences_of_unknown_items_are_refused(recipe: str, what: str, tmp_path: Path) -> None:
    folder = str(edited(copied(sequenced(), tmp_path), unknown={what: 0.23}))
    asked = [f"recipe={recipe}", "model=nextitnet", "batch.history_length=8", "softmax.negatives=0"]
    with pytest.raises(
        UserError, match=rf"23\.0% of the items in {what} are unknown, more than trainer.max_unknown=0.05"
    ):
        check_before_start(from_words(words(folder, tmp_path / "run", *asked)), folder)
    check_before_start(from_words(words(folder, tmp_path / "run", *asked, "trainer.max_unknown=.25")), folder)


def test_pre_training_in_parts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch\.accumulate: pre-training takes its batches whole"):
        train(given(tmp_path / "run", "pretrain", "batch.accumulate=2"))
