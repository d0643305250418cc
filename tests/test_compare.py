"""jobs/compare.py: what two runs have and have not in common."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cdr_dist.errors import UserError
from cdr_dist.evaluation.metrics import auc
from cdr_dist.training.comparison import compare, difference
from cdr_dist.training.comparison_job import comparison_job
from cdr_dist.training.run_folder import SCORES, RunFolder
from tests.browser import check_readable, needs_browser
from tests.datasets import rated, sampled, scratch
from tests.runs import summary, train, words


@functools.cache
def trained(name, *more):
    run = scratch() / f"compared-{name}"
    train(words(sampled() if name == "other-data" else rated(), run, "trainer.log_every=10", *more))
    return run


def joint():
    return trained("joint", "recipe=joint")


def biao():
    return trained("biao", "recipe=biao", "upper.gamma0=2")


def test_the_text_says_what_differs_and_by_how_much(tmp_path, capsys):
    comparison_job([f"a={joint()}", f"b={biao()}", f"out={tmp_path}/both.html"])
    said = capsys.readouterr().out
    gained = auc_of(biao()) - auc_of(joint())
    assert f"Test AUC of b is {gained:+.4f} from a's" in said
    options = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
    assert re.search(r"\| 1\.0 +\| 2\.0 +\|", options["upper.gamma0"])
    assert re.search(r"\| joint +\| biao +\|", options["recipe.name"])
    assert "data" not in options
    assert f"{summary(biao())['upper_steps']}" in options["Upper updates"]
    page = (tmp_path / "both.html").read_text()
    assert page.count("<svg") == 2, "training loss, validation AUC"
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)


@needs_browser
def test_a_browser_shows_it(tmp_path, capsys):
    comparison_job([f"a={joint()}", f"b={biao()}", f"out={tmp_path}/both.html"])
    check_readable(tmp_path / "both.html", tmp_path, height=1600)


def auc_of(run):
    rows = pl.read_parquet(run / SCORES)
    return auc(rows["label"].to_numpy(), rows["score"].to_numpy())


def test_a_run_and_itself_differ_by_nothing():
    report = compare(RunFolder(str(biao())), RunFolder(str(biao())))
    sections = {section.title: section for section in report.sections}
    assert sections["What differs"].says == "Nothing: both have one configuration."
    assert all(row[-1] in ("+0.0000", "–") for row in sections["Result"].tables[0].rows)
    weights = sections["Weights"].tables[0].rows
    assert all(row[2] == row[3] and row[4] == "+0.00" for row in weights)
    mean = np.average([float(row[2]) for row in weights], weights=[int(row[1].replace(",", "")) for row in weights])
    assert mean == pytest.approx(1.0, abs=0.01)


def test_runs_on_other_rows_stand_beside_each_other_without_an_interval():
    other = trained("other-data", "recipe=joint")
    assert difference(RunFolder(str(joint())), RunFolder(str(other))) is None
    report = compare(RunFolder(str(joint())), RunFolder(str(other)))
    assert report.sections[0].says.startswith("Measured on other test rows")
    assert [name for name, *_ in report.headline] == ["Test AUC of a", "Test AUC of b"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["a=nowhere"], "b= is missing"),
        (["a=nowhere", "b=nowhere"], "nowhere: not a run"),
        (["a=x", "c=y"], "c: unknown option"),
        (["a={begun}", "b={joint}"], r"is not finished \(no summary.json\), so there is nothing to compare yet"),
    ],
)
def test_mistakes_are_one_line(given, message, tmp_path):
    begun = Path(shutil.copytree(joint(), tmp_path / "begun"))
    (begun / "summary.json").unlink()
    with pytest.raises(UserError, match=message):
        comparison_job([word.format(begun=begun, joint=joint()) for word in given])
