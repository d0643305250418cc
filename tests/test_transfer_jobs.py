"""Every job on runs of sequential transfer: what it does, or the one line that says why it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from cdr_dist.configuration import from_words
from cdr_dist.data.dataset import FIRST_ID, SEQUENCES, read_manifest
from cdr_dist.data.prepare import prepare
from cdr_dist.data.prepare_options import PrepareOptions, options_from_words
from cdr_dist.data.synthetic import planted_logs
from cdr_dist.errors import UserError
from cdr_dist.models.nextitnet import NextItNet
from cdr_dist.production.export_job import export_job
from cdr_dist.production.options import read_words
from cdr_dist.production.recommendation_job import recommendation_job
from cdr_dist.production.scorer import features_of
from cdr_dist.training.checks import check_updates
from cdr_dist.training.comparison import compare, text
from cdr_dist.training.evaluation_job import evaluation_job
from cdr_dist.training.report import report_of
from cdr_dist.training.run_folder import SCORES, RunFolder
from tests.datasets import SHAPE, scratch, sequenced
from tests.runs import KILLED, summary, tensors, train
from tests.test_transfer_runs import _checked, finished, given, pretrained

SOURCE_ONLY, TARGET_ONLY = [f"u{n:06d}" for n in range(20)], [f"u{n:06d}" for n in range(20, 30)]


def fine_tuned(recipe: str = "uaf_hard") -> Path:
    return finished(recipe, 1, f"warm_start.run={pretrained()}")


def evaluated(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, float]:
    capsys.readouterr()
    evaluation_job(more)
    found: dict[str, float] = json.loads(capsys.readouterr().out)["metrics"]
    return found


@pytest.mark.parametrize("recipe", ["pretrain", "uaf", "uaf_hard"])
def test_a_run_measured_again_is_as_it_was_measured(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = fine_tuned(recipe) if recipe == "uaf_hard" else finished(recipe)
    for split in ("valid", "test"):
        assert evaluated(capsys, f"run={run}", f"split={split}") == summary(run)["metrics"][split]


def test_on_a_dataset_that_has_grown_a_fine_tuned_run_is_all_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Copies, policy and adapters, too: as on its own dataset, where no row is new."""
    for recipe in ("uaf_hard", "peterrec"):
        run = fine_tuned(recipe)
        assert evaluated(capsys, f"run={run}", f"data={sequenced()}") == summary(run)["metrics"]["test"]


def lists_of(out: Path) -> pl.DataFrame:
    return pl.read_parquet(out / "*.parquet").sort("user_id")


def test_users_of_the_source_alone_are_recommended_what_their_sequence_says(tmp_path: Path) -> None:
    data = with_cold_users(tmp_path)
    run, out = tmp_path / "run", tmp_path / "all"
    train([*(word for word in given(run, "uaf") if not word.startswith("data=")), f"data={data}"])
    recommendation_job([f"run={run}", f"out={out}", "top=5", "workers=0"])
    users = pl.read_parquet(data / "users" / "*.parquet").select("user_id", "user", "source_history_item")
    found = lists_of(out).join(users, on="user_id")
    cold, nothing = pl.col("user") < FIRST_ID, pl.col("source_history_item").list.len() == 0
    assert set(found.filter(cold)["by"]) == {"model"}
    assert len(found.filter(cold)) == found.filter(cold)["item_id"].n_unique() == len(SOURCE_ONLY)
    assert set(found.filter(nothing)["by"]) == {"popularity"}, "the model has no rows of users"
    assert set(found.filter(nothing)["user_id"]) == set(TARGET_ONLY)
    recommendation_job([f"run={run}", f"out={tmp_path / 'two'}", "top=5", "workers=0", "candidates=20"])
    two = lists_of(tmp_path / "two").join(lists_of(out), on="user_id", suffix="_all")
    assert two.select((pl.col("item_id").list.first() == pl.col("item_id_all").list.first()).mean()).item() > 0.8


def with_cold_users(folder: Path) -> Path:
    """As `sequenced`; of some users one log alone."""
    logs, files = planted_logs(SHAPE), {}
    for domain, without in (("source", TARGET_ONLY), ("target", SOURCE_ONLY)):
        files[domain] = str(folder / f"{domain}.csv")
        getattr(logs, domain).filter(~pl.col("user_id").is_in(without)).write_csv(files[domain])
    more = {"labels": "sampled", "eval_negatives": 5, "sequences": 8, "history_length": 8, "split": "user"}
    prepare(PrepareOptions(**files, out=str(folder / "data"), users="target", **more))
    return folder / "data"


