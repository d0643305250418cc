"""Ranks among all items, against a plain model that scores every pair as a batch of its own."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import FIRST_ID
from cdr_dist.data.feature_names import of_history
from cdr_dist.embeddings.features import ids_by_table, rows_by_feature
from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import ranking
from cdr_dist.models.conet import CoNet
from cdr_dist.models.pairs import _RowByRow, pair_scorer
from cdr_dist.training import full_ranking as module
from cdr_dist.training import positives, product_ranks
from cdr_dist.training.console import Console
from cdr_dist.training.evaluate import evaluation_rows
from cdr_dist.training.evaluation_job import evaluation_job
from cdr_dist.training.run_folder import RunFolder
from cdr_dist.training.session import Session
from cdr_dist.training.worker import phases_of
from tests import datasets
from tests.problem import replaced
from tests.processes import on_workers
from tests.runs import lines, summary, train, words

ITEM_FEATURES = ("target_item", "target_category")


@pytest.mark.parametrize("hidden", [(8,), (8, 4), (16, 8, 4)])
@pytest.mark.parametrize("source", [True, False])
def test_pair_scores_of_conet_are_those_of_its_forward_pass(hidden, source):
    torch.manual_seed(3)
    model = CoNet(6, hidden, source).double()
    nn.init.normal_(model.target_head.weight)
    features = list(model.spec().features)
    rows = {f: torch.randn(5, 6, dtype=torch.float64) for f in features if f not in ITEM_FEATURES}
    items = {f: torch.randn(7, 6, dtype=torch.float64) for f in ITEM_FEATURES}
    expected = torch.empty(5, 7, dtype=torch.float64)
    for i in range(5):
        for j in range(7):
            pair = {f: rows[f][i : i + 1] for f in rows} | {f: items[f][j : j + 1] for f in items}
            expected[i, j] = model(pair, None).target_logit
    assert expected.std() > 0.01
    for scorer in (pair_scorer(model), _RowByRow(model)):
        found = scorer.logits(scorer.row_part(rows, None)[:, None], scorer.item_part(items))
        torch.testing.assert_close(found, expected)
        aligned = scorer.logits(scorer.row_part(rows, None)[:5], scorer.item_part(items)[:5])
        torch.testing.assert_close(aligned, expected.diagonal())


KS = (1, 3, 10)
DATA = ["rated", "sampled"]
CASES = [(data, recipe) for recipe in ("joint", "target_only", "mf") for data in DATA] + [("sequenced", "uaf_soft")]
MODELS = {
    "mf": ["model=mf", "tables.lr=0.3"],
    "uaf_soft": ["model=nextitnet", "model.dilations=[1,4]", "tables.width=8", "tables.lr=0.3"],
}


@contextlib.contextmanager
def _trained(data, recipe, change=None, exclude="train"):
    """recipe: mf: matrix factorisation, whose logits are a product; uaf_soft: those of sequences."""
    given = MODELS.get(recipe, []) + [f"recipe={'target_only' if recipe == 'mf' else recipe}"]
    given += ["batch.size=64", "trainer.workers=1", "trainer.epochs=1", f"evaluation.full_exclude={exclude}"]
    given += ["model.loss=bce"] if recipe == "mf" and data.endswith("rated") else []
    config = from_words([f"data={data}", *given])
    (phase,) = phases_of(config)
    session = Session(config, data, phase.cycle)
    for update in dict.fromkeys(phase.cycle):
        update.bind(session)
    for _ in range(30):
        phase.cycle[0].run(False)
    if change is not None:
        change(session)
    try:
        yield session
    finally:
        session.close()


def ranked(rank, data, recipe, small=True, change=None, exclude="train"):
    with contextlib.ExitStack() as held:
        session = held.enter_context(_trained(data, recipe, change, exclude))
        if small:  # several lookups, several looks at what is settled
            for name, value in (("LOOKED_UP", 33), ("COLUMNS", 7), ("PAIRS", 28)):
                held.enter_context(replaced(module, name, value))
            held.enter_context(replaced(positives, "HELD_ROWS", 1))
            held.enter_context(replaced(product_ranks, "TILE_ITEMS", 24))
        return module.full_ranking(session, "test", KS)


def by_brute_force(rank, data, recipe, exclude="train"):
    """Every row with label 1, every item, one forward pass a row; the metrics of lists of stored negatives."""
    groups, labels, scores = [], [], []
    with _trained(data, recipe) as session, torch.no_grad():
        session.model.eval()
        trained = {}
        for row in datasets.rows_of(Path(data), "train").iter_rows(named=True):
            trained.setdefault(row["user"], set()).add(row["item"])
        items = np.arange(FIRST_ID, session.manifest.rows["target_item"])
        for rows in evaluation_rows(session, "test"):
            batch = session.builder.evaluate(rows.stored, rows.global_rows, negatives=False)
            found = session.tables.read(ids_by_table(batch.train, session.features))
            found = rows_by_feature(found, batch.train, session.features)
            asked = session.builder.target_items(items)
            tables = {f: session.features[f] for f in ITEM_FEATURES if f in session.features}
            of_items = rows_by_feature(session.tables.read(ids_by_table(asked, tables)), asked, tables)
            for i in np.flatnonzero((batch.label > 0).numpy()):
                own = int(batch.train["target_item"].values()[i])
                many = {f: x if of_history(f) else x[i].expand(len(items), -1) for f, x in found.items()} | of_items
                alone = replace(batch, histories={d: h.some(i, i + 1) for d, h in batch.histories.items()})
                logit = session.model(many, alone).target_logit.numpy()
                for item, score in zip(items.tolist(), logit, strict=True):
                    if item == own or exclude == "none" or item not in trained.get(int(batch.user[i]), ()):
                        groups.append(int(batch.example[i]))
                        labels.append(float(item == own))
                        scores.append(float(score))
    return {f"full_{name}": value for name, value in ranking(groups, labels, scores, KS).items()}


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_ranks_are_those_of_scoring_everything_and_the_same_on_any_number_of_workers(name, recipe):
    data = str(getattr(datasets, name)())
    (expected,) = on_workers(1, by_brute_force, data, recipe)
    assert 0.02 < expected["full_hr@10"] < 0.98
    (whole,) = on_workers(1, ranked, data, recipe, False)
    assert whole == pytest.approx(expected, abs=1e-12)
    for workers in (1, 2, 3):
        for found in on_workers(workers, ranked, data, recipe):
            assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("recipe", ["joint", "mf"])
def test_a_positive_has_to_beat_what_its_user_trained_on_where_nothing_is_excluded(recipe):
    data = str(datasets.sampled())
    (expected,) = on_workers(1, by_brute_force, data, recipe, "none")
    (found,) = on_workers(1, ranked, data, recipe, True, None, "none")
    assert found == pytest.approx(expected, abs=1e-12)
    (without,) = on_workers(1, ranked, data, recipe)
    assert found["full_mrr@10"] < without["full_mrr@10"]


def test_equal_scores_share_their_ranks():
    """A head of zeros: a positive among 80 items, less the user's 4, is at each of 77 places as often."""
    data = str(datasets.rated())
    (found,) = on_workers(1, ranked, data, "joint", True, _zero)
    for k in KS:
        assert abs(found[f"full_hr@{k}"] - k / 77) < 2e-3 * k


