"""report.html: whole in itself, true to the run's files, safe with any name, and something to look at."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.evaluation.charts import BLUE, ORANGE, RED, Bar, Curve, bars, curves
from cdr_dist.jobs import run_job
from cdr_dist.training import report
from cdr_dist.training.report_job import report_job
from cdr_dist.training.report_of_weights import END, LEAST, section_of_weights
from cdr_dist.training.run_folder import RunFolder
from tests.browser import needs_browser, picture
from tests.datasets import rated, sampled, scratch
from tests.problem import replaced
from tests.runs import summary, train
from tests.runs import words as without_report


def words(*given):
    return without_report(*given, "trainer.report=true")


BIAO = ("recipe=biao", "trainer.log_every=5", "upper.lr=0.1", "upper.optimiser=adagrad_norm")
WEIRD = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$x_{", "&amp; ]]> --", "映画", "a\nb" * 40]


@functools.cache
def biao():
    """A finished run that nobody writes into."""
    run = scratch() / "report-biao"
    train(words(rated(), run, *BIAO))
    return run


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, texts by the tags around them, charts, rows of tables."""

    EMPTY = ("meta", "img", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts, self.rows, self.wrong = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, given):
        self.tags.append((tag, dict(given)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, given):
        self.tags.append((tag, dict(given)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, text):
        self.texts.append((tuple(self.open), text))
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text

    def of(self, tag):
        return [text for tags, text in self.texts if tag in tags]

    def titles(self):
        return [text for tags, text in self.texts if tags and tags[-1] == "h3"]


def page(run):
    found = Page((Path(run) / "report.html").read_text())
    assert (found.wrong, found.open) == ([], [])
    return found


def is_whole_in_itself(found):
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    for _, given in found.tags:
        assert not [name for name in given if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert given.get(name, "#").startswith("#")
    assert "@import" not in "".join(found.of("style"))
    assert all("href" in given for tag, given in found.tags if tag == "use")
    ids = [given["id"] for _, given in found.tags if "id" in given]
    assert len(ids) == len(set(ids))  # charts do not take one another's shapes
    text = "".join(str(given) for _, given in found.tags)
    assert {*re.findall(r"url\(#([\w-]+)\)", text), *(g["href"][1:] for _, g in found.tags if "href" in g)} <= set(ids)


def test_the_page_of_a_run_says_what_its_files_say():
    found, told = page(biao()), summary(biao())
    is_whole_in_itself(found)
    assert found.of("h1") == ["biao with CoNet on rated"]
    cells = {row[0]: row[1:] for row in found.rows if row}
    assert cells["AUC"] == [f"{told['metrics'][split]['auc']:.4f}" for split in ("valid", "test")]
    passes = told["backward_passes"]
    assert cells["Lower: the model"] == [f"{passes['lower']:,}", "1.00"]
    assert cells["Upper: the hypergradient"][0] == f"{passes['upper']:,}"
    assert cells["Predicted, lower and upper"][0] == f"{passes['predicted']:,}"
    manifest = read_manifest(str(rated()))
    assert cells["Test"][:2] == [f"{manifest.examples('test'):,}", f"{manifest.unseen['test']['user']:.1%}"]
    assert cells["helpful"] == [f"{told['weights']['truth']['mean_weight']['helpful']:.3f}"]
    assert found.titles() == [
        "Training loss",
        "Validation AUC",
        "Validation log loss",
        "Gamma, the sum of a batch's weights",
        "Vectors of the hypergradient's series, |v_n|",
        "Norm of the hypergradient",
        "Mean weight by source category",
        "How the weights spread",
        "Mean weight by difference of history lengths",
    ]
    said = dict(zip(found.titles(), found.of("figcaption"), strict=True))
    values = [json.loads(line) for line in (biao() / "metrics.jsonl").read_text().splitlines()]
    losses = [line["values"]["target_loss"] for line in values if line["split"] == "train"]
    assert (
        f"The target loss goes from {losses[0]:.4g} at step 5 to {losses[-1]:.4g} at step 40" in said["Training loss"]
    )
    names = [given["aria-label"] for tag, given in found.tags if tag == "svg"]
    assert all(name.startswith(f"{title}. {text}") for name, (title, text) in zip(names, said.items(), strict=True))
    folded = "".join(found.of("pre"))
    assert (biao() / "config.yaml").read_text() in folded
    assert all(f"{name} {v}" in folded for name, v in json.loads((biao() / "versions.json").read_text()).items())


def test_every_category_stands_in_the_table_with_its_name_and_kind():
    weights = pl.read_parquet(biao() / "weights.parquet")
    names = dict(pl.read_parquet(rated() / "vocab/source_category.parquet").rows())
    kinds = dict(pl.read_parquet(rated() / "truth.parquet").select("category", "kind").rows())
    rows = {tuple(row) for row in page(biao()).rows}
    for category, behaviours, weight, _ in weights.select("category", "behaviours", "weight", "score").rows():
        name = names[category]
        assert (name, kinds[name], f"{weight:.4f}", f"{behaviours:,}") in rows


def test_what_does_not_apply_is_not_there(tmp_path):
    train(words(rated(), tmp_path / "run", "recipe=target_only", "trainer.log_every=5"))
    found = page(tmp_path / "run")
    is_whole_in_itself(found)
    assert found.of("h2") == ["Result", "Training", "Cost", "Data", "How to repeat it"]
    assert found.titles() == ["Training loss", "Validation AUC", "Validation log loss"]
    assert not (tmp_path / "run/weights_histogram.parquet").exists()
    words_of_page = " ".join(text for _, text in found.texts)
    for word in ("gamma =", "Upper", "Head:", "weighted source", "None", "nan"):
        assert word not in words_of_page.replace(found.of("pre")[0], "")


def test_sampled_labels_and_ranks_are_named(tmp_path):
    train(words(sampled(), tmp_path / "run", "recipe=biao", "evaluation.ks=[3]", "evaluation.full_ks=[5]"))
    cells = {row[0]: row[1:] for row in page(tmp_path / "run").rows if row}
    test = summary(tmp_path / "run")["metrics"]["test"]
    assert cells["NDCG@3"][1] == f"{test['ndcg@3']:.4f}"
    assert cells["HR@5 among all items"][1] == f"{test['full_hr@5']:.4f}"


# ---- what the files say of the weights ------------------------------------------------------------------------------


def test_weights_of_two_workers_are_those_of_one(tmp_path):
    """The parameters differ by rounding, so a behaviour near an edge of a bin may change sides."""
    train(words(rated(), tmp_path / "two", *BIAO), 2)
    one, two = (
        {path.stem: pl.read_parquet(path) for path in Path(run).glob("weights*.parquet")}
        for run in (biao(), tmp_path / "two")
    )
    assert sorted(one) == ["weights", "weights_by_length", "weights_histogram"]
    for name, key in [("weights", "category"), ("weights_by_length", "difference")]:
        assert one[name].select(key, "behaviours").equals(two[name].select(key, "behaviours"))
        for column in set(one[name].columns) - {key, "behaviours"}:
            np.testing.assert_allclose(two[name][column], one[name][column], rtol=2e-3)
    both = one["weights_histogram"].join(two["weights_histogram"], on="lower", how="full", coalesce=True).fill_null(0)
    moved = (both["behaviours"] - both["behaviours_right"]).abs().sum()
    assert moved <= 0.05 * one["weights"]["behaviours"].sum()


def test_the_three_files_are_about_the_same_behaviours():
    weights, spread, lengths = (
        pl.read_parquet(biao() / f"weights{name}.parquet") for name in ("", "_histogram", "_by_length")
    )
    total = weights["behaviours"].sum()
    assert spread["behaviours"].sum() == lengths["behaviours"].sum() == total > 1000
    mean = (weights["weight"] * weights["behaviours"]).sum() / total
    assert (lengths["weight"] * lengths["behaviours"]).sum() / total == pytest.approx(mean)
    middle = (spread["lower"] * spread["upper"]).sqrt()
    assert (middle * spread["behaviours"]).sum() / total == pytest.approx(mean, rel=0.012)  # half a bin
    squared = (lengths["weight_squared"] * lengths["behaviours"]).sum() / total
    assert (middle**2 * spread["behaviours"]).sum() / total == pytest.approx(squared, rel=0.025)
    assert spread["lower"].is_sorted()
    assert (spread["upper"] > spread["lower"]).all()


def test_differences_are_those_of_the_stored_histories():
    """Every example of the train split has one source behaviour where its labels are ratings."""
    rows = pl.concat([pl.read_parquet(path) for path in sorted((rated() / "train").glob("*.parquet"))])
    rows = rows.filter(pl.col("source_candidates_item").list.len() > 0)
    difference = rows.select(
        pl.col("source_history_item").list.len().cast(pl.Int64)
        - pl.col("target_history_item").list.len().cast(pl.Int64)
    ).to_series()
    expected = difference.value_counts().sort(difference.name).rows()
    assert rows["source_history_item"].list.len().max() > 6  # batch.history_length
    assert pl.read_parquet(biao() / "weights_by_length.parquet").select("difference", "behaviours").rows() == expected


# ---- names that nobody expects --------------------------------------------------------------------------------------


def copy_with(tmp_path, categories, names):
    """A run with these rows of weights.parquet, on a dataset whose vocabulary has these names."""
    run, data = Path(shutil.copytree(biao(), tmp_path / "run")), Path(shutil.copytree(rated(), tmp_path / "data"))
    pl.DataFrame(categories, orient="row", schema=["category", "behaviours", "weight", "score"]).write_parquet(
        run / "weights.parquet"
    )
    ids = pl.Series(range(2, 2 + len(names)), dtype=pl.Int32)
    pl.DataFrame({"id": ids, "key": names}).write_parquet(data / "vocab/source_category.parquet")
    (data / "truth.parquet").unlink()
    return run, data


def test_names_are_text_whatever_they_are(tmp_path):
    run, data = copy_with(tmp_path, [(2 + i, 50, 1.0 + i / 10, 0.0) for i in range(len(WEIRD))], WEIRD)
    report.write_report(RunFolder(str(run)), str(data))
    found = page(run)
    is_whole_in_itself(found)
    rows = {row[0] for row in found.rows if row}
    assert set(WEIRD) <= rows
    drawn = {text.strip() for text in found.of("text")}
    assert {"<script>alert(1)</script>", "$x_{", "&amp; ]]> --", "映画"} <= drawn


def test_of_many_categories_the_ends_are_drawn_and_the_rare_left_out(tmp_path):
    names = [f"c{i}" for i in range(60)]
    rare = [(2, LEAST - 1, 9.0, 0.0)]
    run, data = copy_with(tmp_path, rare + [(3 + i, LEAST, 2.0 - i / 50, 0.0) for i in range(59)], names)
    place = RunFolder(str(run))
    found = section_of_weights(place, summary(run), str(data), read_manifest(str(data)))
    drawn = re.findall(r">(c\d+)</text>", found.charts[0].svg)
    assert sorted(drawn, key=lambda name: int(name[1:])) == names[1 : 1 + END] + names[-END:]
    assert f"{59 - 2 * END} between" in found.charts[0].svg
    assert "Most counts c1 (2.00), least c59 (0.84)" in found.charts[0].says


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weights_that_are_all_equal_are_drawn(weight, tmp_path):
    run, data = copy_with(tmp_path, [(2, 50, weight, 0.0)], ["all"])
    edges = [(0.0, 0.0, 50)] if weight == 0 else [(2 ** (-1 / 64), 2 ** (1 / 64), 50)]
    pl.DataFrame(edges, orient="row", schema=["lower", "upper", "behaviours"]).write_parquet(
        run / "weights_histogram.parquet"
    )
    lengths = {"difference": [3], "behaviours": [50], "weight": [weight], "weight_squared": [weight**2]}
    pl.DataFrame(lengths).write_parquet(run / "weights_by_length.parquet")
    (run / "summary.json").write_text(json.dumps(summary(run) | {"weights": {"mean": weight, "truth": None}}))
    report.write_report(RunFolder(str(run)), str(data))
    found = page(run)
    is_whole_in_itself(found)
    assert ("How the weights spread" in found.titles()) == (weight > 0)
    assert "Against the planted truth" not in found.of("caption")


# ---- charts ---------------------------------------------------------------------------------------------------------


def test_equal_data_give_equal_bytes(tmp_path):
    run = shutil.copytree(biao(), tmp_path / "run")
    report.write_report(RunFolder(str(run)), str(rated()))
    first = (run / "report.html").read_bytes()
    report.write_report(RunFolder(str(run)), str(rated()))
    assert (run / "report.html").read_bytes() == first


def test_a_wide_spread_is_drawn_on_a_logarithmic_axis():
    def ticks(values):
        found = re.findall(
            r"<text[^>]*>([^<]+)</text>", curves("c", [Curve("v", list(range(len(values))), values)], "v")
        )
        return [float(text) for text in found if re.fullmatch(r"[\d.e-]+", text)][-4:]

    low, *_, high = ticks([1e-7, 1e-4, 1e-1])
    assert high / low >= 1e3
    assert len({round(step, 6) for step in np.diff(ticks([1.0, 2.0, 3.0]))}) == 1


def test_a_long_curve_is_drawn_as_means():
    x = np.arange(100_000)
    long = curves("c", [Curve("v", x, np.sin(x))], "v")
    assert len(long) < 30_000


def test_labels_are_never_formulas():
    assert "$\\frac{1}{2}$" in bars("b", [Bar("$\\frac{1}{2}$", 1.0)], "x", 1.0, {})


# ---- when something is wrong ----------------------------------------------------------------------------------------


def test_a_report_that_fails_leaves_the_run_finished_and_says_so(tmp_path, capsys):
    def fails(*_):
        raise RuntimeError("no ink\nmore")

    with replaced(report, "page", fails):
        train(words(rated(), tmp_path / "run", "recipe=target_only", "trainer.max_steps=6"))
    assert summary(tmp_path / "run")["steps"] == 6
    assert f"{tmp_path}/run: no report was written (RuntimeError: no ink)\n" in capsys.readouterr().err
    assert not (tmp_path / "run/report.html").exists()


def test_a_run_that_goes_on_has_no_report_until_its_end(tmp_path):
    run = Path(shutil.copytree(biao(), tmp_path / "run"))
    from cdr_dist.configuration import from_words

    RunFolder(str(run)).open(from_words(words(rated(), run, *BIAO, "trainer.max_steps=60")))
    assert not (run / "report.html").exists()


def test_training_does_not_load_matplotlib():
    check = "import sys, cdr_dist.training.worker, cdr_dist.training.job; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[1]).returncode == 0


@pytest.fixture
def job(monkeypatch, capsys):
    def run(*given):
        monkeypatch.setattr("sys.argv", ["report.py", *given])
        code = run_job("report", None, report_job)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_job_writes_it_again(job, tmp_path):
    run = Path(shutil.copytree(biao(), tmp_path / "run"))
    (run / "report.html").unlink()
    assert job(f"run={run}") == (0, f"{run}/report.html\n", "")
    assert page(run).titles() == page(biao()).titles()


def test_of_a_dataset_that_is_gone_the_numbers_stay(job, tmp_path):
    run = Path(shutil.copytree(biao(), tmp_path / "run"))
    config = (run / "config.yaml").read_text().replace(str(rated()), str(tmp_path / "gone"))
    (run / "config.yaml").write_text(config)
    assert job(f"run={run}")[0] == 0
    found = page(run)
    is_whole_in_itself(found)
    assert "Unseen users" not in " ".join(found.of("th"))
    assert any("could not be read" in text for text in found.of("p"))
    assert "category 2" in found.of("th")


def test_a_run_in_an_object_store_has_the_page_too(store, s3, tmp_path):
    run = f"{s3}/run"
    train(words(rated(), run, *BIAO))
    (tmp_path / "report.html").write_bytes(storage.read_bytes(f"{run}/report.html"))
    assert page(tmp_path).titles() == page(biao()).titles()
    assert "weights_histogram.parquet" in storage.names(run)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "run= is missing"),
        (["run"], "'run': options are written key=value"),
        (["rn=x"], "rn: unknown option"),
        (["run=x"], "x: not a run (no config.yaml)"),
        (["run=unfinished"], "unfinished: is not finished (no summary.json)"),
        (["run=old"], "weights.parquet: "),
    ],
)
def test_a_mistake_is_one_line(given, message, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(biao(), tmp_path / "unfinished", ignore=shutil.ignore_patterns("summary.json"))
    (Path(shutil.copytree(biao(), tmp_path / "old")) / "weights.parquet").write_bytes(b"PAR1 damaged")
    code, out, error = job(*given)
    assert (code, out) == (2, ""), error
    assert message in error
    assert len(error.splitlines()) == 1


# ---- seen by a browser ----------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize(("width", "height"), [(1100, 3000), (500, 4600)], ids=["desk", "phone"])
def test_a_browser_shows_it(width, height, tmp_path):
    shown = picture(f"{biao()}/report.html", width, height, tmp_path)
    inked = (shown < 250).any(2)
    assert 0.03 < inked.mean() < 0.5
    assert inked[:600].any()
    assert inked[height * 3 // 4 :].mean() > 0.01  # down to the charts of the weights, and further
    assert not inked[:, -10:].any()  # nothing is wider than the page
    for colour, least in [(BLUE, 0.01), (ORANGE, 1e-4), (RED, 1e-3)]:  # of the charts
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(shown - wanted) < 12).all(2).mean() > least, colour
