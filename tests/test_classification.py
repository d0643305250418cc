"""Classes: the metrics by hand, the dataset that knows them all, and predictions by whatever scores items."""

from __future__ import annotations

import contextlib
import functools
import math

import numpy as np
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import FIRST_ID, read_manifest
from cdr_dist.data.demo import write_planted
from cdr_dist.data.planted_sequences import PlantedSequences
from cdr_dist.data.prepare_options import PrepareOptions
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.evaluation.classification import classification, most_likely
from cdr_dist.training.checks import check_before_start
from cdr_dist.training.class_metrics import class_metrics
from cdr_dist.training.evaluate import evaluation_rows
from cdr_dist.training.session import Session
from tests import datasets
from tests.processes import on_workers
from tests.runs import distances, lines, summary, train, words
from tests.test_prepare import keys_of, run

MF = ["model=mf", "recipe=target_only"]


def by_hand(predicted, true, classes, positive):
    pairs = list(zip(predicted, true, strict=True))

    def f1(of):
        right = sum(p == t == of for p, t in pairs)
        wrong = sum((p == of) != (t == of) for p, t in pairs)
        return 2 * right / (2 * right + wrong) if right + wrong else None

    found = [f1(c) for c in range(classes)]
    kept = [value for value in found if value is not None]
    macro = sum(kept) / len(kept)
    return {
        "accuracy": sum(p == t for p, t in pairs) / len(pairs),
        "f1": (found[positive] or 0) if classes == 2 else macro,
    }


@pytest.mark.parametrize(
    ("predicted", "true", "classes", "positive"),
    [
        ([0, 1, 2, 2, 1, 0], [0, 2, 2, 2, 1, 1], 3, 1),
        ([0, 1, 3, 3, 1, 0], [0, 3, 3, 3, 1, 1], 5, 1),  # nobody has 2 or 4 or is taken for one
        ([0, 0, 0], [0, 4, 4], 5, 1),  # one that nobody is taken for counts as 0
        ([0, 1, 1, 0, 1], [0, 1, 0, 0, 1], 2, 1),
        ([0, 1, 1, 0, 1, 0], [0, 1, 0, 0, 1, 0], 2, 0),
        ([0, 0], [0, 0], 2, 1),  # a positive class that is nowhere: 0
    ],
)
def test_accuracy_and_f1_are_those_counted_by_hand(predicted, true, classes, positive):
    found = classification(torch.tensor(predicted), torch.tensor(true), classes, positive)
    assert found == pytest.approx(by_hand(predicted, true, classes, positive), abs=1e-6)


def test_without_rows_there_is_no_value():
    none = torch.empty(0, dtype=torch.int64)
    assert all(math.isnan(value) for value in classification(none, none, 3).values())


def test_of_equal_scores_the_smallest_class_is_taken():
    assert most_likely(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]])).tolist() == [1, 0, 2]


CLASSES, LEFT_OUT = 12, 10
"""More than ten, so that the order of their keys is not that of their numbers; one that nobody has."""