def test_an_exported_run_scores_as_the_run_did(tmp_path: Path) -> None:
    run = finished("uaf")
    export_job([f"run={run}", f"out={tmp_path}", "workers=0"])
    about = json.loads((tmp_path / "export.json").read_text())
    wanted = {"source_history_item": "source_item", "target_item": "target_item"}
    assert {f: of["table"] for f, of in about["features"].items()} == wanted
    assert sorted(about["tables"]) == sorted(wanted.values()), "what only pre-training reads is left out"
    tables = {t: pl.read_parquet(tmp_path / "tables" / t / "*.parquet").sort("id") for t in about["tables"]}
    vectors = {t: torch.tensor(rows["vector"].to_list()) for t, rows in tables.items()}
    rows = pl.read_parquet(sequenced() / "test" / "*.parquet").head(40)
    longest = about["features"]["source_history_item"]["shape"][1]
    history = [list(items[-longest:]) for items in rows["source_history_item"]]
    padded = torch.tensor([items + [0] * (longest - len(items)) for items in history])
    ids = {"source_history_item": padded, "target_item": torch.tensor(rows["item"].to_list())}
    features = {f: vectors[wanted[f]][ids[f]] for f in about["features"]}
    lengths = torch.tensor([len(items) for items in history])
    found = torch.export.load(tmp_path / "scorer.pt2").module()(features, {"source": lengths})
    scores = pl.read_parquet(run / SCORES).filter(pl.col("label") > 0).select(example_id="example", score="score")
    expected = rows.join(scores, on="example_id", how="left", maintain_order="left")["score"].to_numpy()
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)
    assert np.std(expected) > 1e-3


def test_a_scorer_asks_for_what_scoring_reads_and_not_for_what_losses_read() -> None:
    model = NextItNet(8, source=True, dilations=[1, 2], categories=True)
    wanted = [f"{of}_{part}" for of in ("source_history", "target") for part in ("item", "category")]
    assert features_of(model, 8, 5) == wanted
    assert len(model.spec().features) > len(wanted)


def test_what_a_job_cannot_do_is_one_line(tmp_path: Path) -> None:
    before = f"{pretrained()}: recipe=pretrain knows no target items; fine-tune it first"
    for job in (recommendation_job, export_job):
        with pytest.raises(UserError, match=re.escape(before)):
            job([f"run={pretrained()}", f"out={tmp_path / 'out'}"])
    for more in ("full_ks=5", f"scores={tmp_path}/s.parquet"):
        with pytest.raises(UserError, match=re.escape(before)):
            evaluation_job([f"run={pretrained()}", more])
    with pytest.raises(UserError, match="what is drawn or planted for each user decides the scores"):
        export_job([f"run={fine_tuned('uaf_random')}", f"out={tmp_path / 'out'}", "workers=0"])
    night = ["date=2026-01-04", "out=o", "source=a/{date}", "target=b/{date}", "labels=sampled", "model=nextitnet"]
    with pytest.raises(UserError, match="recipe=finetune_all: fine-tunes a pre-trained run, and a night starts"):
        read_words([*night, "recipe=finetune_all"])
    with pytest.raises(UserError, match="recipe=pretrain: knows no target items, so there is nothing to publish"):
        read_words([*night, "recipe=pretrain"])
    read_words([*night, "recipe=uaf"])


@pytest.mark.parametrize(
    ("recipe", "more", "message"),
    [
        ("pretrain", ["batch.history_length=5"], "sequences of up to 8 items, of which only the last 5 would be"),
        ("pretrain", ["softmax.negatives=100000"], r"source items; softmax.negatives=0 takes each of them once"),
        ("biao", ["model=nextitnet_mtl", "model.source_positions=all"], "take model.source_positions=drawn"),
        ("biao", [], "the model does not read target_category; take model=nextitnet_mtl"),
        ("uaf_hard", ["fine-tuned"], "is no pre-trained run but one of recipe=uaf_hard; .* it began with .*pretrain"),
        ("uaf_hard", ["two phases"], "is no pre-trained run but one of recipe=uaf; warm_start.run= names one of"),
        ("uaf_hard", ["nowhere"], "nowhere: not a run"),
        ("uaf_oracle", ["pre-trained"], r"truth\.parquet: no kinds of users; this needs data with planted sequences"),
    ],
)
def test_a_mistake_in_training_is_one_line(recipe: str, more: list[str], message: str, tmp_path: Path) -> None:
    starts = {
        "fine-tuned": fine_tuned,
        "two phases": lambda: finished("uaf"),
        "nowhere": lambda: tmp_path / "nowhere",
        "pre-trained": pretrained,
    }
    if more and more[0] in starts:
        more = [f"warm_start.run={starts[more[0]]()}"]
    with pytest.raises(UserError, match=message):
        _checked_with_updates(given(tmp_path / "run", recipe, *more))


def _checked_with_updates(found: list[str]) -> None:
    _checked(found)
    check_updates(from_words(found), str(sequenced()))