def test_scores_that_are_not_finite_are_named():
    with pytest.raises(Exception, match="scores are not finite") as caught:
        on_workers(1, ranked, str(datasets.rated()), "joint", True, _nan)
    assert caught.type is UserError or "UserError" in str(caught.value)


@pytest.mark.parametrize("given", ["ten", "0", "", "10,-1"])
def test_a_malformed_k_is_named_before_anything_is_opened(given):
    with pytest.raises(UserError, match=f"full_ks={given}: numbers of 1 or more are wanted"):
        evaluation_job(["run=runs/none", f"full_ks={given}"])


def _zero(session):
    session.model.target_head.weight.data.zero_()


def _nan(session):
    session.model.target_head.weight.data.fill_(float("nan"))


def test_a_full_metric_selects_the_checkpoint_and_is_measured_at_validations_only_then(tmp_path):
    given = ["model=mf", "recipe=target_only", "tables.lr=0.3", "trainer.max_steps=24", "evaluation.every=8"]
    given += ["evaluation.full_ks=[3,5]", "evaluation.patience=0"]
    train(words(datasets.sampled(), tmp_path / "full", *given, "evaluation.metric=full_mrr@5"))
    train(words(datasets.sampled(), tmp_path / "auc", *given))
    found, valid = summary(tmp_path / "full"), lines(tmp_path / "full", "valid")
    best = max(valid, key=lambda line: line["values"]["full_mrr@5"])
    assert found["best"] == {"step": best["step"], "metric": "full_mrr@5", "value": best["values"]["full_mrr@5"]}
    for name in ("full_hr@3", "full_ndcg@5", "full_mrr@5"):
        assert found["metrics"]["valid"][name] == best["values"][name]
        assert name in found["metrics"]["test"]
    assert not [name for line in lines(tmp_path / "auc", "valid") for name in line["values"] if "full" in name]
    assert "full_mrr@5" in summary(tmp_path / "auc")["metrics"]["valid"]


def test_the_console_shows_what_selects(tmp_path, capsys):
    place = RunFolder(str(tmp_path))
    with Console(place, "run", 10):
        place.log(step=9, phase="train", split="valid", values={"auc": 0.5, "full_mrr@5": 0.25, "f1": 0.125})
    assert capsys.readouterr().err.splitlines() == ["run  step 9  valid  auc 0.5000  f1 0.1250  full_mrr@5 0.2500"]