def logs(classes, users=90):
    source = [(f"u{u}", f"s{(u + n) % 17}", n, 5.0) for u in range(users) for n in range(3)]
    target = [(f"u{u % 30}", str(min(u * 7 % classes, LEFT_OUT - 1)), u // 30, 5.0) for u in range(users)]
    return source, target


@functools.cache
def classed():
    """30 users, each with a class in train, one in validation and one in test."""
    out = datasets.scratch() / "classed"
    out.mkdir()
    given = {"labels": "sampled", "split": "time", "valid_from": 1, "test_from": 2, "classes": CLASSES}
    options, _ = run(out, *logs(CLASSES), rows_per_shard=8, **given)
    return options.out


def test_the_dataset_knows_every_class():
    assert sorted(map(int, list(keys_of(classed(), "target_item").values())[2:])) == list(range(CLASSES))
    manifest = read_manifest(classed())
    assert (manifest.classes, manifest.options["classes"]) == (CLASSES, CLASSES)
    assert LEFT_OUT not in {int(item) for _, item, *_ in logs(CLASSES)[1]}


@pytest.mark.parametrize("item", ["12", "-1", "1.0", "female", "03", "²"])
def test_an_item_that_is_no_class_is_named_with_its_line(tmp_path, item):
    source, target = logs(CLASSES)
    target[4] = ("u4", item, 0, 5.0)
    message = f"t.tsv: line 6: item '{item}' is no class: classes=12 wants whole numbers 0 to 11"
    with pytest.raises(UserError) as caught:
        run(tmp_path, source, target, labels="sampled", classes=CLASSES)
    assert str(caught.value).endswith(message)
    assert not (tmp_path / "out").exists()


def test_one_class_is_none(tmp_path):
    with pytest.raises(UserError, match="classes=1: there must be two or more"):
        PrepareOptions(source="s", target="t", out="o", classes=1)


@contextlib.contextmanager
def session_of(data, given, equal=False):
    config = from_words([f"data={data}", *given, "trainer.workers=1", "evaluation.batch_size=10"])
    session = Session(config, data)
    generator = torch.Generator().manual_seed(1)
    for name, (first, shard) in session.tables.shards().items():
        values = torch.randn(1000, shard.shape[1], generator=generator)  # as the same rows on any number of workers
        values = values[:1].expand_as(values) if equal and name.startswith("target") else values
        shard.copy_(values[first : first + len(shard)])
    for parameter in session.model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    try:
        yield session
    finally:
        session.close()


def measured(rank, data, given, equal=False):
    with session_of(data, given, equal) as session:
        return class_metrics(session, "test")


def by_brute_force(rank, data, given):
    """One forward pass a row, over all classes in the order of their ids."""
    predicted, true = [], []
    keys = keys_of(data, "target_item")
    with session_of(data, given) as session, torch.no_grad():
        session.model.eval()
        items = np.arange(FIRST_ID, session.manifest.rows["target_item"])
        asked = session.builder.target_items(items)
        tables = {f: t for f, t in session.features.items() if f in ("target_item", "target_category")}
        of_items = rows_by_feature(session.tables.read(ids_by_table(asked, tables)), asked, tables)
        for rows in evaluation_rows(session, "test"):
            batch = session.builder.evaluate(rows.stored, rows.global_rows, negatives=False)
            found = rows_by_feature(
                session.tables.read(ids_by_table(batch.train, session.features)), batch.train, session.features
            )
            for i in range(len(rows.stored)):
                many = {f: found[f][i].expand(len(items), -1) for f in found} | of_items
                predicted.append(int(keys[int(items[session.model(many, None).target_logit.argmax()])]))
                true.append(int(keys[int(rows.stored["item"][i])]))
    return by_hand(predicted, true, CLASSES, 1)


@pytest.mark.parametrize("given", [MF, ["model=conet", "recipe=joint"]], ids=["product", "pairs"])
def test_predictions_are_those_of_the_forward_pass_on_any_number_of_workers(given):
    (expected,) = on_workers(1, by_brute_force, classed(), given)
    assert 0 < expected["f1"] < 1
    for workers in (1, 2, 3):
        for found in on_workers(workers, measured, classed(), given):
            assert found == pytest.approx(expected, abs=1e-6)


def test_classes_with_equal_rows_tie_and_the_smallest_is_predicted():
    (found,) = on_workers(1, measured, classed(), MF, True)
    true = [int(item) for _, item, time, _ in logs(CLASSES)[1] if time == 2]
    assert found == pytest.approx(by_hand([0] * len(true), true, CLASSES, 1), abs=1e-6)


def test_f1_selects_the_checkpoint_and_stands_in_the_summary(tmp_path):
    given = [*MF, "tables.lr=0.5", "batch.size=16", "evaluation.metric=f1", "evaluation.patience=0"]
    train(words(classed(), tmp_path / "run", *given, "trainer.max_steps=20", "evaluation.every=4"))
    found, valid = summary(tmp_path / "run"), lines(tmp_path / "run", "valid")
    best = max(valid, key=lambda line: line["values"]["f1"])
    assert found["best"] == {"step": best["step"], "metric": "f1", "value": best["values"]["f1"]}
    assert found["metrics"]["valid"]["f1"] == best["values"]["f1"]
    assert 0 <= found["metrics"]["test"]["accuracy"] <= 1


def test_a_softmax_over_classes_trains_alike_on_any_number_of_workers(tmp_path):
    shape = PlantedSequences(users=300, source_users=0, classes=4, target_behaviours=1, shortest=5, longest=8)
    data = str(tmp_path / "data")
    write_planted(shape, data)
    sizes = ["tables.width=8", "batch.sequences=64", "batch.history_length=8", "trainer.max_steps=8"]
    given = ["model=nextitnet", "model.dilations=[1,4]", "model.loss=softmax", *sizes, "evaluation.full_ks=[]"]
    train(words(data, tmp_path / "pre", *given, "recipe=pretrain"))
    given += ["recipe=finetune_all", f"warm_start.run={tmp_path}/pre", "evaluation.metric=accuracy", "batch.size=30"]
    for workers in (1, 2):
        train(words(data, tmp_path / f"{workers}", *given), workers)
    one, two = (summary(tmp_path / f"{workers}") for workers in (1, 2))
    assert one["steps"] == two["steps"] == 8
    for split in ("valid", "test"):
        assert one["metrics"][split] == pytest.approx(two["metrics"][split], abs=1e-3)
    assert 0.25 < one["metrics"]["test"]["accuracy"] < 1
    assert max(distances(tmp_path / "1", tmp_path / "2").values()) < 2e-5


def test_the_positive_class_is_one_of_two(tmp_path):
    source, target = logs(2, 30)
    options, _ = run(tmp_path, source, target, labels="sampled", split="time", valid_from=1, test_from=2, classes=2)
    config = from_words(words(options.out, tmp_path / "run", *MF, "evaluation.positive_class=2"))
    with pytest.raises(UserError, match=r"evaluation\.positive_class=2: classes are 0 and 1"):
        check_before_start(config, options.out)