def shown(run: Path) -> tuple[str, dict[str, list[str]]]:
    """All text of a run's page, and the titles of each section's charts."""
    report = report_of(RunFolder(str(run)), str(sequenced()))
    parts = [report.title, *(part for row in report.headline for part in row)]
    for section in report.sections:
        parts += [section.title, section.says, *(c.title + c.says for c in section.charts)]
        parts += [cell for table in section.tables for row in table.rows for cell in row]
    return "\n".join(parts), {s.title: [c.title for c in s.charts] for s in report.sections}


def test_the_page_of_a_pre_trained_run_speaks_of_sequences() -> None:
    words, charts = shown(pretrained())
    count = read_manifest(str(sequenced())).examples("sequences_test")
    assert charts["Training"] == ["Pre-training: next-item loss"]
    assert f"{count:,} sequences" in words
    assert "Sequences a second" in words or summary(pretrained())["throughput"]["examples_per_s"] is None
    assert "AUC" not in words
    assert "policy" not in words
    assert summary(pretrained())["data"]["sequences"]["train"] == read_manifest(str(sequenced())).examples(SEQUENCES[0])


def test_the_page_of_two_phases_has_the_curves_of_both_and_the_policy() -> None:
    run = finished("uaf")
    words, charts = shown(run)
    assert {"Pre-training: next-item loss", "Training loss", "Validation MRR@5 among all items"} <= {
        *charts["Training"]
    }
    assert charts["The policy: which blocks are fine-tuned, for whom"] == [
        "Share of users whose block is the fine-tuned one"
    ]
    for share in summary(run)["policy"]["tuned_share"]["test"]:
        assert f"{share:.3f}" in words
    assert "The policy: which blocks are fine-tuned, for whom" not in shown(fine_tuned("finetune_all"))[1]


def test_runs_are_compared_by_what_both_have() -> None:
    of = {
        n: RunFolder(str(run)) for n, run in (("pre", pretrained()), ("hard", fine_tuned()), ("uaf", finished("uaf")))
    }
    both = text(compare(of["hard"], of["uaf"]))
    assert "Test AUC of b is" in both
    assert "## Policy" in both
    assert "there is no number that both have" in text(compare(of["pre"], of["hard"]))
    alike = compare(of["pre"], of["pre"])
    assert "next-item loss" in text(alike)
    assert "AUC" not in text(alike) + str(alike.headline)


def test_the_way_of_transfer_of_the_document_trains_norms_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "transfer.md").read_text()
    (code,) = re.findall(r"```python\n(# my_transfer\.py.*?)```", page, re.S)
    (tmp_path / "my_transfer.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    (target,) = re.findall(r"recipe\.transfer\._target_=\S+", page)
    run = tmp_path / "run"
    train(given(run, "finetune_all", target, "recipe.transfer.items=false", f"warm_start.run={pretrained()}"))
    before, after = tensors(pretrained()), tensors(run)
    blocks = [name for name in before if name.startswith("dense.modules.model.encoder.blocks")]
    moved = {name.rsplit(".", 2)[1] for name in blocks if not torch.equal(before[name], after[name])}
    assert moved == {"norm1", "norm2"}
    assert torch.equal(before["tables.source_item.weights"], after["tables.source_item.weights"])


def test_one_pre_trained_encoder_serves_another_target_whose_dataset_extends_its_own(tmp_path: Path) -> None:
    """As docs/transfer.md says: source items keep their ids, and what fine-tuning does not train its values."""
    before = tensors(pretrained())
    logs = pl.read_parquet(scratch() / "sequenced-logs" / "target.parquet")
    logs.with_columns(item_id="book " + pl.col("item_id")).write_parquet(tmp_path / "books.parquet")
    made = ["labels=sampled", "eval_negatives=5", "sequences=8", "history_length=8", "split=user"]
    source = f"source={scratch()}/sequenced-logs/source.parquet"
    options = [source, f"target={tmp_path}/books.parquet", *made, f"extends={sequenced()}", f"out={tmp_path}/data"]
    prepare(options_from_words(options))
    found = [w for w in given(tmp_path / "run", "finetune_cls", f"warm_start.run={pretrained()}") if w[:5] != "data="]
    train([*found, f"data={tmp_path}/data"])
    after = tensors(tmp_path / "run")
    assert torch.equal(before["tables.source_item.weights"], after["tables.source_item.weights"])
    assert "started" in summary(tmp_path / "run")
    with pytest.raises(UserError, match=r"target_item \d+ was \S+ in .* and is book \S+ now"):
        evaluation_job([f"run={fine_tuned()}", f"data={tmp_path}/data"])


def test_a_run_that_was_never_validated_says_what_to_do(tmp_path: Path) -> None:
    first = tmp_path / "pre"
    assert train([*given(first, "pretrain"), "trainer.checkpoint_every=1"], 1, 2) == [KILLED]
    with pytest.raises(UserError, match=r"pre: was not validated yet, .*; let the command that trains it go on"):
        _checked(given(tmp_path / "run", "uaf_hard", f"warm_start.run={first}"))
