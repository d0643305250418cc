"""The report of an experiment: what stands in its tables, figures and page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cdr_dist.configuration import CONFIGS
from cdr_dist.errors import UserError
from cdr_dist.evaluation import experiment_plots as plots
from cdr_dist.evaluation.experiment_report import write_report
from cdr_dist.evaluation.experiment_tables import Findings, Run, as_markdown, grid_table, tables_of, verdict
from cdr_dist.evaluation.paper import load_paper
from cdr_dist.training.experiment import load, names
from tests.browser import check_readable, needs_browser
from tests.experiments import findings, run, summary

PAPERS = CONFIGS / "paper"
LOST = ("mine", "conet", "joint", 9)


def rows_of(text, start):
    """The cells of the first table after a heading."""
    lines = text[text.index(start) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    table = [line for line in lines[first:] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_each_dataset_has_its_own_table_with_models_kept_apart(tmp_path):
    found = findings(tmp_path)
    text = as_markdown(found, tables_of(found))
    for data in ("books-toys", "mine"):
        header, _, *rows = rows_of(text, f"## {data}")
        assert header[:6] == ["model", "method", "seeds", "test AUC", "test logloss", "RelaImpr"]
        assert [row[:3] for row in rows[:8]] == [
            [model, method, "3"]
            for model in ("conet", "minet")
            for method in ("target_only", "source_features", "joint", "biao")
        ]
        of = [r for r in found.runs if r.labels == (data, "minet", "biao")]
        aucs = [r.summary["metrics"]["test"]["auc"] for r in of]
        assert rows[7][3] == f"{np.mean(aucs):.4f} ± {np.std(aucs, ddof=1):.4f}"
        assert rows[0][5] == rows[4][5] == "+0.00%"
        assert rows[2][6:10] == ["-"] * 4  # joint itself


def test_failed_runs_are_named_with_their_reason_and_the_others_are_paired_without_them(tmp_path):
    found = findings(tmp_path, failed={LOST, *((*LOST[:2], "biao", seed) for seed in (8, 9, 10))})
    text = as_markdown(found, tables_of(found))
    rows = {row[1]: row for row in rows_of(text, "## mine")[2:6]}
    assert rows["joint"][2] == "2 of 3"
    assert rows["biao"][2:4] == ["0 of 3", "failed"]
    assert rows["target_only"][2] == "3"
    assert rows["target_only"][7].endswith("(n=2)")
    assert "## Failed: 4 of 48 runs" in text
    assert ["mine / conet / joint / seed 9", "tables.lr=0: must be above 0 <b>"] in rows_of(text, "## Failed")


def test_the_bootstrap_is_over_the_seeds_that_both_have(tmp_path):
    for name in ("whole", "some"):
        (tmp_path / name).mkdir()
    whole = tables_of(findings(tmp_path / "whole", data=("mine",)))
    some = tables_of(findings(tmp_path / "some", failed={LOST}, data=("mine",)))
    a, b = (tables["mine"]["conet"][3].bootstrap for tables in (whole, some))
    assert a.difference != b.difference
    assert a.n == b.n == 1000


def test_figures_of_the_paper_stand_beside_data_of_the_same_domains(tmp_path):
    paper = load_paper(PAPERS, "biao/table1")
    assert paper.scenario("Books", "Toys_and_Games") == "books_toys"
    assert paper.scenario("toys", "books") == paper.scenario("planted-source", "planted-target") == ""
    found = findings(tmp_path, paper=paper, scenarios={"books-toys": "books_toys"}, others=["elec_cloth"])
    text = as_markdown(found, tables_of(found))
    header, _, *rows = rows_of(text, "## books-toys (paper: books_toys)")
    assert header[-2:] == ["paper AUC", "paper RelaImpr"]
    assert rows[3][-2:] == ["0.7048", "+6.78%"]
    assert rows[7][-2:] == ["0.6883", "+10.38%"]
    assert "paper AUC" not in rows_of(text, "## mine")[0]
    assert ["minet", "biao", "0.6099", "+9.79%"] in rows_of(text, "## Paper, other data: elec_cloth")
    with pytest.raises(UserError, match="paper=elec_toys: table1 of the paper has none such"):
        paper.checked("elec_toys")


@pytest.mark.parametrize("name", [name for name in names() if load(name).paper])
def test_every_figure_of_the_paper_belongs_to_a_method_of_the_experiment(name):
    experiment, paper = load(name), load_paper(PAPERS, load(name).paper)
    for scenario, models in paper.scenarios.items():
        for model, methods in models.items():
            assert model in experiment.models
            assert methods.keys() <= experiment.methods.keys()
            assert "auc" not in paper.metrics or all(paper.improvement(scenario, model, m) is not None for m in methods)
            assert all(len(paper.metrics_of(scenario, model, m)) == len(paper.metrics) for m in methods)
    assert {"table1", "table2", "table3", "table5", "figure5", "demo"} <= set(names())


def test_a_verdict_says_whether_a_difference_is_more_than_noise(tmp_path):
    found = findings(tmp_path, seeds=5, data=("mine",))
    sentence = verdict(found, tables_of(found)["mine"]["conet"])
    assert re.match(r"biao has the highest mean test AUC, 0\.7\d+, \+0\.01\d+ from joint \(", sentence)
    one = Findings("x", [run(tmp_path, "d", "m", method, 1) for method in ("joint", "oracle")])
    for each in one.runs:
        object.__setattr__(each, "scores", "")
    assert verdict(one, tables_of(one)["d"]["m"]).endswith("too few runs to say whether that is more than noise.")


def test_the_page_is_one_file_without_scripts_or_network_and_escapes_what_it_is_given(tmp_path):
    found = findings(
        tmp_path,
        failed={LOST},
        chosen={("mine", "conet", "biao"): "a.b=1"},
        searched="4 trials",
        categories={"mine": {3: "<i>"}},
    )
    write_report(found, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "must be above 0 &lt;b&gt;" in page
    assert "<b>" not in page
    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "a.b=1" in page
    assert page.count("<svg") == 2 * (1 + 2 * 2)  # bars, two of weights for each of two models; of two datasets


def test_figures_are_the_same_bytes_every_time(tmp_path):
    found = findings(tmp_path, data=("mine",))
    models = tables_of(found)["mine"]
    assert plots.as_bytes(plots.bars(found, models), "svg") == plots.as_bytes(plots.bars(found, models), "svg")
    write_report(found, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "out" / "figures").iterdir())
    of_weights = [f"{model}-{of}" for model in ("conet", "minet") for of in ("lengths", "weights")]
    assert files == [f"mine-{name}.{kind}" for name in ("auc", *of_weights) for kind in ("png", "svg")]
    ElementTree.fromstring((tmp_path / "out" / "figures" / "mine-auc.svg").read_bytes())


def curve_of(folder, **more):
    methods = {"joint": 0.71, **{f"every {i}": 0.72 + i / 1e5 for i in (5, 20, 100)}}
    runs = [
        run(folder, "mine", model, method, seed, level=auc)
        for model in ("conet", "minet")
        for method, auc in methods.items()
        for seed in (1, 2)
    ]
    points = {f"every {i}": float(i) for i in (5, 20, 100)}
    return Findings("figure5", runs, curve="upper.interval", points=points, **more)


def test_a_curve_has_a_point_a_value_and_a_dotted_line_for_the_others(tmp_path):
    found = curve_of(tmp_path)
    axes = plots.curve(found, tables_of(found)["mine"]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "20", "100"]
    means, joint = (
        [c.lines[0].get_xydata() for c in axes.containers],
        [x for x in axes.lines if len(set(x.get_ydata())) == 1],
    )
    assert [list(xy[:, 0]) for xy in means] == [[5, 20, 100]] * 2
    aucs = [r.summary["metrics"]["test"]["auc"] for r in found.runs if r.labels == ("mine", "conet", "every 20")]
    assert means[0][1, 1] == pytest.approx(np.mean(aucs))
    assert {tuple(x.get_xdata()) for x in joint} == {(0, 1)}


def test_weights_are_means_over_seeds_by_the_names_of_categories(tmp_path):
    found = findings(tmp_path, data=("mine",))
    runs = [r for r in found.runs if r.labels == ("mine", "conet", "biao")]
    axes = plots.weights(found, runs, {8: "Children", 2: "Law"}).axes[0]
    shown = [text.get_text() for text in axes.texts]
    assert "Children" in shown  # sin(8), the highest but 2, 14 and 20 of 24
    assert "… 9 categories between" in " ".join(shown)
    assert plots.weights(found, [r for r in found.runs if r.method == "joint"], {}) is None


def test_weights_by_history_lengths_are_means_of_their_behaviours(tmp_path):
    """On a line, whatever the groups: weight = 1 + difference / 100."""
    found = findings(tmp_path, data=("mine",))
    runs = [r for r in found.runs if r.labels == ("mine", "conet", "biao")]
    line = plots.lengths(found, runs).axes[0].lines[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert len(x) == plots.LENGTH_GROUPS
    assert (np.diff(x) > 0).all()
    np.testing.assert_allclose(y, 1 + 0.01 * np.asarray(x))
    assert plots.lengths(found, [r for r in found.runs if r.method == "joint"]) is None


def of_transfer(folder):
    """Two methods with metrics of rankings, and the pre-training that they start from."""
    values = {"finetune_all": (0.10, 0.20), "uaf_hard": (0.13, 0.22)}
    runs = []
    for method, (mrr, hr) in values.items():
        for seed in (8, 9, 10):
            shift = 0.001 * seed * (1 + (method == "uaf_hard"))
            metrics = {"full_mrr@5": mrr + shift, "full_hr@5": hr + shift}
            of = summary(0.7, 0.7, seed)
            of["metrics"]["test"] |= metrics
            if method == "uaf_hard":
                of["policy"] = {"tuned_share": {"test": [0.25 + 0.05 * (seed - 9), 1.0]}}
            curve = [{"full_hr@5": hr * epoch + shift} for epoch in range(1, 5 - (seed == 10))]
            runs.append(Run("mine", "nextitnet", method, seed, of, validations=curve))
    of = summary(0, 0) | {"metrics": {"test": {"nll": 4.5}, "valid": {"nll": 4.5}}}
    runs.append(Run("mine", "nextitnet", "pretrain", 8, of))
    return Findings(
        "uaf",
        runs,
        metrics=("full_mrr@5", "full_hr@5"),
        beginnings=["pretrain"],
        against="finetune_all",
        highlighted="uaf_hard",
        learning_curve="full_hr@5",
    )


def test_columns_are_the_metrics_and_comparisons_are_of_the_first(tmp_path):
    found = of_transfer(tmp_path)
    tables = tables_of(found)
    text = as_markdown(found, tables)
    header, _, *rows = rows_of(text, "## mine")
    compared = ["full_mrr@5 - finetune_all", "p, seeds", "95% interval, seeds"]
    assert header == ["model", "method", "seeds", "test full_mrr@5", "test full_hr@5", *compared]
    assert [row[1] for row in rows] == ["finetune_all", "uaf_hard"], "pretrain has no row"
    assert rows[0][3:] == ["0.1090 ± 0.0010", "0.2090 ± 0.0010", "-", "-", "-"]
    assert rows[1][5] == "+0.0390"
    low, high = map(float, rows[1][7].split(" … "))
    assert low < 0.039 < high
    assert "pretrain, which others start from (1 runs): test nll 4.5000" in text
    assert "paired t-test over seeds against finetune_all, of full_mrr@5" in text
    assert verdict(found, tables["mine"]["nextitnet"]).startswith(
        "uaf_hard has the highest mean test full_mrr@5, 0.1480"
    )
    assert "AUC" not in text


def test_learning_curves_are_means_over_seeds_as_far_as_all_came(tmp_path):
    found = of_transfer(tmp_path)
    axes = plots.learning(found, "mine", "nextitnet").axes[0]
    for line, hr, twice in zip(axes.lines, (0.20, 0.22), (1, 2), strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), hr * np.arange(1, 4) + 0.009 * twice)
    assert {text.get_text() for text in axes.texts} == {"finetune_all", "uaf_hard"}
    assert plots.learning(replace(found, learning_curve=""), "mine", "nextitnet") is None


def test_the_heat_map_has_a_row_for_all_that_have_a_policy(tmp_path):
    found = of_transfer(tmp_path)
    axes = plots.tuned(found).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.25, 1.0]])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["uaf_hard"]
    other = [replace(run, data="other") for run in found.runs]
    two = plots.tuned(replace(found, runs=[*found.runs, *other])).axes[0]
    assert [tick.get_text() for tick in two.get_yticklabels()] == ["mine", "other"]
    assert plots.tuned(replace(found, runs=[run for run in found.runs if run.method != "uaf_hard"])) is None


def test_figures_of_transfer_stand_on_the_page(tmp_path):
    write_report(of_transfer(tmp_path), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "Validation full_hr@5 over epochs, nextitnet: mean over seeds" in page
    assert "How much of every block is the fine-tuned copy" in page
    assert "pretrain, which others start from" in page
    names = {file.stem for file in (tmp_path / "out" / "figures").glob("*.svg")}
    assert names == {"mine-auc", "mine-nextitnet-learning", "tuned"}


@needs_browser
def test_a_browser_shows_it(tmp_path):
    write_report(of_transfer(tmp_path), tmp_path / "out")
    check_readable(tmp_path / "out" / "report.html", tmp_path, height=2000)


def test_a_paper_with_several_metrics_has_a_column_for_each(tmp_path):
    paper = load_paper(PAPERS, "uaf/table2")
    assert paper.scenario("coldrec1", "coldrec1") == "coldrec_1"
    found = replace(of_transfer(tmp_path), paper=paper, scenarios={"mine": "coldrec_1"}, others=["coldrec_3"])
    text = as_markdown(found, tables_of(found))
    header, _, *rows = rows_of(text, "## mine")
    assert header[-2:] == ["paper mrr@5", "paper hr@5"]
    assert [row[-2:] for row in rows[:2]] == [["0.2565", "0.4345"], ["0.2594", "0.4378"]]
    assert ["nextitnet", "uaf_soft", "0.1209", "0.2189"] in rows_of(text, "## Paper, other data: coldrec_3")


def test_a_grid_is_ranked_by_validation_alone(tmp_path):
    runs = [
        run(tmp_path, "d", "m", method, 1, level=level) for method, level in (("joint|a=1", 0.6), ("joint|a=2", 0.7))
    ]
    text = grid_table(runs)
    assert [row[2] for row in rows_of(text, "Validation")[2:]] == ["joint a=2", "joint a=1"]
    for each in runs:
        each.summary["metrics"]["test"]["auc"] = 0.0
    assert grid_table(runs) == text


def test_the_template_is_shipped_with_the_package():
    import tomllib

    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert declared["package-data"] == {"cdr_dist": ["**/*.j2"]}
